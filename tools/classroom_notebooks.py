"""Student and instructor notebooks from one chapter.

A solution is what stands between `solution-start` and `solution-end`, and every code
cell tagged `solution`. The student gets a stub and a self-check in its place.
"""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell

from classroom_myst import (
    BOOK,
    ClassroomError,
    Converter,
    Fence,
    Labels,
    blocks,
    quoted,
    references,
)
from scgenlib.homework import CHAPTERS as HOMEWORK
from scgenlib.selfcheck import pack

_VOTE = "Your vote, and why: ..."
# Sections of a teaching page that the teacher's notebook begins with, in this order.
_NOTES = (
    "Misconceptions",
    "50 minutes",
    "90 minutes",
    "Questions",
    "By hand",
    "Exit ticket",
)
LANES = {"core": "first class", "deep": "second class"}


@dataclass
class Piece:
    """A part of a cell: text, code, or the place where a solution begins."""

    kind: str
    source: str
    cell: NotebookNode
    solution: str | None


@dataclass
class Exercise:
    """One exercise with the cells of its solution."""

    label: str
    number: int
    title: str
    code: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)

    @property
    def heading(self) -> str:
        """How the notebook calls it."""
        return f"Exercise {self.number}" + (f": {self.title}" if self.title else "")


def read(name: str) -> NotebookNode:
    """Return the chapter called `name`, with its stored outputs."""
    return nbformat.read(BOOK / f"{name}.ipynb", as_version=4)


def all_labels(names: list[str]) -> Labels:
    """Return the labels of the chapters called `names`."""
    labels = Labels()
    for name in names:
        cells = [c.source for c in read(name).cells if c.cell_type == "markdown"]
        labels.scan(name, "\n\n".join(cells))
        for exercise in exercises(read(name), name).values():
            labels.place[exercise.label] = (name, exercise.heading)
    return labels


def pieces(notebook: NotebookNode, name: str) -> Iterator[Piece]:
    """Yield the chapter piece by piece, each with the solution it belongs to."""
    inside: str | None = None
    for cell in notebook.cells:
        if cell.cell_type == "code":
            tagged = "solution" in cell.metadata.get("tags", [])
            if tagged and inside is None:
                raise ClassroomError(
                    f"{name}: a cell tagged solution stands outside of"
                    f" solution-start and -end: {cell.source.splitlines()[0]!r}"
                )
            yield Piece("code", cell.source, cell, inside)
            continue
        kept: list[str] = []
        for block in blocks(cell.source.splitlines()):
            if not isinstance(block, Fence) or not block.name.startswith("solution"):
                kept += block.raw if isinstance(block, Fence) else [block]
                continue
            yield Piece("markdown", "\n".join(kept), cell, inside)
            kept = []
            if block.name == "solution-end":
                inside = None
                continue
            inside = block.title
            yield Piece("start", "", cell, inside)
            if block.name == "solution":  # the whole solution in one block
                yield Piece("markdown", "\n".join(block.body), cell, inside)
                inside = None
        yield Piece("markdown", "\n".join(kept), cell, inside)
    if inside:
        raise ClassroomError(f"{name}: the solution of {inside!r} does not end")


def exercises(notebook: NotebookNode, name: str) -> dict[str, Exercise]:
    """Return the exercises by label; raise if one has no solution."""
    found: dict[str, Exercise] = {}
    parts = list(pieces(notebook, name))
    for piece in parts:
        for block in blocks(piece.source.splitlines()):
            if isinstance(block, Fence) and block.name in (
                "exercise",
                "exercise-start",
            ):
                label = block.options.get("label", "")
                found[label] = Exercise(label, len(found) + 1, block.title)
    solved = {piece.solution for piece in parts if piece.kind == "start"}
    if lonely := sorted(set(found) ^ {label or "" for label in solved}):
        raise ClassroomError(
            f"{name}: exercise and solution do not come in pairs: {', '.join(lonely)}"
        )
    for piece in parts:
        if piece.solution and piece.kind != "start" and piece.source.strip():
            exercise = found[piece.solution]
            kept = exercise.code if piece.kind == "code" else exercise.text
            kept.append(piece.source)
    return found


