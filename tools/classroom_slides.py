"""Slides of a chapter's core lane: one page that asks no other host for anything.

The slide script, reveal.js, comes from the package sphinx-revealjs, and that for the
formulas from the package that the book uses. Both are written into the page, and so are
the pictures.
"""

from __future__ import annotations

import functools
import html
import importlib.metadata
import re
from dataclasses import dataclass, field
from typing import Any

from nbformat import NotebookNode

import book
from classroom_myst import ClassroomError, Converter, Labels
from classroom_notebooks import pieces, read

#: What fits on a slide, in words; a formula or a line of a list weighs as stated.
_ROOM, _FORMULA, _LINE = 100, 28, 6
_PACKAGE = "sphinx-revealjs"

_STYLE = """
:root { --ink: #1b1f24; --paper: #fff; --soft: #57606a; --line: #0b5cad; }
html, body { height: 100%; margin: 0; background: var(--paper); }
.reveal { font: 30px/1.35 system-ui, "Segoe UI", Helvetica, Arial, sans-serif;
  color: var(--ink); }
.reveal .slides { text-align: left; }
.reveal .slides section { box-sizing: border-box; padding: 0 20px; }
.reveal h1 { font-size: 1.7em; line-height: 1.15; margin: 1.5em 0 .6em; }
.reveal h2 { font-size: 1.15em; margin: 0 0 .5em; color: var(--line);
  border-bottom: 3px solid var(--line); padding-bottom: .15em; }
.reveal p, .reveal ul, .reveal ol { margin: .5em 0; }
.reveal pre { font: 18px/1.35 ui-monospace, Consolas, monospace; background: #f3f5f7;
  padding: 14px; }
.reveal code { font-family: ui-monospace, Consolas, monospace; font-size: .9em; }
.reveal pre code { font-size: 1em; }
.reveal img { display: block; width: 100%; height: 530px; object-fit: contain; }
.reveal table { border-collapse: collapse; font-size: .85em; }
.reveal td, .reveal th { border-bottom: 1px solid #d0d7de; padding: .2em .7em; }
.reveal .vote { border-left: 8px solid #b35900; padding-left: .8em; }
.reveal .claims { list-style: none; padding: 0; font-size: .85em; }
.reveal .slide-number { background: none; color: var(--soft); font-size: 16px; }
"""

_START = """
Reveal.initialize({hash: true, width: 1280, height: 720, margin: 0.06, center: false,
  slideNumber: "c/t", transition: "none", plugins: []});
"""

# A formula wider than a slide is drawn smaller; its width in ex is known unseen.
_MATHJAX = """
window.MathJax = {tex: {inlineMath: [["\\\\(", "\\\\)"]]}, svg: {fontCache: "local"},
  options: {enableMenu: false, renderActions: {assistiveMml: []}},
  startup: {pageReady: () => MathJax.startup.defaultPageReady().then(() => {
    document.querySelectorAll("mjx-container[display]").forEach((box) => {
      const svg = box.querySelector("svg");
      const ex = parseFloat(box.style.minWidth || svg.style.minWidth ||
                            svg.getAttribute("width"));
      if (ex > 70) box.style.fontSize = 7000 / ex + "%";
    });
  })}};
"""


@dataclass
class Slide:
    """One slide: what stands on it, and how full it is."""

    title: str
    parts: list[str] = field(default_factory=list)
    weight: int = 0

    def html(self) -> str:
        """Return the section of the page."""
        head = f"<h2>{self.title}</h2>\n" if self.title else ""
        return f"<section>\n{head}" + "\n".join(self.parts) + "\n</section>"


class Deck:
    """The slides of one chapter, filled from top to bottom."""

    def __init__(self) -> None:
        self.slides: list[Slide] = []
        self.title = ""

    def start(self, title: str | None = None) -> None:
        """Begin a slide, under the old title unless there is a new one."""
        self.title = self.title if title is None else title
        self.slides.append(Slide(self.title))

    def reserve(self, weight: int) -> None:
        """Begin a slide if the last one has no room for `weight` words."""
        if self.slides[-1].weight and self.slides[-1].weight + weight > _ROOM:
            self.start()

    def add(self, part: str, weight: int, alone: bool = False) -> None:
        """Put `part` on the last slide, or on a new one if that is full."""
        self.reserve(_ROOM if alone else weight)
        self.slides[-1].parts.append(part)
        self.slides[-1].weight += _ROOM if alone else weight

    def html(self) -> str:
        """Return all slides that hold anything."""
        return "\n".join(slide.html() for slide in self.slides if slide.parts)


@functools.cache
def _markdown() -> Any:
    from markdown_it import MarkdownIt
    from mdit_py_plugins.dollarmath import dollarmath_plugin

    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    parser.use(dollarmath_plugin, double_inline=True)
    parser.validateLink = lambda url: True  # type: ignore[method-assign]  # data:

    def inline(self: Any, tokens: Any, at: int, *_: Any) -> str:
        return rf"\({html.escape(tokens[at].content)}\)"

    def block(self: Any, tokens: Any, at: int, *_: Any) -> str:
        return f"<div>$${html.escape(tokens[at].content)}$$</div>"

    parser.add_render_rule("math_inline", inline)
    parser.add_render_rule("math_block", block)
    parser.add_render_rule("math_inline_double", block)
    return parser


