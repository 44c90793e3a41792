"""The house rules: pins that agree, words and paths that do not belong here."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import scgenlib

TEXT = {".py", ".md", ".yml", ".yaml", ".toml", ".cff", ".css", ".lock", ".txt",
        ".ipynb", ".json", ".bib", ".svg", ".smk", ""}  # fmt: skip


def tracked(repo: Path) -> list[Path]:
    """Return the text files of the repository, without what git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=repo,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout: the list of files is not known")
    paths = {repo / name for name in listed.stdout.splitlines()}
    return sorted(p for p in paths if p.suffix in TEXT and p.is_file())


def pins(path: Path, system: str = sys.platform) -> dict[str, str]:
    """Return name -> version of a lock file; anything but an exact pin fails."""
    found: dict[str, str] = {}
    for line in path.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        line, _, marker = line.partition("; ")
        # One line for Windows, one for the others: each system reads one.
        if marker and not Marker(marker).evaluate({"sys_platform": system}):
            continue
        match = re.fullmatch(r"([a-z0-9.-]+)==([0-9][0-9a-z.]*)", line)
        assert match, f"{path.name}: not an exact pin without hash: {line!r}"
        assert match[1] == canonicalize_name(match[1]), line
        assert match[1] not in found, f"{path.name} pins {match[1]} twice"
        found[match[1]] = match[2]
    return found


