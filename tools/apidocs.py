"""The API reference, made from the docstrings of `scgenlib`.

`apinames` reads the names, `apitables` says where they stand, and napoleon, an
extension of Sphinx, turns a docstring into reStructuredText. Autodoc would have to
import the package: that takes longer than all pages of the reference, and it writes out
what a type alias stands for. What is added here is what Sphinx cannot know: links from
each name to the sections and equations that explain it. `used_on` gives the way back,
from a page to the entries of what it uses.
"""

from __future__ import annotations

import ast
import contextlib
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sphinx.ext.napoleon import Config, NumpyDocstring

from apinames import Entry, Module, Package, Section, methods, sections, text_pages
from apitables import EQUATIONS, HOME, METHODS, PAGES

#: No more than this many sections are named in one entry.
MOST_SECTIONS = 4

#: What a setting says of its limits.
LIMITS = {"low": "at least", "above": "more than", "high": "at most"}

#: How napoleon writes a section: arguments that share a line stay together.
STYLE: Any = Config(
    napoleon_use_param=False,
    napoleon_use_rtype=False,
    napoleon_custom_sections=[("Attributes", "params_style")],
)

#: The first line of an item in a section, such as `width, height` or `ValueError`.
ITEM = re.compile(r"^\*{0,2}\w+(?:, \*{0,2}\w+)*$(?=\n    \S)", re.MULTILINE)

#: Code in a docstring, in single quotes; those of a role or in pairs are no such thing.
CODE = re.compile(r"(?<![`:\w])`([^`]+)`(?!`)")

NAME = re.compile(r"[A-Za-z_][\w.]*")

Documented = ast.FunctionDef | ast.ClassDef


