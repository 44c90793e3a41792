"""Class material: nothing of a solution reaches a student, and all of it works."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from html.parser import HTMLParser

import nbformat
import numpy as np
import pandas as pd
import pytest
from scipy import stats

import book
import classroom
import classroom_bundle as bundle
import classroom_notebooks as notebooks
import classroom_slides
from classroom_myst import ClassroomError, Converter
from scgenlib import chapter, homework, metrics, selfcheck
from scgenlib.errors import ConfigError

NAMES = [path.stem for path in book.notebooks()]


@pytest.fixture(scope="module")
def labels():
    return notebooks.all_labels(NAMES)


def words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z_]\w+|\d+\.?\d*", text)


def distinctive(texts: list[str], elsewhere: str) -> list[str]:
    """Lines of a solution that say something, and that no other cell has."""
    lines = [line.strip() for text in texts for line in text.splitlines()]
    return [x for x in lines if len(words(x)) >= 3 and x not in elsewhere]


# --- notebooks ------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_no_solution_survives_in_a_student_file(name, labels):
    source = notebooks.read(name)
    tasks = notebooks.exercises(source, name)
    assert len(tasks) >= 3 and all(task.code for task in tasks.values())
    kept = [p.source for p in notebooks.pieces(source, name) if not p.solution]
    hidden = [x for task in tasks.values() for x in task.code + task.text]
    lines = distinctive(hidden, "\n".join(kept))
    assert len(lines) > 5
    student = notebooks.student(name, labels)
    text = "\n".join(cell.source for cell in student.cells)
    assert not [line for line in lines if line in text]
    # Not even eight words in a row, however they are broken into lines.
    run = " ".join(words(text))
    shared = " ".join(words("\n".join(kept)))
    for part in hidden:
        tokens = words(part)
        for i in range(len(tokens) - 7):
            gram = " ".join(tokens[i : i + 8])
            assert gram not in run or gram in shared, gram


@pytest.mark.parametrize("name", NAMES)
def test_answers_of_predictions_are_for_the_teacher(name, labels):
    answers: list[str] = []
    spy = Converter(name, labels, lambda q, a: answers.append(a) or "")
    for cell in notebooks.read(name).cells:
        if cell.cell_type == "markdown" and "Predict first" in cell.source:
            spy.cell(cell.source)
    # Compare asks by letters: its answers are solutions of exercises.
    assert bool(answers) == (name != "compare")
    made = {role: getattr(notebooks, role)(name, labels)
            for role in ("student", "instructor")}  # fmt: skip
    seen = {role: " ".join(words("\n".join(c.source for c in nb.cells)))
            for role, nb in made.items()}  # fmt: skip
    for answer in answers:
        gram = " ".join(words(answer)[:8])
        assert gram in seen["instructor"] and gram not in seen["student"]
    text = "\n".join(c.source for c in made["student"].cells)
    assert text.count("Your vote") == len(answers)


@pytest.mark.parametrize("role", ["student", "instructor"])
@pytest.mark.parametrize("name", NAMES)
def test_notebooks_read_well_in_plain_jupyter(name, role, labels):
    notebook = getattr(notebooks, role)(name, labels)
    nbformat.validate(notebook)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            if role == "student":
                assert not cell.outputs and cell.execution_count is None
            continue
        text = re.sub(r"```.*?```|`[^`]*`|\$\$.*?\$\$", "", cell.source, flags=re.S)
        for left in (r"\{[\w:]+\}", r"^:\w+:", r"^\([\w-]+\)=", r"</?\w+>", r"\]\{"):
            assert not re.search(left, re.sub(r"\$[^$]*\$", "", text), re.M), text
        for picture in re.findall(r"\(attachment:([^)]+)\)", cell.source):
            assert picture in cell.attachments
    outputs = [c for c in notebook.cells if c.get("outputs")]
    assert bool(outputs) == (role == "instructor")


@pytest.mark.parametrize("name", NAMES)
def test_stubs_say_what_is_missing_and_do_not_raise(name, labels):
    cells = notebooks.student(name, labels).cells
    tasks = notebooks.exercises(notebooks.read(name), name)
    assert len(notebooks.stubs(cells)) == len(tasks)
    for number, stub in enumerate(notebooks.stubs(cells), 1):
        said, scope = io.StringIO(), {"chapter": chapter}
        check = cells[cells.index(stub) + 1]
        with contextlib.redirect_stdout(said):
            exec(stub.source, scope)
            exec(check.source, scope)
        first, second = said.getvalue().splitlines()
        assert first == f"missing: your answer to exercise {number}"
        assert second.startswith(("not done yet: ", "no automatic check"))


@pytest.mark.parametrize("name", NAMES)
def test_clock_of_the_instructor_ends_at_the_sum_of_the_minutes(name, labels):
    source = notebooks.read(name)
    text = "\n".join(c.source for c in notebooks.instructor(name, labels).cells)
    for lane, total in notebooks.minutes(source).items():
        spans = re.findall(rf"\({lane}\), minutes ([\d.]+) to ([\d.]+)", text)
        assert spans[0][0] == "0" and float(spans[-1][1]) == total > 0
        assert [b for _, b in spans[:-1]] == [a for a, _ in spans[1:]]
    for task in notebooks.exercises(source, name).values():
        assert all(code in text for code in task.code)


def test_teaching_notes_are_taken_from_the_page(tmp_path, monkeypatch, labels):
    (tmp_path / "teach").mkdir()
    (tmp_path / "teach" / "garage.md").write_text(
        "# Plan\n\n## Misconceptions\n\nSeeds are copies.\n\n## Other\n\nno\n\n"
        "## Questions\n\nWhich rows?\n"
    )
    (tmp_path / "figures").symlink_to(notebooks.BOOK / "figures")
    for file in ("garage.ipynb", "references.bib"):
        (tmp_path / file).symlink_to(notebooks.BOOK / file)
    monkeypatch.setattr(notebooks, "BOOK", tmp_path)
    notes = notebooks.instructor("garage", labels).cells[1].source
    assert "Seeds are copies." in notes and "Which rows?" in notes
    assert "no\n" not in notes and "# Plan" not in notes


@pytest.mark.timeout(900)
def test_a_student_notebook_runs_and_its_checks_accept_the_solutions(labels):
    from nbclient import NotebookClient

    name = "machines"
    notebook = notebooks.student(name, labels)
    tasks = iter(notebooks.exercises(notebooks.read(name), name).values())
    cells, after = [], []
    for cell in notebook.cells:
        cells.append(cell)
        if "self-check" in cell.metadata.get("tags", []):
            code = [nbformat.v4.new_code_cell(c) for c in next(tasks).code]
            again = nbformat.v4.new_code_cell(cell.source)
            cells += [*code, again]
            after.append((cell, again))
    notebook.cells = cells
    NotebookClient(notebook, timeout=800, kernel_name="python3").execute()
    for before, again in after:
        assert before.outputs[0].text.startswith("not done yet: ")
        lines = again.outputs[0].text.splitlines()
        assert lines and all(": right, " in line for line in lines), lines


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({}, "not done yet: best"),
        ({"best": ...}, "not done yet: best"),
        ({"best": 3}, "check 1 of 1: right, three is best"),
        ({"best": 4}, "check 1 of 1: not right yet"),
        ({"best": "x"}, "check 1 of 1: could not be checked (TypeError"),
    ],
)
def test_self_check_tells_and_never_raises(capsys, answer, said):
    claims, needed = notebooks.checks(
        [
            "import math\nbest = 3",
            "for i in range(2):\n    chapter.claim('in a loop', best > i)",
            "_ = chapter.claim('three is best', math.sqrt(best) < 1.8)",
        ]
    )
    assert needed == {"best": None} and claims.imports == ["import math"]
    packed = selfcheck.pack({"imports": claims.imports, "claims": claims.claims,
                            "names": [*needed]})  # fmt: skip
    assert "best" not in packed
    chapter.check(answer, packed)
    assert capsys.readouterr().out.startswith(said)


def build(*cells: str) -> nbformat.NotebookNode:
    made = [
        nbformat.v4.new_code_cell(c.removeprefix("code:"))
        if c.startswith("code:")
        else nbformat.v4.new_markdown_cell(c)
        for c in cells
    ]
    return nbformat.v4.new_notebook(cells=made)


ASK = "```{exercise-start} Two\n:label: ex-two\n```\nMany?\n```{exercise-end}\n```\n"
BEGIN, END = "````{solution-start} ex-two\n````\n", "````{solution-end}\n````\n"


def test_faults_of_a_chapter_are_refused(monkeypatch, labels):
    def student(*cells):
        monkeypatch.setattr(notebooks, "read", lambda name: build(*cells))
        return notebooks.student("toy", labels)

    good = student("# Toy", ASK, BEGIN, "code:two = 2", END, "code:three = 3")
    assert "two = 2" not in "\n".join(c.source for c in good.cells)
    whole = student("# Toy", ASK + "```{solution} ex-two\nIt is two.\n```")
    assert "It is two" not in "\n".join(c.source for c in whole.cells)
    with pytest.raises(ClassroomError, match="in pairs: ex-two"):
        student("# Toy", ASK)
    with pytest.raises(ClassroomError, match="does not end"):
        student("# Toy", ASK, BEGIN, "code:two = 2")
    with pytest.raises(ClassroomError, match="uses two, which only a solution"):
        student("# Toy", ASK, BEGIN, "code:two = 2", END, "code:print(two)")
    loose = build("# Toy", ASK, BEGIN, END, "code:two = 2")
    loose.cells[-1].metadata["tags"] = ["solution"]
    with pytest.raises(ClassroomError, match="outside of solution-start"):
        list(notebooks.pieces(loose, "toy"))


def test_a_stub_leaves_names_alone_that_later_cells_read(monkeypatch, labels):
    solution = "code:x = 2\n_ = chapter.claim('two', x == 2)"
    cells = ["code:x = 1", ASK, BEGIN, solution, END, "code:print(x)"]
    monkeypatch.setattr(notebooks, "read", lambda name: build(*cells))
    stub = notebooks.stubs(notebooks.student("toy", labels).cells)[0]
    assert "\n# x = ..." in stub.source


def test_command_line(tmp_path, capsys):
    assert classroom.main(["notebooks", "garagge", "--out", str(tmp_path)]) == 1
    assert "Did you mean 'garage'?" in capsys.readouterr().err
    assert classroom.main(["notebooks", "garage", "--out", str(tmp_path)]) == 0
    for role in ("student", "instructor"):
        assert (tmp_path / role / "garage.ipynb").is_file()


# --- slides ---------------------------------------------------------------------


class Links(HTMLParser):
    """What a page loads, and its pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.pictures: list[tuple[str, str]] = []
        self.sections = 0

    def handle_starttag(self, tag, attrs):
        about = dict(attrs)
        self.sections += tag == "section"
        for key in ("src", "href", "data", "srcset", "poster"):
            if about.get(key):
                self.loaded.append(about[key])
        if tag == "img":
            self.pictures.append((about.get("alt") or "", about["src"]))