# --- the student's notebook -----------------------------------------------------


def student(name: str, labels: Labels) -> NotebookNode:
    """Return the notebook without solutions, answers and outputs."""
    notebook = read(name)
    tasks = exercises(notebook, name)
    convert = Converter(name, labels, _ask)
    parts = list(pieces(notebook, name))
    kept = [p.source for p in parts if p.kind == "code" and not p.solution]
    _refuse_missing(name, kept, [x for t in tasks.values() for x in t.code])
    cells: list[NotebookNode] = []
    done: list[str] = []
    for piece in parts:
        if piece.kind == "start":
            cells += _stub(tasks[piece.solution or ""], done, kept[len(done) :])
        elif piece.solution is None and piece.kind == "code":
            done.append(piece.source)
            cell = copy.deepcopy(piece.cell)
            cell.outputs, cell.execution_count = [], None
            cells.append(cell)
        elif piece.solution is None:
            cells += _text(piece.source, convert, tasks)
    if name in HOMEWORK:
        cells += [new_markdown_cell(_HOMEWORK), new_code_cell(_HAND_IN)]
    return _finish(notebook, cells, convert)


_HOMEWORK = """## Homework

Cells of your own, drawn for your id. Nobody else has the same ones, or the same answer.
Use whatever the chapter has taught; no line of it is asked for. Hand in `answers`."""

_HAND_IN = """student_id = "your id"
work = chapter.homework(student_id)
print(work.text)
print(work.adata)
answers = dict.fromkeys(work.tasks)  # None until you know better"""

_MARKING = """## Homework

Nobody needs a list of answers. They are worked out again from the id, and from the word
of the course if you chose one."""

_MARK = """handed_in = {"some id": {}}  # id -> the dictionary that was handed in
secret = ""  # the word of the course
for student_id, answers in handed_in.items():
    work = chapter.homework(student_id, secret=secret)
    print(student_id)
    for key, truth in work.answer().items():
        print(f"  {key}: {truth}"[:200])
    print(work.grade(answers)["right"].to_string())"""


def _ask(question: str, answer: str) -> str:
    return quoted(f"**Predict first.** {question}") + f"\n{_VOTE}\n"


def _stop(question: str, answer: str) -> str:
    stop = quoted(f"**Stop for a vote.** Predict first: {question}")
    return stop + quoted(f"**Answer.** {answer}")


def _text(
    source: str, convert: Converter, tasks: dict[str, Exercise]
) -> list[NotebookNode]:
    """Return the Markdown cell of `source`, or none if nothing is left of it."""
    lines: list[str] = []
    for block in blocks(source.splitlines()):
        if isinstance(block, Fence) and block.name in ("exercise", "exercise-start"):
            heading = tasks[block.options.get("label", "")].heading
            lines += ["", f"### {heading}", "", *block.body]
        else:
            lines += block.raw if isinstance(block, Fence) else [block]
    text, attached = convert.cell("\n".join(lines))
    if not text:
        return []
    cell = new_markdown_cell(text)
    if attached:
        cell.attachments = attached
    return [cell]


def _finish(
    notebook: NotebookNode, cells: list[NotebookNode], convert: Converter
) -> NotebookNode:
    if convert.cited:
        cells.append(new_markdown_cell(references(convert.cited)))
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number:03d}"
    fresh = copy.deepcopy(notebook)
    fresh.cells, fresh.nbformat_minor = cells, 5
    fresh.metadata.pop("scgenlib", None)
    nbformat.validate(fresh)
    return fresh


