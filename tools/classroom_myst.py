"""Turn the book's MyST Markdown into Markdown that plain Jupyter shows well.

Directives become quotes, headings and attached pictures; roles become text and links;
equations get their numbers. What is asked under "Predict first" is handed to the
caller, who may keep the answer or not.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"

_OPEN = re.compile(r"\s{0,3}(`{3,}|:{3,}|~{3,})\s*(?:\{([\w:-]+)\})?\s*(.*)$")
_OPTION = re.compile(r":([\w-]+):\s*(.*)$")
_DETAILS = re.compile(r"<details>\s*<summary>(.*?)</summary>(.*?)</details>", re.S)
_BEFORE = r"\*\*Predict first\.?\*\*((?:(?!<details>).)*?)"
_ASKED = re.compile(_BEFORE + _DETAILS.pattern, re.S)
_EQUATION = re.compile(r"\$\$(.+?)\$\$[ \t]*\(([\w-]+)\)", re.S)
_MATH = re.compile(r"`{3,}\{math\}\s*\n:label:\s*([\w-]+)")
_ROLE = re.compile(r"\{([\w:]+)\}`([^`]+)`")
_TARGET = re.compile(r"^\(([\w-]+)\)=\s*\n", re.M)
_HEADING = re.compile(r"^\(([\w-]+)\)=\s*\n+#+ (.+)$", re.M)
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([\w./#-]+)\)")


class ClassroomError(Exception):
    """What `classroom.py` prints as one line before it exits with 1."""


@dataclass
class Fence:
    """One directive, or (with an empty name) one block of code."""

    name: str
    title: str
    options: dict[str, str]
    body: list[str]
    raw: list[str]


def blocks(lines: list[str]) -> Iterator[str | Fence]:
    """Yield the lines of plain text one by one, and each fenced block as a whole."""
    rows = iter(lines)
    for line in rows:
        match = _OPEN.match(line)
        if not match:
            yield line
            continue
        fence, raw, body = match[1], [line], []
        for inner in rows:
            raw.append(inner)
            text = inner.strip()
            if text.startswith(fence) and not text.strip(fence[0]):
                break
            body.append(inner)
        options: dict[str, str] = {}
        while match[2] and body and (option := _OPTION.match(body[0].strip())):
            options[option[1]] = option[2]
            body.pop(0)
        yield Fence(match[2] or "", match[3].strip(), options, body, raw)


@dataclass
class Labels:
    """Where the labels of all chapters lead, and how equations are numbered."""

    place: dict[str, tuple[str, str]] = field(default_factory=dict)
    equation: dict[str, int] = field(default_factory=dict)

    def scan(self, chapter: str, text: str) -> None:
        """Note the headings, exercises and equations of one chapter."""
        for label, title in _HEADING.findall(text):
            self.place[label] = (chapter, title.strip())
        found = [(m.start(), m[2]) for m in _EQUATION.finditer(text)]
        found += [(m.start(), m[1]) for m in _MATH.finditer(text)]
        for number, (_, label) in enumerate(sorted(found), 1):
            self.equation[label] = number


class Converter:
    """Markdown of one chapter, cell by cell.

    Parameters
    ----------
    chapter
        Name of the notebook.
    labels
        Labels of all chapters; exercises are entered as they come.
    predict
        Called with question and answer of each prediction; returns Markdown.
    """

    def __init__(
        self, chapter: str, labels: Labels, predict: Callable[[str, str], str]
    ) -> None:
        self.chapter, self.labels, self.predict = chapter, labels, predict
        self.chapters = {place for place, _ in labels.place.values()}
        self.cited: list[str] = []

    def cell(self, source: str) -> tuple[str, dict[str, dict[str, str]]]:
        """Return the Markdown of one cell, and the pictures attached to it."""
        attached: dict[str, dict[str, str]] = {}
        text = self._blocks(source.splitlines(), attached)
        text = _ASKED.sub(lambda m: self._ask(m[1], m[3]), text)
        text = _DETAILS.sub(lambda m: self._ask(m[1], m[2]), text)
        text = _EQUATION.sub(self._equation, text)
        text = _TARGET.sub("", text)
        text = re.sub(r"\[(\w+)\]\{\.lane[^}]*\}", r"`\1`", text)
        text = _ROLE.sub(self._role, text)
        text = _LINK.sub(self._link, text)
        return re.sub(r"\n{3,}", "\n\n", text).strip(), attached

    def _blocks(self, lines: list[str], attached: dict[str, dict[str, str]]) -> str:
        parts = [
            block if isinstance(block, str) else self._fence(block, attached)
            for block in blocks(lines)
        ]
        return "\n".join(parts)

    def _fence(self, fence: Fence, attached: dict[str, dict[str, str]]) -> str:
        name, title = fence.name, fence.title
        if name in ("", "code-block", "code", "code-cell"):
            return "\n".join(fence.raw) if not name else _code(fence)
        if name.startswith("solution"):
            raise ClassroomError(f"{self.chapter}: a solution reached the converter")
        if name == "exercise-end":
            return ""
        if name == "raw":
            return "\n".join(fence.body)
        if name == "math":
            tag = self._tag(fence.options.get("label", ""))
            return "\n".join(["$$", *fence.body, tag + "$$"])
        if name == "figure":
            path = BOOK / title
            kind = {"svg": "svg+xml", "jpg": "jpeg"}.get(path.suffix[1:], "png")
            data = base64.b64encode(path.read_bytes()).decode()
            attached[path.name] = {f"image/{kind}": data}
            alt = fence.options.get("alt", "")
            caption = self._blocks(fence.body, attached).strip()
            return f"![{alt}](attachment:{path.name})\n\n{caption}\n"
        if name == "admonition" and title.lower().startswith("predict first"):
            return self._asked_box(fence, attached)
        body = self._blocks(fence.body, attached).strip()
        title = title or name.capitalize()
        end = "" if title.endswith((".", "?", ":")) else "."
        return quoted(f"**{title}{end}**\n\n{body}")

    def _asked_box(self, fence: Fence, attached: dict[str, dict[str, str]]) -> str:
        question, answer = [], ""
        for block in blocks(fence.body):
            if isinstance(block, Fence) and block.name == "dropdown":
                question += ["", block.title[:1].upper() + block.title[1:]]
                answer = self._blocks(block.body, attached)
            elif isinstance(block, Fence):
                question.append(self._fence(block, attached))
            else:
                question.append(block)
        return self._ask("\n".join(question), answer)

    def _ask(self, question: str, answer: str) -> str:
        question = re.sub(r"<(b|strong)>Predict first.?</\1>", "", question)
        if not plain(answer):
            raise ClassroomError(f"{self.chapter}: a prediction without an answer")
        question = plain(question)
        return self.predict(question[:1].upper() + question[1:], plain(answer)) + "\n"

    def _tag(self, label: str) -> str:
        number = self.labels.equation.get(label)
        return rf"\tag{{{number}}}" if number else ""

    def _equation(self, match: re.Match[str]) -> str:
        return f"$${match[1]} {self._tag(match[2])}$$"

    def _role(self, match: re.Match[str]) -> str:
        role, text = match[1], match[2]
        label = re.fullmatch(r"(.*?)\s*<([^>]+)>", text, re.S)
        if role.startswith("cite"):
            keys = [key.strip() for key in text.split(",")]
            self.cited += [key for key in keys if key not in self.cited]
            named = [citation(key) for key in keys]
            if role == "cite:t":
                return ", ".join(f"{who} ({year})" for who, year in named)
            return "(" + "; ".join(f"{who} {year}" for who, year in named) + ")"
        if role == "eq":
            return f"({self.labels.equation.get(text, '?')})"
        if role == "ref":
            target = label[2] if label else text
            title = self.labels.place.get(target, ("", target))[1]
            return f"[{label[1] if label else title}]({target})"
        return label[1] if label else text

    def _link(self, match: re.Match[str]) -> str:
        text, target = match[1], match[2].removeprefix("../")
        file, _, anchor = target.partition("#")
        if file in self.labels.place or anchor in self.labels.place:
            place, title = self.labels.place[anchor or file]
            here = "" if place == self.chapter else f"{place}.ipynb"
            return f"[{text}]({here}#{quote(title.replace(' ', '-'))})"
        if file.removesuffix(".ipynb") in self.chapters:
            return f"[{text}]({file})"
        return match[0] if "//" in target else text


def quoted(text: str) -> str:
    """Return `text` as a Markdown quote."""
    text = re.sub(r"\n{3,}", "\n\n", text)
    return "\n" + "\n".join(f"> {line}".rstrip() for line in text.split("\n")) + "\n"


def plain(text: str) -> str:
    """Return `text` with simple HTML written as Markdown."""
    text = re.sub(r"</?(em|i)>", "*", text)
    text = re.sub(r"</?(strong|b)>", "**", text)
    text = re.sub(r"</?code>", "`", text)
    return html.unescape(re.sub(r"</?p>", "", text)).strip()


def _code(fence: Fence) -> str:
    return "\n".join([f"```{fence.title}", *fence.body, "```"])


# --- citations ------------------------------------------------------------------

_bib: dict[str, tuple[str, str, str]] = {}


def _entry(key: str) -> tuple[str, str, str]:
    """Return authors, year and the line of the list of references."""
    if not _bib:
        from pybtex.database import parse_file  # type: ignore[import-untyped]

        for name, entry in parse_file(str(BOOK / "references.bib")).entries.items():
            fields = entry.fields
            last = [" ".join(p.prelast_names + p.last_names) or str(p) for p in
                    entry.persons.get("author", [])]  # fmt: skip
            who = " and ".join(last) if len(last) < 3 else f"{last[0]} et al."
            where = fields.get("journal") or fields.get("booktitle") or ""
            link = fields.get("doi") or fields.get("url") or ""
            year = fields.get("year", "undated")
            line = ". ".join(x for x in (f"{who} ({year})", fields.get("title", ""),
                                         where, link) if x)  # fmt: skip
            _bib[name] = (_tidy(who), year, _tidy(line))
    if key not in _bib:
        raise ClassroomError(f"references.bib has no entry {key!r}")
    return _bib[key]


def _tidy(text: str) -> str:
    from pybtex.richtext import Text  # type: ignore[import-untyped]

    return str(Text.from_latex(text)).replace("\N{NO-BREAK SPACE}", " ")


def citation(key: str) -> tuple[str, str]:
    """Return authors and year of an entry of references.bib."""
    who, year, _ = _entry(key)
    return who, year


def references(keys: list[str]) -> str:
    """Return a list of the entries `keys`, or nothing without any."""
    lines = sorted(_entry(key)[2] for key in keys)
    return "## References\n\n" + "\n".join(f"- {x}" for x in lines) if lines else ""