@pytest.mark.parametrize("name", NAMES)
def test_slides_hold_all_they_show(name, labels):
    text = classroom_slides.page(name, labels)
    page = Links()
    page.feed(text)
    assert page.sections >= 12
    assert all(link.startswith(("data:", "#")) for link in page.loaded)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "@import" not in style
    assert all(u.startswith("data:") for u in re.findall(r"url\([\"']?([^)]*)", style))
    assert "Reveal.initialize" in text and "MathJax" in text
    cells = notebooks.read(name).cells
    tags = [c.metadata.get("tags", []) for c in cells]
    shown = ["core" in own and "solution" not in own for own in tags]
    core = [c for c, is_shown in zip(cells, shown, strict=True) if is_shown]
    outputs = [o for c in core for o in c.get("outputs", [])]
    figures = sum("image/png" in o.get("data", {}) for o in outputs)
    figures += sum(c.source.count("```{figure}") for c in core)
    assert len(page.pictures) == figures > 0
    assert all(len(alt) > 30 for alt, _ in page.pictures)
    assert "{exercise" not in text and "solution" not in "".join(
        re.findall(r"<h2>.*?</h2>", text)
    )
    said = "\n".join(o.get("text", "") for o in outputs)
    claims = len(re.findall(r"^holds  ", said, re.M))
    assert text.count("<strong>holds</strong>") == claims > 0


