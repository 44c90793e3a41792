"""The public names of `scgenlib`, and where the pages of the book use them.

Nothing is imported: the files are read as text, so that a build takes no longer and
no signature is changed by a decorator.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import nbformat

Definition = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign

#: Verbs of ours that other objects in a chapter have too.
COMMON = ("hash", "replace", "table")

# --- the package, read as text ----------------------------------------------------


@dataclasses.dataclass(eq=False)
class Module:
    """One file of the package."""

    name: str
    doc: str
    public: tuple[str, ...]
    definitions: dict[str, Definition]
    imports: dict[str, tuple[str, str]]
    """Local name -> (module, name there); the name is empty for a module."""
    comments: dict[str, str]
    """What the `#:` lines above a constant say."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One public name: where it is documented, and what it is."""

    name: str
    """As in `garage.seed_count`."""
    node: Definition
    module: Module
    aliases: tuple[str, ...] = ()

    @property
    def short(self) -> str:
        """Return the name without its module."""
        return self.name.rsplit(".", 1)[-1]

    @property
    def owner(self) -> str:
        """Return the module under which the name is documented."""
        return self.name.rsplit(".", 1)[0]


class Package:
    """All modules, and for each public name the one place where it is documented."""

    def __init__(self, root: Path) -> None:
        self.modules: dict[str, Module] = {}
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(p for p in parts if p != "__init__")
            self.modules[name] = read_module(name, path)
        self.exports = exports(root / "__init__.py")
        found: dict[str, tuple[Module, Definition, list[str]]] = {}
        for module in self.modules.values():
            if not module.name or module.name.startswith("_"):
                continue
            for short in module.public:
                here = self.resolve(module.name, short)
                if here is None:
                    continue
                home, node = self.definition(here)
                known = found.setdefault(here, (home, node, []))
                if here != f"{module.name}.{short}":
                    known[2].append(f"{module.name}.{short}")
        self.entries = {
            name: Entry(name, node, home, tuple(aliases))
            for name, (home, node, aliases) in sorted(found.items())
        }

    def definition(self, name: str) -> tuple[Module, Definition]:
        """Return the module and the statement that define a canonical name."""
        module, short = name.rsplit(".", 1)
        while short not in self.modules[module].definitions:
            module, short = self.modules[module].imports[short]
        return self.modules[module], self.modules[module].definitions[short]

    def resolve(self, module: str, name: str) -> str | None:
        """Return the canonical name of `name` as seen in `module`, if it is ours."""
        seen = module
        while module in self.modules:
            here = self.modules[module]
            if name in here.definitions:
                if here.public or not here.name or "." not in here.name:
                    return f"{module}.{name}"
                # A part of a package without names of its own, such as metrics.
                package = module.rsplit(".", 1)[0]
                if name in self.modules[package].public:
                    return f"{package}.{name}"
                return f"{module}.{name}"
            if name not in here.imports:
                return None
            module, name = here.imports[name]
            if not name:
                return None
        return None if seen == module else None

    @functools.cache  # noqa: B019 - one package for the life of a build
    def scope(self, module: Module) -> dict[str, str]:
        """Return what the names mean that a docstring of a module can use."""
        scope = {name: name for name in self.modules if name} | {"scgenlib": ""}
        for name in [*module.definitions, *module.imports]:
            if here := self.resolve(module.name, name):
                scope[name] = here
        return scope

    def lookup(self, dotted: str, scope: Mapping[str, str]) -> str | None:
        """Return the entry that `dotted` means where `scope` holds.

        Parameters
        ----------
        dotted
            As written, such as `garage.seed_count` or `GARAGE.fit`.
        scope
            Local name -> module (`garage`) or entry (`garage.GARAGE`).
        """
        first, *rest = dotted.split(".")
        here = scope.get(first)
        if here is None:
            return None
        for index, part in enumerate(rest):
            if here not in self.modules:
                break
            inner = f"{here}.{part}" if here else part
            if here == "" and part in self.exports:
                here = self.exports[part]
            elif inner in self.modules:
                here = inner
            else:
                found = self.resolve(here, part)
                if found is None:
                    return None
                here = found
            if here in self.entries:
                method = rest[index + 1] if index + 1 < len(rest) else ""
                return self.member(here, method) or here
        if here in self.entries:
            return self.member(here, rest[0] if rest else "") or here
        return None

    def member(self, name: str, method: str) -> str | None:
        """Return `name.method` if the class, or a base of it, documents it."""
        for owner in self.lineage(name):
            if method and method in dict(methods(self.entries[owner].node)):
                return f"{owner}.{method}"
        return None

    @functools.cache  # noqa: B019 - one package for the life of a build
    def lineage(self, name: str) -> tuple[str, ...]:
        """Return a class and its bases in the package, nearest first."""
        entry = self.entries[name]
        if not isinstance(entry.node, ast.ClassDef):
            return ()
        found = [name]
        for base in entry.node.bases:
            here = self.resolve(entry.module.name, ast.unparse(base))
            if here in self.entries:
                found += [n for n in self.lineage(here) if n not in found]
        return tuple(found)