class Reference:
    """The text of the reference for one state of the book.

    Parameters
    ----------
    root
        The folder that holds `scgenlib`.
    book
        The pages as they will be built.
    notebooks
        The notebooks among them, with a label above every heading.
    """

    def __init__(self, root: Path, book: Path, notebooks: Sequence[Path]) -> None:
        self.package = Package(root / "scgenlib")
        self.sections = [s for p in notebooks for s in sections(p, self.package)]
        self.texts = text_pages(book, self.package)
        known = "".join(p.read_text(encoding="utf-8") for p in notebooks)
        notation = book / "notation.md"
        known += notation.read_text(encoding="utf-8") if notation.is_file() else ""
        texts = {p.stem for p in book.glob("*.md")}
        self.documents = texts | {p.stem for p in notebooks}
        self.has_pages = (book / "api").is_dir()
        self.equations: dict[str, list[str]] = {}
        for label, names in EQUATIONS.items():
            if re.search(rf"{label}(?![\w-])", known):
                for name in names:
                    self.equations.setdefault(name, []).append(label)

    def explained(self, name: str) -> str:
        """Return links to the sections and equations that explain an entry."""
        here = [s for s in self.sections if name in s.names]
        # A definition worked by hand explains more than a call.
        here.sort(key=lambda s: not re.match("by hand", s.title, re.IGNORECASE))
        links = [
            f":doc:`{s.page} </book/{s.page}>`, :ref:`{s.label}`"
            for s in here[:MOST_SECTIONS]
        ]
        links += [f"equation :eq:`{label}`" for label in self.equations.get(name, [])]
        if not here:
            links += [f":doc:`/book/{p}`" for p in self.texts.get(name, [])[:2]]
        if not links:
            module = name.split(".")[0]
            home = HOME.get(module, "")
            # Where its page first uses a neighbour of the same module.
            near = [
                s
                for s in self.sections
                if s.page == home and any(n.split(".")[0] == module for n in s.names)
            ][:1]
            if near:
                links = [f":doc:`{home} </book/{home}>`, :ref:`{near[0].label}`"]
            elif home in self.documents:
                links = [f":doc:`/book/{home}`"]
        return "; ".join(links)

    def is_used(self, name: str) -> bool:
        """Return whether a page uses or names the entry."""
        return name in self.texts or any(name in s.names for s in self.sections)

    def members(self, page: str) -> Iterator[tuple[str, list[Entry]]]:
        """Yield each module of a page with the entries that stand there."""
        for module in PAGES[page]:
            found = [e for e in self.package.entries.values() if e.owner == module]
            if module in METHODS:
                found = [e for e in found if self.is_method(e) == (page == "methods")]
            if page == "methods":
                found.sort(key=lambda e: e.short != "Estimator")
            if found:
                yield module, found

    def is_method(self, entry: Entry) -> bool:
        """Return whether an entry is an estimator or a configuration of one."""
        bases = self.package.lineage(entry.name)
        return bool({"estimator.Estimator", "estimator.Config"} & set(bases))

    def index(self) -> str:
        """Return the table of all modules."""
        rows = ["| module | what for | names |", "| --- | --- | --- |"]
        for page in PAGES:
            for module, entries in self.members(page):
                about = self.package.modules[module].doc.splitlines()[0]
                about = about.replace("|", "\\|")
                target = f"api-{page}-{module}"
                rows.append(f"| [`{module}`]({target}) | {about} | {len(entries)} |")
        return "\n".join(rows) + "\n"

    def page(self, name: str) -> str:
        """Return the generated part of one page of the reference."""
        done = []
        for module, entries in self.members(name):
            about = self.package.modules[module]
            doc = about.doc
            if name == "methods" and module in METHODS:
                doc = doc.split("\n\n")[0]  # the rest stands with the parts
            done += [f"(api-{name}-{module})=", f"## `scgenlib.{module}`", ""]
            done += ["```{eval-rst}", self.linked(doc, about), ""]
            done += [self.entry_text(entry) for entry in entries]
            done += ["```", ""]
        return "\n".join(done)

    def entry_text(self, entry: Entry) -> str:
        """Return the directives of one name, and of the methods of a class."""
        node, module = entry.node, entry.module
        full = _Qualified(self.package, module)
        footer = []
        if entry.aliases:
            names = ", ".join(f"``scgenlib.{alias}``" for alias in entry.aliases)
            footer.append(f"Also as {names}.")
        if links := self.explained(entry.name):
            footer.append(f"Explained in: {links}")
        if isinstance(node, ast.FunctionDef):
            body = [self.doc_text(node, node, module), *footer]
            return directive("function", entry, signature(node, 0, full), body)
        if not isinstance(node, ast.ClassDef):
            value = ast.unparse(node.value) if node.value is not None else ""
            about = module.comments.get(entry.short) or "A constant."
            body = [self.linked(about, module)]
            if 0 < len(value) <= 120:
                body.append(f"Value: ``{value}``")
            return directive("data", entry, "", [*body, *footer])
        made = constructor(node)
        body = [
            self.doc_text(node, made, module),
            self.settings_text(node),
            self.inherited(entry, node),
        ]
        shown = signature(made, 0, full) if made else ""
        done = [directive("class", entry, shown, [*body, *footer])]
        for name, method in methods(node):
            done.append(self.method_text(entry, name, method, full))
        return "\n".join(done)

    def method_text(
        self, entry: Entry, name: str, node: ast.FunctionDef, full: _Qualified
    ) -> str:
        """Return the directive of a method or a property."""
        marks = {ast.unparse(d) for d in node.decorator_list}
        body = [self.doc_text(node, node, entry.module)]
        if self.is_used(f"{entry.name}.{name}"):
            body.append(f"Explained in: {self.explained(f'{entry.name}.{name}')}")
        if "property" in marks:
            return directive("property", entry, f".{name}", body)
        shown = signature(node, "staticmethod" not in marks, full)
        options = sorted(marks & {"classmethod", "staticmethod", "abstractmethod"})
        return directive("method", entry, f".{name}{shown}", body, options)

    # --- docstrings ---

    def doc_text(
        self, node: Documented, made: ast.FunctionDef | None, module: Module
    ) -> str:
        """Return a docstring as napoleon writes it, with types from the signature."""
        types = argument_types(made) if made else {}
        if isinstance(node, ast.ClassDef):
            fields = fields_of(node)
            types |= {ast.unparse(f.target): ast.unparse(f.annotation) for f in fields}
        doc = self.linked(ast.get_docstring(node) or "", module)

        def item(match: re.Match[str]) -> str:
            names = [name.lstrip("*") for name in match[0].split(", ")]
            kinds = {types.get(name, "") for name in names}
            if len(kinds) == 1 and kinds != {""}:
                return f"{match[0]} : {kinds.pop()}"
            # An error, or what is returned, if it is ours.
            here = self.package.resolve(module.name, match[0])
            known = here in self.package.entries
            return f":py:obj:`~scgenlib.{here}`" if known else match[0]

        return str(NumpyDocstring(ITEM.sub(item, doc), STYLE)).strip("\n")

    def linked(self, text: str, module: Module) -> str:
        """Return reStructuredText in which code that is a public name is a link."""
        return CODE.sub(lambda match: self.code(match[1], module), text)

    def code(self, text: str, module: Module) -> str:
        """Return a piece of code, linked if it is a public name."""
        text = " ".join(text.split())
        name = text.removesuffix("()").removeprefix("scgenlib.")
        if NAME.fullmatch(name):
            target = self.package.lookup(name, self.package.scope(module))
            if target:
                return f":py:obj:`{text} <scgenlib.{target}>`"
        return f"``{text}``"

    def inherited(self, entry: Entry, node: ast.ClassDef) -> str:
        """Return links to what a class has from its bases in the package."""
        own = {name for name, _ in methods(node)}
        links = [
            f":py:meth:`{name} <scgenlib.{base}.{name}>`"
            for base in self.package.lineage(entry.name)[1:]
            for name, _ in methods(self.package.entries[base].node)
            if name not in own
        ]
        return f"Inherited: {', '.join(links)}." if links else ""

    def settings_text(self, node: ast.ClassDef) -> str:
        """Return the table of the fields of a configuration."""
        values = {ast.unparse(n.target): n.value for n in node.body
                  if isinstance(n, ast.AnnAssign) and n.value}  # fmt: skip
        profiles: dict[str, Any] = {}
        with contextlib.suppress(KeyError, ValueError):
            profiles = ast.literal_eval(values["PROFILES"])
        book = profiles.get("book", {})
        rows = [["setting", "type", "paper", *["book"] * bool(book), "what it is"]]
        for item in fields_of(node):
            if not is_option(item):
                continue
            assert isinstance(item.value, ast.Call)
            name = ast.unparse(item.target)
            default, doc = item.value.args[:2]
            limits = {k.arg: ast.unparse(k.value) for k in item.value.keywords}
            about = str(ast.literal_eval(doc))
            for key, words in LIMITS.items():
                about += f"; {words} {limits[key]}" if key in limits else ""
            if "choices" in limits:
                about += f"; one of ``{limits['choices']}``"
            row = [name, ast.unparse(item.annotation), ast.unparse(default)]
            row = [f"``{cell}``" for cell in row]
            if book:
                row.append(f"``{book[name]!r}``" if name in book else "same")
            rows.append([*row, about])
        if len(rows) == 1:
            return ""
        cells = ["   * - " + "\n     - ".join(row) for row in rows]
        return "\n".join([".. list-table::", "   :header-rows: 1", "", *cells])