# --- homework -------------------------------------------------------------------

HOMEWORK = list(homework.CHAPTERS)


@pytest.mark.parametrize("name", HOMEWORK)
def test_homework_is_ones_own_and_repeats(name):
    ada = chapter.homework("ada", name, secret="oak")
    again = chapter.homework("ada", name, secret="oak")
    assert (ada.adata.X != again.adata.X).nnz == 0
    assert ada.answer() == again.answer() and ada.text == again.text
    others = [chapter.homework("bob", name, secret="oak"),
              chapter.homework("ada", name, secret="elm")]  # fmt: skip
    for other in others:
        same = ada.adata.shape == other.adata.shape
        assert not same or (ada.adata.X != other.adata.X).nnz > 0
    right = ada.answer()
    assert set(right) == set(ada.tasks)
    assert ada.grade(right)["right"].all()
    assert not ada.grade({})["right"].any()
    for key, task in ada.tasks.items():
        wrong = {"name": "?", "names": ["cell00000"]}.get(task.kind)
        if task.kind == "number":
            wrong = right[key] + 1.5 * task.tolerance + 0.01
        graded = ada.grade({**right, key: wrong})["right"]
        assert not graded[key] and graded.drop(key).all()


@pytest.mark.parametrize("name", HOMEWORK)
def test_homework_does_not_tell_its_answer(name):
    cells = chapter.homework("ada", name).adata
    shown = {"data": set(), "evaluation": {"cell_type", *"WXYZ"},
             "machines": {"source"}, "scatlasvae": {"batch"}, "cscgan": {"source"},
             "garage": set(), "scgacl": {"cell_type"}, "regina": {"perturbation"},
             }[name]  # fmt: skip
    assert set(cells.obs) == shown and not list(cells.var)
    assert not cells.uns and not cells.varm and not cells.obsm
    assert set(cells.layers) <= {"counts"}


