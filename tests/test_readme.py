"""What the README tells a reader to type does what it says."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from terminal import on_a_terminal

import generated_pages
from scgenlib import cli

README = Path(__file__).resolve().parent.parent / "README.md"
# Minutes long, and run as a whole by the continuous integration.
EXPENSIVE = ("make book", "make test")


def blocks(language: str) -> list[str]:
    pattern = rf"^```{language}\n(.*?)^```$"
    return re.findall(pattern, README.read_text(), re.MULTILINE | re.DOTALL)


def shell_lines() -> list[str]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [line.split("#")[0].strip() for line in lines if line.strip()]


def test_order_of_the_sections():
    text = README.read_text()
    marks = ["page.png", "make book", "make test", "papermill book/", "scgenlib run",
             "```python", "<!-- matrix: begin -->"]  # fmt: skip
    places = [text.index(mark) for mark in marks]
    assert places == sorted(places)


def test_every_shell_line_is_known():
    first = {" ".join(shlex.split(line)[:2]) for line in shell_lines()}
    assert first == {
        "make book",
        "make test",
        "mkdir -p",
        "papermill book/garage.ipynb",
        "scgenlib run",
        "scgenlib datasets",
    }


@pytest.mark.parametrize("line", EXPENSIVE)
def test_make_targets_exist(repo, line):
    assert line in shell_lines()
    planned = subprocess.run(
        ["make", "-n", line.split()[1]], cwd=repo, capture_output=True, text=True
    )
    assert planned.returncode == 0
    assert (
        "tools/book.py" if "book" in line else "--dist loadfile tests"
    ) in planned.stdout


def test_papermill_line_has_what_a_terminal_asks_for(repo, tmp_path):
    """Prepare the notebook only: its cells are run by other tests."""
    if not (repo / "book" / "garage.ipynb").is_file():
        pytest.fail("book/garage.ipynb does not exist")
    (tmp_path / "book").symlink_to(repo / "book")
    made, line = (n for n in shell_lines() if n.startswith(("mkdir", "papermill")))
    status, printed = on_a_terminal(f"{made} && {line} --prepare-only", tmp_path)
    assert status == 0, printed
    (output,) = (tmp_path / "runs").iterdir()
    assert 'dataset = \\"pollen\\"' in output.read_text()
    assert "unknown parameter" not in printed
    # Without an output path, papermill on a terminal asks for one.
    without = re.sub(r" runs/\S+", "", line)
    status, printed = on_a_terminal(without, tmp_path)
    assert status == 2 and "OUTPUT_PATH" in printed


def test_run_line_is_accepted(tmp_path, monkeypatch):
    line = next(n for n in shell_lines() if n.startswith("scgenlib run"))
    started = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_execute", lambda *a: started.append(a) or 0)
    assert cli.main(shlex.split(line)[1:]) == 0
    ((chapter, output, parameters),) = started
    assert chapter.name == "garage.ipynb" and parameters == {"dataset": "pollen"}
    assert output.parent == tmp_path / "runs"


def test_datasets_line_on_a_terminal(tmp_path):
    line = next(n for n in shell_lines() if n.startswith("scgenlib datasets"))
    status, printed = on_a_terminal(line, tmp_path)
    assert status == 0 and "pollen" in printed and "Traceback" not in printed


def test_snippet_runs_alone(tmp_path):
    (snippet,) = blocks("python")
    assert len([line for line in snippet.splitlines() if line.strip()]) <= 10
    done = subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert "AnnData object with n_obs × n_vars = 200" in done.stdout
    assert 0.0 <= float(done.stdout.split()[-1]) <= 1.0
    assert not list(tmp_path.iterdir())


def test_links_lead_somewhere(repo):
    targets = re.findall(r"\]\(([^)#:]+)\)", README.read_text())
    missing = [target for target in targets if not (repo / target).exists()]
    assert targets and not missing


def test_matrix_is_the_recorded_one(repo):
    text = README.read_text()
    between = text.split("<!-- matrix: begin -->\n")[1].split("<!-- matrix: end -->")[0]
    assert between.strip() == generated_pages.matrix_table(repo).strip()