def _stub(task: Exercise, before: list[str], after: list[str]) -> list[NotebookNode]:
    """Return the cell that waits for an answer and the one that checks it."""
    claims, needed = checks(task.code)
    # A name that later cells read from earlier ones must keep its value.
    lent = bound(before) & loaded(after)
    lines = [f"# {task.heading}"]
    for name, signature in needed.items():
        hint = f"  # a function of {signature}" if signature is not None else ""
        lines.append(f"{'# ' if name in lent else ''}{name} = ...{hint}")
    what = f"the check below reads {', '.join(needed)}" if needed else "no check"
    lines.append(f"print({f'missing: your answer to exercise {task.number}'!r})")
    packed = pack({"imports": claims.imports, "claims": claims.claims,
                   "names": [*needed]})  # fmt: skip
    rows = [f'    "{packed[i : i + 70]}"' for i in range(0, len(packed), 70)]
    check = ["chapter.check(", "    globals(),", *(rows or ['    ""']), ")"]
    lines[0] += f" ({what})"
    return [
        new_code_cell("\n".join(lines), metadata={"tags": ["stub"]}),
        new_code_cell("\n".join(check), metadata={"tags": ["self-check"]}),
    ]


# --- what a solution claims -----------------------------------------------------


@dataclass
class Claims:
    """Sentences and conditions of a solution, and the imports they need."""

    imports: list[str] = field(default_factory=list)
    claims: list[tuple[str, str]] = field(default_factory=list)


def bound(sources: list[str]) -> set[str]:
    """Return every name that `sources` give a value, at any level."""
    found: set[str] = set()
    for node in (n for source in sources for n in ast.walk(ast.parse(source))):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            found.add(node.id)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {(a.asname or a.name).split(".")[0] for a in node.names}
    return found


def loaded(sources: list[str]) -> set[str]:
    """Return every name that `sources` read."""
    nodes = (n for source in sources for n in ast.walk(ast.parse(source)))
    return {
        n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)
    }


def _refuse_missing(name: str, kept: list[str], solved: list[str]) -> None:
    if lost := sorted(loaded(kept) & bound(solved) - bound(kept)):
        raise ClassroomError(
            f"{name}: a cell outside the solutions uses {', '.join(lost)}, which only a"
            " solution defines; define it before the exercise"
        )


def checks(code: list[str]) -> tuple[Claims, dict[str, str | None]]:
    """Return the claims of a solution that a check can repeat on a student's names.

    Parameters
    ----------
    code
        The code cells of the solution.

    Returns
    -------
    claims, needed
        The second gives, for each name that a student has to define, the arguments
        if it is a function, else None. A claim inside a loop is left out, and so is
        one whose names get another value later on.
    """
    tree = ast.parse("\n".join(code))
    claims, needed = Claims(), dict[str, str | None]()
    functions = {n.name: f"({ast.unparse(n.args)})" for n in tree.body
                 if isinstance(n, ast.FunctionDef)}  # fmt: skip
    imports = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
    own = bound([ast.unparse(n) for n in tree.body])
    own -= bound([ast.unparse(n) for n in imports])
    last = {n.id: n.lineno for n in ast.walk(tree)
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}  # fmt: skip
    for call in _claims(tree.body):
        condition = call.args[1]
        inner = bound([ast.unparse(condition)])
        names = loaded([ast.unparse(condition)]) - inner
        wanted = sorted(names & own)
        if not wanted or any(last.get(n, 0) > call.lineno for n in wanted):
            continue
        claims.claims.append((ast.unparse(call.args[0]), ast.unparse(condition)))
        needed |= {n: functions.get(n) for n in wanted}
        for node in imports:
            text = ast.unparse(node)
            if names & bound([text]) and text not in claims.imports:
                claims.imports.append(text)
    return claims, needed


def _claims(body: list[ast.stmt]) -> Iterator[ast.Call]:
    for node in body:
        if isinstance(node, ast.If):
            yield from _claims(node.body + node.orelse)
        elif isinstance(node, (ast.Assign, ast.Expr)):
            call = node.value
            if isinstance(call, ast.Call) and len(call.args) == 2:
                if ast.unparse(call.func) in ("chapter.claim", "claim"):
                    yield call


# --- the instructor's notebook --------------------------------------------------