def test_answers_differ_between_students():
    students = [f"student {i}" for i in range(6)]
    rates = [chapter.homework(s, "scgacl").answer()["dropout"] for s in students]
    assert len(set(rates)) == 6 and max(rates) - min(rates) > 0.05


def test_homework_can_be_solved_from_what_is_shown():
    made = chapter.homework("ada", "scgacl")
    counts = made.adata.layers["counts"].toarray()
    zeros = []
    for kind in made.adata.obs["cell_type"].unique():
        own = counts[(made.adata.obs["cell_type"] == kind).to_numpy()]
        zeros.append((own[:, np.argsort(-own.mean(0))[:15]] == 0).mean())
    assert made.grade({"dropout": float(np.median(zeros))})["right"].all()
    # A guess in the middle of the range is not accepted from everybody.
    all_made = [chapter.homework(f"s{i}", "scgacl") for i in range(6)]
    assert not all(h.grade({"dropout": 0.25})["right"].all() for h in all_made)


@pytest.mark.parametrize("student", ["ada", "bob", "eve"])
def test_homework_of_the_foundations_can_be_solved(student):
    work = chapter.homework(student, "data")
    counts = work.adata.layers["counts"].toarray().astype(float)
    size = counts.sum(1) / counts.sum(1).mean()
    mu = np.outer(size, counts.mean(0))
    # Moments: what is left of the variance after Poisson is mu^2 / theta.
    excess = ((counts - mu) ** 2 - mu).sum(0) / (mu**2).sum(0)
    theta = 1 / np.maximum(excess, 1e-9)
    zeros = (counts == 0).mean(0) - ((theta / (theta + mu)) ** theta).mean(0)
    names = work.adata.var_names
    asked = names.get_loc(re.search(r"gene\d{4}", work.tasks["theta"].text)[0])
    answers = {"poisson": names[excess.argmin()], "zeros": names[zeros.argmax()]}
    assert work.grade({**answers, "theta": theta[asked]})["right"].all()

    work = chapter.homework(student, "evaluation")
    types, found = work.adata.obs["cell_type"], {}
    for letter in "WXYZ":
        both = pd.crosstab(types, work.adata.obs[letter]).to_numpy() > 0
        key = {(True, True): "renamed", (False, True): "split", (True, False): "merged"}
        pure = ((both.sum(1) == 1).all(), (both.sum(0) == 1).all())
        found[key.get(pure, "noisy")] = letter
    score = metrics.ari(types, work.adata.obs[found.pop("noisy")])
    assert work.grade({**found, "ari": score})["right"].all()

    work = chapter.homework(student, "machines")
    points, source = work.adata.X.toarray(), work.adata.obs["source"].to_numpy()
    blob = 2 * (points[:, 0] > 0) + (points[:, 1] > 0)
    shares = pd.crosstab(source, blob, normalize="index").reindex(columns=range(4))
    lost = shares.index[(shares == 0).any(axis=1)]
    letter = re.search(r"points and ([XYZ]) knows", work.tasks["loss"].text)[1]
    p, q = (shares.loc[s].to_numpy() for s in ("real", letter))
    loss = -(p @ np.log(p / (p + q))) - q @ np.log(q / (p + q))
    far = re.search(r"How far is ([XYZ])", work.tasks["w1"].text)[1]
    x1 = [points[source == name, 0] for name in ("real", far)]
    w1 = stats.wasserstein_distance(*x1)
    answers = {"lost": lost.item(), "loss": loss, "w1": w1}
    assert work.grade(answers)["right"].all()