def read_module(name: str, path: Path) -> Module:
    """Read one file of the package."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    lines = text.splitlines()
    module = Module(name, ast.get_docstring(tree) or "", (), {}, {}, {})
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            module.definitions[node.name] = node
        elif isinstance(node, ast.ImportFrom):
            module.imports |= ours(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if not isinstance(target, ast.Name):
                continue
            if target.id == "__all__":
                names = getattr(node.value, "elts", [])
                module.public += tuple(
                    str(n.value) for n in names if isinstance(n, ast.Constant)
                )
                continue
            if isinstance(node, ast.AugAssign):
                continue
            module.definitions[target.id] = node
            above = node.lineno - 2
            words: list[str] = []
            while above >= 0 and lines[above].startswith("#:"):
                words.insert(0, lines[above][2:].strip())
                above -= 1
            module.comments[target.id] = " ".join(words)
    return module


def ours(node: ast.ImportFrom) -> dict[str, tuple[str, str]]:
    """Return what an import takes from the package."""
    source = node.module or ""
    if source == "scgenlib":
        return {a.asname or a.name: (a.name, "") for a in node.names}
    if not source.startswith("scgenlib."):
        return {}
    inner = source.removeprefix("scgenlib.")
    return {a.asname or a.name: (inner, a.name) for a in node.names}


def exports(path: Path) -> dict[str, str]:
    """Return the classes at the top of the package: name -> canonical name."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_EXPORTS":
            return {n: f"{m}.{n}" for n, m in ast.literal_eval(node.value).items()}
    return {}


def methods(node: Definition) -> list[tuple[str, ast.FunctionDef]]:
    """Return the public methods and properties of a class."""
    if not isinstance(node, ast.ClassDef):
        return []
    return [
        (n.name, n)
        for n in node.body
        if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")
        if ast.get_docstring(n)
    ]


# --- where the book uses a name ----------------------------------------------------


@dataclasses.dataclass
class Section:
    """A heading of a page, and what stands below it up to the next one."""

    page: str
    label: str
    title: str
    names: list[str]


HEADING = re.compile(r"^(#{1,4}) +(.+?) *#*$")
LABEL = re.compile(r"^\(([\w-]+)\)=$")
CODE = re.compile(r"(?<!`)`([A-Za-z_][\w.]*)(?:\([^`]*\))?`(?!`)")


def headings(source: str) -> Iterator[tuple[int, int, str, str]]:
    """Yield (line, level, title, label or "") of the headings of a Markdown text."""
    lines, fence = source.splitlines(), ""
    for number, line in enumerate(lines):
        mark = re.match(r" {0,3}(`{3,}|~{3,}|:{3,})", line)
        if fence:
            if mark and mark[1].startswith(fence) and line.strip() == mark[1]:
                fence = ""
        elif mark:
            fence = mark[1]
        elif found := HEADING.match(line):
            label = LABEL.match(lines[number - 1]) if number else None
            yield number, len(found[1]), found[2], label[1] if label else ""


def sections(path: Path, package: Package) -> list[Section]:
    """Return the labelled sections of a notebook with the names that each uses."""
    found: list[Section] = []
    scope: dict[str, str] = {"scgenlib": ""}
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            names = names_in_code(cell.source, package, scope)
            if found:
                found[-1].names += names
            continue
        lines, start = cell.source.splitlines(), 0
        for number, _, title, label in headings(cell.source):
            if found:
                found[-1].names += mentioned(lines[start:number], package, scope)
            if label:
                found.append(Section(path.stem, label, title, []))
            start = number
        if found:
            found[-1].names += mentioned(lines[start:], package, scope)
    return found


def names_in_code(source: str, package: Package, scope: dict[str, str]) -> list[str]:
    """Return the entries that a code cell uses, and add its imports to `scope`."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return []
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "scgenlib":
                    scope[alias.asname or "scgenlib"] = ""
        elif isinstance(node, ast.ImportFrom):
            for local, (module, name) in ours(node).items():
                if name:
                    here = package.resolve(module, name) or f"{module}.{name}"
                else:
                    here = package.exports.get(module, module)
                scope[local] = here
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            text = ast.unparse(node)
            if re.fullmatch(r"[\w.]+", text):
                entry = package.lookup(text, scope)
                if entry:
                    found.append((node.lineno, entry))
        if isinstance(node, ast.Attribute) and node.attr not in COMMON:
            # A verb of a fitted model: only one class at hand may have it.
            owners = {
                m
                for name in set(scope.values()) & set(package.entries)
                if (m := package.member(name, node.attr))
            }
            if len(owners) == 1 and not isinstance(node.value, ast.Constant):
                found.append((node.lineno, owners.pop()))
    return list(dict.fromkeys(name for _, name in sorted(found)))


def mentioned(
    lines: Sequence[str], package: Package, scope: Mapping[str, str]
) -> list[str]:
    """Return the entries that a text names in code type, as `garage.seed_count`."""
    known = {m: m for m in package.modules if m} | dict(scope) | package.exports
    found = []
    for name in CODE.findall("\n".join(lines)):
        if entry := package.lookup(name, known):
            found.append(entry)
    return found


def text_pages(root: Path, package: Package) -> dict[str, list[str]]:
    """Return which Markdown pages name an entry: entry -> pages."""
    found: dict[str, list[str]] = {}
    for path in [*sorted(root.glob("*.md")), *sorted((root / "ledger").glob("*.md"))]:
        page = path.relative_to(root).with_suffix("").as_posix()
        for name in dict.fromkeys(mentioned([path.read_text()], package, {})):
            found.setdefault(name, []).append(page)
    return found