def fill(deck: Deck, text: str, attached: dict[str, dict[str, str]]) -> None:
    """Put the Markdown of one cell on slides."""
    parser = _markdown()
    for name, data in attached.items():
        kind, coded = next(iter(data.items()))
        text = text.replace(f"(attachment:{name})", f"(data:{kind};base64,{coded})")
    text = re.sub(r"(?<!!)\[([^\]]+)\]\([^)]*\)", r"\1", text)
    tokens = parser.parse(text)
    paragraphs, at = 0, 0
    while at < len(tokens):
        end = at + 1
        if tokens[at].nesting == 1:
            depth = 1
            while depth:
                depth += tokens[end].nesting
                end += 1
        group, kind = tokens[at:end], tokens[at].type
        shown = parser.renderer.render(group, parser.options, {})
        words = len(re.sub(r"<[^>]+>", " ", shown).split())
        at = end
        if kind == "heading_open":
            title = re.sub(r"</?h\d>", "", shown).strip()
            if group[0].tag == "h1":
                deck.start("")
                deck.add(f"<h1>{title}</h1>", 20)
            else:
                deck.start(title)
                paragraphs = 0
        elif kind == "paragraph_open" and "<img " in shown:
            deck.add(shown, _ROOM, alone=True)
            if at < len(tokens) and tokens[at].type == "paragraph_open":
                caption = parser.renderInline(_short(tokens[at + 1].content, 26))
                deck.slides[-1].parts.append(f"<p>{caption}</p>")
                at += 3
        elif kind == "paragraph_open":
            # Of the running text a slide keeps what opens a section, in short.
            paragraphs += 1
            following = tokens[at].type if at < len(tokens) else ""
            if paragraphs <= 2 or following == "math_block":
                short = _short(group[1].content, 45 if paragraphs == 1 else 26)
                weight = len(short.split())
                # A sentence stays with the formula that it leads to.
                deck.reserve(weight + _FORMULA * (following == "math_block"))
                deck.add(f"<p>{parser.renderInline(short)}</p>", weight)
        elif kind == "math_block":
            deck.add(shown, _FORMULA)
        elif kind in ("bullet_list_open", "ordered_list_open", "table_open"):
            lines = shown.count("<li>") + shown.count("<tr>")
            deck.add(shown, max(words, _LINE * lines))
        elif kind == "blockquote_open" and "You will be able to" in shown:
            deck.add(shown.replace("blockquote", "div"), words)
        elif kind == "fence":
            deck.add(shown, 4 * shown.count("\n"))
        elif kind == "html_block" and 'class="vote"' in group[0].content:
            deck.add(group[0].content, _ROOM, alone=True)


def _short(text: str, room: int) -> str:
    """Return the first whole sentences of `text` that fit into `room` words."""
    text = re.sub(r"^`\w+` ", "", text.replace("\n", " "))
    sentences = re.split(r"(?<=[.?!])(?<!e\.g\.) (?=[A-Z*`$(])", text)
    kept = [sentences[0]]
    for sentence in sentences[1:]:
        if len(" ".join([*kept, sentence]).split()) > room:
            break
        kept.append(sentence)
    return " ".join(kept)


def vote(question: str, answer: str) -> str:
    """Return the slide of a prediction: the answer appears on the next key."""
    inline = _markdown().renderInline
    asked = re.sub(r"\s*(\([abc]\))", r"<br>\1", inline(" ".join(question.split())))
    return (
        f'\n<div class="vote"><p><strong>Vote.</strong> {asked}</p>'
        f'<p class="fragment">{inline(" ".join(answer.split()))}</p></div>\n'
    )


def outputs(deck: Deck, cell: NotebookNode) -> None:
    """Put the figure of a cell and its verdicts on slides."""
    alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
    said = ""
    for output in cell.outputs:
        data = output.get("data", {})
        if "image/png" in data:
            coded = "".join(data["image/png"].split())
            deck.add(
                f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{coded}">',
                _ROOM,
                alone=True,
            )
        said += output.get("text", "")
    claims = re.findall(r"^(holds|does not hold) +\| (.*(?:\n {17}.*)*)", said, re.M)
    if claims:
        rows = [
            f"<li><strong>{verdict}</strong>: {html.escape(' '.join(text.split()))}"
            for verdict, text in claims
        ]
        deck.add(f'<ul class="claims">{"".join(rows)}</ul>', 14 * len(rows))


def _script(package: str, name: str) -> str:
    """Return the text of a file that a package of the lock ships."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise ClassroomError(
            f"the slides need the package {package}; install requirements.lock again"
        ) from None
    for file in files:
        if str(file).endswith(name):
            return file.read_text(encoding="utf-8")
    raise ClassroomError(f"{package} holds no {name}")


def page(name: str, labels: Labels) -> str:
    """Return the page of slides of the chapter called `name`."""
    convert, deck = Converter(name, labels, vote), Deck()
    for piece in pieces(read(name), name):
        if "core" not in piece.cell.metadata.get("tags", []) or piece.solution:
            continue
        if piece.kind == "code":
            outputs(deck, piece.cell)
        elif "{exercise" not in piece.source:
            fill(deck, *convert.cell(piece.source))
    first = re.search(r"<h1>(.*?)</h1>", deck.html())
    title = re.sub(r"<[^>]+>", "", first[1]) if first else name
    reveal = _script(_PACKAGE, "revealjs/dist/reveal.js")
    style = _script(_PACKAGE, "revealjs/dist/reveal.css") + _STYLE
    mathjax = book.mathjax().read_text(encoding="utf-8")
    # A script ends where its text says so: that text is written otherwise.
    scripts = [
        script.replace("</script", r"<\/script")
        for script in (_MATHJAX, mathjax, reveal, _START)
    ]
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title>\n<style>{style}</style>\n</head>\n<body>",
            f'<div class="reveal"><div class="slides">\n{deck.html()}\n</div></div>',
            *(f"<script>{script}</script>" for script in scripts),
            "</body>\n</html>\n",
        ]
    )  # fmt: skip