def test_homework_is_saved_without_secret(tmp_path):
    import anndata as ad

    path = chapter.homework("ada", "garage", secret="oakwood").save(tmp_path)
    # An id is no path, and two ids are two files.
    own = chapter.homework("../a b", "garage")
    others = replace(own, student_id="../a_b")
    kept = {one.save(tmp_path / "two") for one in (own, others)}
    assert len(kept) == 2 and {p.parent for p in kept} == {tmp_path / "two"}
    assert ad.read_h5ad(path).n_obs == 2000
    assert b"oakwood" not in path.read_bytes()
    assert "n_rare" in path.with_suffix(".txt").read_text()
    assert "oakwood" not in repr(chapter.homework("ada", "garage", secret="oakwood"))


def test_homework_is_that_of_the_chapter_at_hand(monkeypatch):
    with pytest.raises(ConfigError, match="Homework belongs to a chapter.*'garage'"):
        chapter.homework("ada")
    here = sys.modules["__main__"]
    monkeypatch.setattr(here, "_scgenlib_chapter", "scgacl", raising=False)
    assert chapter.homework("ada").chapter == "scgacl"
    monkeypatch.setattr(here, "_scgenlib_chapter", "compare")
    with pytest.raises(ConfigError, match="[Uu]nknown chapter with homework.*compare"):
        chapter.homework("ada")


@pytest.mark.parametrize("name", HOMEWORK)
def test_class_notebooks_set_homework_and_mark_it(name, labels, monkeypatch, capsys):
    here = sys.modules["__main__"]
    monkeypatch.setattr(here, "_scgenlib_chapter", name, raising=False)
    hand_in = notebooks.student(name, labels).cells
    scope = {"chapter": chapter}
    exec(next(c.source for c in hand_in if "student_id =" in c.source), scope)
    assert scope["work"].chapter == name and set(scope["answers"].values()) == {None}
    marking = next(c.source for c in notebooks.instructor(name, labels).cells
                   if "handed_in =" in c.source)  # fmt: skip
    right = scope["work"].answer()
    for answers, verdict in ((right, "True"), (scope["answers"], "False")):
        shown = marking.replace('{"some id": {}}', repr({"your id": answers}))
        assert shown != marking
        capsys.readouterr()
        exec(shown, {"chapter": chapter})
        lines = capsys.readouterr().out.splitlines()[-len(right) :]
        assert all(line.endswith(verdict) for line in lines)


def test_homework_errors():
    with pytest.raises(ConfigError, match="Did you mean 'garage'"):
        chapter.homework("ada", "garag")
    with pytest.raises(ConfigError, match="needs a student"):
        chapter.homework(" ", "garage")
    with pytest.raises(ConfigError, match="Did you mean 'dropout'"):
        chapter.homework("ada", "scgacl").grade({"drop_out": 1})


# --- the folder for a class without a network -----------------------------------