def project(repo: Path) -> dict:
    return tomllib.loads((repo / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize(
    ("lock", "extras"),
    [
        ("requirements.lock", ["", "book", "test"]),
        ("requirements-results.lock", ["results"]),
    ],
)
@pytest.mark.parametrize("system", ["linux", "win32"])
def test_lock_satisfies_pyproject(repo, lock, extras, system):
    about = project(repo)
    groups = {"": about["dependencies"], **about["optional-dependencies"]}
    locked = pins(repo / "requirements.lock", system) | pins(repo / lock, system)
    for text in (text for extra in extras for text in groups[extra]):
        need = Requirement(text)
        if need.marker and not need.marker.evaluate({"sys_platform": system}):
            continue
        name = canonicalize_name(need.name)
        assert name in locked, f"{name} is not in {lock}"
        assert need.specifier.contains(locked[name]), f"{text}: {locked[name]}"


def test_locks_do_not_disagree(repo):
    first = pins(repo / "requirements.lock")
    second = pins(repo / "requirements-results.lock")
    assert len(first) > 100 and len(second) > 5
    assert not set(first) & set(second)


def test_pins_that_tools_depend_on(repo):
    locked = pins(repo / "requirements.lock")
    assert locked["torch"] == "2.13.0"
    assert locked["jupyter-book"].startswith("1.")
    # Later ones write a warning to the stderr of every kernel.
    assert locked["ipykernel"] == "7.2.0"
    # A widget would pull scripts from the network when a page is looked at.
    assert "ipywidgets" not in locked
    assert {"igraph", "leidenalg"} <= set(locked)


def test_conda_installs_the_same_pins(repo):
    environment = yaml.safe_load((repo / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert conda == ["python=3.11", "pip"]
    assert pip == {"pip": ["-r requirements.lock", "-e ."]}


def test_versions_agree(repo):
    citation = yaml.safe_load((repo / "CITATION.cff").read_text())
    assert str(citation["version"]) == scgenlib.__version__
    assert citation["license"] == project(repo)["license"] == "BSD-3-Clause"
    assert (repo / "LICENSE").read_text().startswith("BSD 3-Clause License")


MACHINE = re.compile(r"/(?:work|root|tmp|home/\w+|Users/\w+)/\w")


def test_no_path_of_a_machine_is_tracked(repo):
    found = [
        f"{path.relative_to(repo)}: {line.strip()[:100]}"
        for path in tracked(repo)
        if path.name != Path(__file__).name
        for line in path.read_text(encoding="utf-8").splitlines()
        if len(line) < 5000 and MACHINE.search(line)
    ]
    assert not found, "\n".join(found)


# American form -> British form, where both are words of this field.
SPELLING = {
    r"normaliz(?!er_)": "normalis",
    r"\bcolor(?=ed|ing|ful|s? of| blind|-blind)": "colour",
    r"\bbehavior": "behaviour",
    r"\bneighbor(?=ing|s? of|hood of| cells?)": "neighbour",
    r"\bvisualiz": "visualis",
    r"\bregulariz": "regularis",
    r"\bgeneraliz": "generalis",
    r"\bsummariz": "summaris",
    r"\bminimiz(?!e\()": "minimis",
    r"\bmemoriz": "memoris",
    r"\bstandardiz": "standardis",
    r"\brecogniz": "recognis",
    r"\banalyz": "analys",
    r"\blabel(?=ed\b|ing\b)": "labell",
    r"\bmodel(?=ed\b|ing\b)": "modell",
    r"\bfavor": "favour",
    r"\bcenter(?=ed on|ed at| of)": "centre",
}


def prose(path: Path) -> list[str]:
    """Return the lines that a reader reads: Markdown, and comments of code."""
    import json

    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        parts = ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
        return "\n".join(parts).splitlines()
    if path.suffix == ".md":
        return re.sub(r"`[^`\n]*`", "", text).splitlines()
    if path.suffix == ".py":
        return [line for line in text.splitlines() if line.lstrip().startswith("#")]
    return []


def test_british_spelling(repo):
    found = []
    for path in tracked(repo):
        for line in prose(path):
            for american, british in SPELLING.items():
                if re.search(american, re.sub(r"`[^`]*`", "", line), re.IGNORECASE):
                    found.append(f"{path.relative_to(repo)}: {british}-: {line[:90]}")
    assert not found, "\n".join(found)


def code_lines(path: Path) -> int:
    """Return how many lines hold code: no blanks, comments or docstrings."""
    source = path.read_text()
    kept: set[int] = set()
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT,
               tokenize.DEDENT, tokenize.ENDMARKER)  # fmt: skip
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            kept |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                kept -= set(range(node.lineno, (node.end_lineno or 0) + 1))
    return len(kept)


def test_package_stays_small(repo):
    lines = {
        str(path.relative_to(repo)): code_lines(path)
        for path in (repo / "scgenlib").rglob("*.py")
    }
    # The design says about 7,000, which the third method passed; the fourth brought
    # count likelihoods, the integration metrics, reading from disk and processes; the
    # fifth names of perturbations, layouts, splits, a screen, its metrics and trials;
    # classes brought homework, also of the foundations; pages are held to the records
    # that they show. A ratchet: lowered when lines go, and not raised without
    # a reason in the log.
    assert sum(lines.values()) <= 15_560
    # A file beyond 500 lines holds two ideas; a method's may reach 700.
    assert not {path: n for path, n in lines.items() if n > 700}


def test_import_is_light():
    code = (
        "import sys, scgenlib\n"
        "heavy = {'torch', 'scanpy', 'umap', 'torch_geometric', 'papermill'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_math_needs_no_network(repo):
    config = yaml.safe_load((repo / "_config.yml").read_text())["sphinx"]["config"]
    assert config["html_extra_path"] == ["vendor"]
    assert config["mathjax_path"] == "../mathjax/tex-svg.js"
    # jupyter-book would load a script below _static a second time.
    assert not list((repo / "_static").rglob("*.js"))


def test_citations_exist_once(repo):
    keys = re.findall(r"^@\w+\{([^,]+),", (repo / "book/references.bib").read_text(),
                      re.MULTILINE)  # fmt: skip
    assert len(keys) > 20 and len(keys) == len(set(keys))
    cited: set[str] = set()
    for path in [*(repo / "book").glob("*.md"), *(repo / "book").glob("*.ipynb")]:
        for group in re.findall(r"\{cite:\w+\}`([^`]+)`", path.read_text()):
            cited |= {key.strip() for key in group.split(",")}
    assert cited and cited <= set(keys), cited - set(keys)


def test_glossary_is_sorted(repo):
    text = (repo / "book" / "glossary.md").read_text().split("```{glossary}\n")[1]
    terms = re.findall(r"^(\S.*)$", text.split("```")[0], re.MULTILINE)
    assert len(terms) > 30
    assert terms == sorted(terms, key=lambda term: re.sub(r"\W", " ", term.lower()))


def test_makefile_shows_its_targets(repo):
    shown = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=repo,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for target in ("book", "refresh", "results", "test", "chapter", "bench", "serve",
                   "clean", "lint", "help"):  # fmt: skip
        assert f"make {target} " in shown