def directive(
    kind: str, entry: Entry, rest: str, body: Iterable[str], options: Iterable[str] = ()
) -> str:
    """Return an object of the Python domain."""
    options = [f":module: scgenlib.{entry.owner}", *(f":{name}:" for name in options)]
    inner = "\n\n".join(["\n".join(options), *(part for part in body if part)])
    return f".. py:{kind}:: {entry.short}{rest}\n{textwrap.indent(inner, '   ')}\n"


class _Qualified(ast.NodeTransformer):
    """Names of ours in a type, in full: Sphinx links them, and shows the last part."""

    def __init__(self, package: Package, module: Module) -> None:
        self.package, self.module = package, module

    def visit_Name(self, node: ast.Name) -> ast.expr:
        here = self.package.resolve(self.module.name, node.id)
        if here not in self.package.entries:
            return node
        return ast.parse(f"~scgenlib.{here}", mode="eval").body


def signature(node: ast.FunctionDef, skip: int, full: _Qualified) -> str:
    """Return `(arguments) -> result`, without the first `skip` arguments."""
    args = function(ast.unparse(node.args)).args
    for _ in range(skip):
        (args.posonlyargs or args.args).pop(0)
    for argument in ast.walk(args):
        if isinstance(argument, ast.arg) and argument.annotation:
            argument.annotation = full.visit(argument.annotation)
    shown = f"({ast.unparse(args)})"
    if not node.returns:
        return shown
    back = ast.parse(ast.unparse(node.returns), mode="eval").body
    return f"{shown} -> {ast.unparse(full.visit(back))}"


def constructor(node: ast.ClassDef) -> ast.FunctionDef | None:
    """Return what makes an instance, as a function without `self`."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            made = function(ast.unparse(item.args))
            made.args.args.pop(0)
            return made
    fields = fields_of(node)
    if not fields or any(is_option(field) for field in fields):
        return None
    return function(", ".join(ast.unparse(field) for field in fields))


def function(arguments: str) -> ast.FunctionDef:
    """Return a function with these arguments."""
    made = ast.parse(f"def f({arguments}): ...").body[0]
    assert isinstance(made, ast.FunctionDef)
    return made


def fields_of(node: ast.ClassDef) -> list[ast.AnnAssign]:
    """Return the fields of a data class or a configuration."""
    fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
    return [f for f in fields if not ast.unparse(f.annotation).startswith("ClassVar")]


def argument_types(node: ast.FunctionDef) -> dict[str, str]:
    """Return the type of each argument, as written."""
    return {
        a.arg: ast.unparse(a.annotation)
        for a in ast.walk(node.args)
        if isinstance(a, ast.arg) and a.annotation
    }


def is_option(node: ast.AnnAssign) -> bool:
    """Return whether a field is declared by `option`."""
    return isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "option"


# --- from a page to the reference ----------------------------------------------------


def used_on(page: str, reference: Reference) -> list[str]:
    """Return a Markdown list of the entries that a page uses, each with its place."""
    first: dict[str, Section] = {}
    for section in reference.sections:
        if section.page == page:
            for name in section.names:
                first.setdefault(name, section)
    lines = []
    for name in sorted(first):
        line = f"- {{py:obj}}`{name} <scgenlib.{name}>`, {{ref}}`{first[name].label}`"
        for label in reference.equations.get(name, []):
            line += f", equation {{eq}}`{label}`"
        lines.append(line)
    return lines