def minutes(notebook: NotebookNode) -> dict[str, float]:
    """Return the minutes of each lane, as the cells state them."""
    total = dict.fromkeys(LANES, 0.0)
    for cell in notebook.cells:
        for lane in LANES:
            if lane in cell.metadata.get("tags", []):
                total[lane] += cell.metadata.get("minutes", 0)
    return total


def instructor(name: str, labels: Labels) -> NotebookNode:
    """Return the notebook with solutions, timings, stops, and notes for the teacher."""
    notebook = read(name)
    tasks = exercises(notebook, name)
    convert = Converter(name, labels, _stop)
    cells: list[NotebookNode] = []
    parts = list(pieces(notebook, name))
    sections = _sections(parts)
    clock, number = dict.fromkeys(LANES, 0.0), 0
    for piece in parts:
        if piece.kind == "start":
            cells.append(
                new_markdown_cell(f"**Solution** {tasks[piece.solution or ''].heading}")
            )
        elif piece.kind == "code":
            cells.append(copy.deepcopy(piece.cell))
        else:
            heads = list(_SECTION.finditer(piece.source))
            source, shift = piece.source, 0
            if piece is parts[0]:
                first = source.find("\n") + 1 or len(source)
                source = source[:first] + _clock(sections[0], clock) + source[first:]
                shift = len(source) - len(piece.source)
            for head in heads:
                number += 1
                at = head.end() + shift
                note = "\n" + _clock(sections[number], clock)
                source = source[:at] + note + source[at:]
                shift += len(note)
            cells += _text(source, convert, tasks)
    notes, _ = convert.cell(_for_the_teacher(name, minutes(notebook)))
    cells.insert(1, new_markdown_cell(notes))
    if name in HOMEWORK:
        cells += [new_markdown_cell(_MARKING), new_code_cell(_MARK)]
    return _finish(notebook, cells, convert)


_SECTION = re.compile(r"^## .+$", re.M)


def _sections(parts: list[Piece]) -> list[dict[str, float]]:
    """Return the minutes of each section by lane; the first comes before any heading.

    The minutes of a cell of text belong to the first section that begins in it.
    """
    sections: list[dict[str, float]] = [dict.fromkeys(LANES, 0.0)]
    counted: set[int] = set()
    for piece in parts:
        begun = len(_SECTION.findall(piece.source)) if piece.kind == "markdown" else 0
        at = len(sections) if begun else len(sections) - 1
        sections += [dict.fromkeys(LANES, 0.0) for _ in range(begun)]
        if id(piece.cell) in counted:
            continue
        counted.add(id(piece.cell))
        for lane in LANES:
            if lane in piece.cell.metadata.get("tags", []):
                sections[at][lane] += piece.cell.metadata.get("minutes", 0)
    return sections


def _clock(spent: dict[str, float], clock: dict[str, float]) -> str:
    """Return a line with the minutes of a section, and move the clock on."""
    parts = []
    for lane, length in spent.items():
        if length:
            start, clock[lane] = clock[lane], clock[lane] + length
            parts.append(f"{LANES[lane]} ({lane}), minutes {start:g} to {clock[lane]:g}"
                         f" ({length:g} min)")  # fmt: skip
    return quoted(f"**Clock.** {'; '.join(parts)}.") if parts else ""


def _for_the_teacher(name: str, total: dict[str, float]) -> str:
    """Return the notes of book/teach/NAME.md, and the sum of the minutes."""
    lines = ["# For the teacher", ""]
    lines += [f"- {LANES[lane]} ({lane}): {length:g} minutes in all"
              for lane, length in total.items()]  # fmt: skip
    path = BOOK / "teach" / f"{name}.md"
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        for wanted in _NOTES:
            match = re.search(rf"^## {wanted}\b.*?(?=^## |\Z)", text, re.M | re.S)
            if match:
                lines += ["", match[0].strip()]
    return "\n".join(lines)


def stubs(cells: list[Any]) -> list[Any]:
    """Return the cells of a student's notebook that wait for an answer."""
    return [c for c in cells if "stub" in c.metadata.get("tags", [])]