def wheel(folder, name, version, *needs, tag="py3-none-any"):
    path = folder / f"{name}-{version}-{tag}.whl"
    info = f"{name}-{version}.dist-info"
    about = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
    about += [f"Requires-Dist: {need}" for need in needs]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", f"version = {version!r}\n")
        archive.writestr(f"{info}/METADATA", "\n".join(about) + "\n")
        archive.writestr(
            f"{info}/WHEEL",
            f"Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: {tag}\n",
        )
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Give pip a folder with small packages in place of the network."""
    folder = tmp_path / "index"
    folder.mkdir()
    windows = "cedar[red]>1; sys_platform == 'win32'"
    wheel(folder, "alder", "1.0", "birch>=2", windows)
    wheel(folder, "birch", "2.0", tag="cp311-cp311-manylinux_2_28_x86_64")
    wheel(folder, "cedar", "3.0", "dill; extra == 'red'", "elder; extra == 'x'")
    wheel(folder, "dill", "4.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    pins = {"alder": "1.0", "birch": "2.0"}
    monkeypatch.setattr(bundle, "locked", lambda system="linux": pins)
    return folder


def test_wheelhouse_installs_without_a_network(index, tmp_path, monkeypatch, capsys):
    out = tmp_path / "class"
    command = ["wheelhouse", "--out", str(out), "--only", "alder,birch"]
    assert classroom.main([*command, "--platform", "linux"]) == 0
    assert (out / "wheels/any/alder-1.0-py3-none-any.whl").is_file()
    pinned = (out / "requirements-linux.txt").read_text().split()
    assert pinned == ["alder==1.0", "birch==2.0"]
    script = (out / "install-linux.sh").read_text()
    assert "--no-index" in script and "@" not in script.replace("$@", "")
    assert "needs no file" in (out / "README.md").read_text()
    assert classroom.main([*command, "--platform", "linux"]) == 1
    assert "name an empty folder" in capsys.readouterr().err
    monkeypatch.delenv("PIP_FIND_LINKS")
    target = tmp_path / "installed"
    links = ["--find-links", "wheels/any", "--find-links", "wheels/linux"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index"]
    reqs = ["-r", "requirements-linux.txt", "--target", str(target)]
    if sys.platform != "linux":
        reqs += ["--no-deps", "--platform", "manylinux_2_28_x86_64"]
    subprocess.run([*pip, *links, *reqs], cwd=out, check=True)
    code = "import alder, birch; print(alder.version, birch.version)"
    done = subprocess.run([sys.executable, "-c", code], cwd=target, check=True,
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout.split() == ["1.0", "2.0"]


def test_wheelhouse_finds_what_another_system_needs(index, tmp_path):
    wheels = tmp_path / "wheels"
    roots = ["alder==1.0", "birch==2.0"]
    wheels.mkdir()
    found, absent = bundle.gather("linux", roots, wheels, closed=True)
    assert found == {"alder": "1.0", "birch": "2.0"} and absent == []
    found, absent = bundle.gather("windows", roots, wheels, closed=True)
    assert found == {"alder": "1.0", "cedar": "3.0", "dill": "4.0"}
    assert absent == ["birch==2.0"]


def test_wheelhouse_refuses_a_gpu_build(index, tmp_path, monkeypatch):
    wheel(index, "torch", "9.0")
    monkeypatch.setattr(bundle, "_LARGEST_TORCH", 10)
    (tmp_path / "wheels").mkdir()
    with pytest.raises(ClassroomError, match="a build for the GPU"):
        bundle.gather("linux", ["torch==9.0"], tmp_path / "wheels", closed=True)


def test_wheelhouse_names_unknown_packages(index, tmp_path, capsys):
    out = str(tmp_path / "class")
    assert classroom.main(["wheelhouse", "--out", out, "--only", "aldr"]) == 1
    assert "Did you mean 'alder'?" in capsys.readouterr().err
    assert classroom.main(["wheelhouse", "--out", out, "--dry-run"]) == 0
    assert "2 packages" in capsys.readouterr().out.replace("3 packages", "2 packages")
    assert not (tmp_path / "class").exists()


def test_only_data_that_may_be_passed_on_is_copied(tmp_path):
    lines = bundle.copy_data(tmp_path, dry_run=True)
    text = "\n".join(lines)
    assert len(lines) == len(list((bundle.ROOT / "data_manifests").glob("*.yml")))
    for name in ("adamson", "baron_mouse", "batch_sim", "norman", "scgacl_sim"):
        assert f"`{name}`: left out" in text
    for name in ("pollen", "kang", "cbmc", "sc_mixology"):
        assert re.search(rf"`{name}`: \d+ of \d+ files", text)
    for name in ("simulated", "pbmc68k_reduced"):
        assert f"`{name}`: needs no file" in text
    assert not list(tmp_path.iterdir())
