"""The API reference, made from the docstrings of `scgenlib`.

Nothing is imported: the files are read as text, so that a build takes no longer and
no signature is changed by a decorator. Each public name has one entry, with links to
the sections and equations that explain it; `used_on` gives the way back, from a page
to the entries of what it uses.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat

Definition = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign

#: Page -> its modules, in the order of the page. `methods` takes their classes only;
#: what is left of these modules comes again on `parts`.
METHODS = ("scatlasvae", "cscgan", "garage", "scgacl", "regina")
PAGES: dict[str, tuple[str, ...]] = {
    "methods": ("estimator", *METHODS),
    "parts": (
        "graph",
        *METHODS,
        *("countvae", "likelihoods", "mapping", "surgery"),
        *("wgan", "vaegan", "dropout"),
        *("latentcycle", "pairs", "shrinkage", "states"),
        *("nets", "losses", "training", "cells", "atlas", "rowblocks"),
        *("copies", "validation", "published"),
    ),
    "data": (
        *("datasets", "contract", "h5ad", "readers", "download", "files"),
        *("preprocess", "splits", "conditions", "layouts", "completion"),
        *("simulate", "simatlas", "simperturb"),
    ),
    "evaluation": ("metrics", "baselines", "imputers", "integrators", "perturbers"),
    "chapters": (
        "chapter",
        "homework",
        "selfcheck",
        "records",
        "plots",
        "figure",
        "words",
        "cli",
        "errors",
    ),
}

#: The equation of the book -> what computes it.
EQUATIONS: dict[str, tuple[str, ...]] = {
    "eq-log1p": ("preprocess.normalise",),
    "eq-data-log": ("preprocess.normalise",),
    "eq-data-nb": ("likelihoods.nb_log_prob",),
    "eq-machines-ae": ("losses.masked_mse",),
    "eq-machines-vae": ("losses.kl_to_standard_normal",),
    "eq-machines-gan": ("losses.discriminator_loss", "losses.generator_loss"),
    "eq-machines-w1": ("losses.wasserstein_critic_loss",),
    "eq-machines-penalty": ("losses.gradient_penalty",),
    "eq-machines-attention": ("graph.GAT",),
    "eq-machines-contrast": ("losses.nt_xent",),
    "eq-evaluation-w1": ("metrics.wasserstein", "metrics.sliced_wasserstein"),
    "eq-evaluation-mmd": ("metrics.mmd2", "metrics.mmd"),
    "eq-evaluation-ari": ("metrics.ari", "metrics.ari_over_resolutions"),
    "eq-evaluation-scale": ("metrics.wasserstein",),
    "eq-evaluation-shared": ("conditions.split_controls", "metrics.null_experiment"),
    "eq-scatlasvae-q": ("countvae.Encoder",),
    "eq-scatlasvae-mean": ("countvae.Decoder",),
    "eq-scatlasvae-nb": ("likelihoods.nb_log_prob", "likelihoods.zero_probability"),
    "eq-scatlasvae-zinb": ("likelihoods.zinb_log_prob",),
    "eq-scatlasvae-elbo": (
        *("likelihoods.count_nll", "losses.kl_to_standard_normal"),
        *("losses.gaussian_kl", "countvae.CountVAE"),
    ),
    "eq-scatlasvae-ce": ("losses.weighted_cross_entropy", "losses.class_weights"),
    "eq-cscgan-cbn": ("nets.ConditionalBatchNorm",),
    "eq-cscgan-lsn": ("nets.LibrarySizeNorm", "wgan.Generator"),
    "eq-cscgan-head": ("nets.ClassHead", "wgan.Critic"),
    "eq-cscgan-d": ("wgan.critic_loss", "losses.wasserstein_critic_loss"),
    "eq-cscgan-between": ("losses.gradient_penalty", "wgan.critic_gradient"),
    "eq-cscgan-g": ("wgan.generator_step",),
    "eq-garage-alpha": ("graph.GAT", "graph.knn_graph"),
    "eq-garage-boost": ("graph.GAT", "graph.gat_input"),
    "eq-garage-score": ("graph.attention_scores", "garage.choose_seeds"),
    "eq-garage-batch": ("garage.mixed_batch", "garage.seed_count"),
    "eq-garage-d": ("losses.discriminator_loss", "garage.discriminator_step"),
    "eq-garage-g": ("losses.generator_loss", "garage.generator_step"),
    "eq-scgacl-mixture": ("dropout.fit_mixtures", "dropout.dropout_probability"),
    "eq-scgacl-rec": ("losses.masked_mse",),
    "eq-scgacl-mix": ("losses.mixture_kl", "losses.responsibilities"),
    "eq-scgacl-adv": ("vaegan.discriminator_step", "vaegan.generator_step"),
    "eq-scgacl-cell": ("losses.nt_xent", "vaegan.contrastive_step"),
    "eq-scgacl-type": ("losses.sup_con", "vaegan.contrastive_step"),
    "eq-regina-ae": ("latentcycle.autoencoder_step", "losses.centre_loss"),
    "eq-regina-prompt": ("latentcycle.prompt", "latentcycle.silenced"),
    "eq-regina-move": ("latentcycle.Transition", "latentcycle.move"),
    "eq-regina-cycle": ("latentcycle.transition_step",),
    "eq-regina-adv": ("latentcycle.critic_step", "losses.least_squares_gan_losses"),
    "eq-regina-pair": ("latentcycle.transition_step", "pairs.Pairs"),
}

#: Where a module is at home: for names that no page uses by name.
HOME: dict[str, str] = {
    "estimator": "how_to_read",
    "scatlasvae": "scatlasvae",
    "countvae": "scatlasvae",
    "likelihoods": "scatlasvae",
    "mapping": "scatlasvae",
    "surgery": "scatlasvae",
    "integrators": "scatlasvae",
    "simatlas": "scatlasvae",
    "cscgan": "cscgan",
    "wgan": "cscgan",
    "copies": "cscgan",
    "validation": "cscgan",
    "garage": "garage",
    "graph": "garage",
    "scgacl": "scgacl",
    "vaegan": "scgacl",
    "dropout": "scgacl",
    "imputers": "scgacl",
    "completion": "scgacl",
    "regina": "regina",
    "latentcycle": "regina",
    "pairs": "regina",
    "shrinkage": "regina",
    "states": "regina",
    "conditions": "regina",
    "layouts": "regina",
    "perturbers": "regina",
    "simperturb": "regina",
    "nets": "machines",
    "losses": "machines",
    "training": "machines",
    "cells": "scale",
    "atlas": "scale",
    "rowblocks": "scale",
    "published": "garage",
    "datasets": "datasets",
    "contract": "data",
    "h5ad": "setup",
    "readers": "datasets",
    "download": "datasets",
    "files": "setup",
    "preprocess": "data",
    "splits": "data",
    "simulate": "data",
    "metrics": "evaluation",
    "baselines": "evaluation",
    "chapter": "how_to_read",
    "homework": "how_to_read",
    "selfcheck": "how_to_read",
    "records": "status",
    "plots": "how_to_read",
    "figure": "how_to_read",
    "words": "how_to_read",
    "cli": "setup",
    "errors": "setup",
}

#: Verbs of ours that other objects in a chapter have too.
COMMON = ("hash", "replace", "table")

#: No more than this many sections are named in one entry.
MOST_SECTIONS = 4


# --- the package, read as text ----------------------------------------------------


@dataclasses.dataclass
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


# --- pages -------------------------------------------------------------------------


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
            f"{{doc}}`{s.page} </book/{s.page}>`, {{ref}}`{s.label}`"
            for s in here[:MOST_SECTIONS]
        ]
        links += [f"equation {{eq}}`{label}`" for label in self.equations.get(name, [])]
        if not here:
            links += [f"{{doc}}`/book/{p}`" for p in self.texts.get(name, [])[:2]]
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
                links = [f"{{doc}}`{home} </book/{home}>`, {{ref}}`{near[0].label}`"]
            elif home in self.documents:
                links = [f"{{doc}}`/book/{home}`"]
        return "; ".join(links)

    def page(self, name: str) -> str:
        """Return the generated part of one page of the reference."""
        done = []
        for module in PAGES[name]:
            entries = [e for e in self.package.entries.values() if e.owner == module]
            if module in METHODS:
                classes = [e for e in entries if self.is_method(e)]
                others = [e for e in entries if e not in classes]
                entries = classes if name == "methods" else others
            if module == "estimator" and name == "methods":
                entries.sort(key=lambda e: e.short != "Estimator")
            if entries:
                done.append(self.module_text(module, entries, name))
        return "\n".join(done)

    def is_method(self, entry: Entry) -> bool:
        """Return whether an entry is an estimator or a configuration of one."""
        bases = self.package.lineage(entry.name)
        return bool({"estimator.Estimator", "estimator.Config"} & set(bases))

    def index(self) -> str:
        """Return the table of all modules."""
        rows = ["| module | what for | names |", "| --- | --- | --- |"]
        for page, modules in PAGES.items():
            for module in modules:
                entries = [e for e in self.package.entries.values()
                           if e.owner == module]  # fmt: skip
                if module in METHODS:
                    entries = [
                        e for e in entries if self.is_method(e) == (page == "methods")
                    ]
                if not entries:
                    continue
                target = f"api-{page}-{module}"
                about = escape(self.package.modules[module].doc.splitlines()[0])
                about = about.replace("|", "\\|")
                rows.append(f"| [`{module}`]({target}) | {about} | {len(entries)} |")
        return "\n".join(rows) + "\n"

    def module_text(self, module: str, entries: Sequence[Entry], page: str) -> str:
        """Return the section of one module."""
        about = self.package.modules[module]
        first, *rest = paragraphs(about.doc)
        text = f"(api-{page}-{module})=\n## `scgenlib.{module}`\n\n"
        text += self.prose(first, about) + "\n\n"
        if page != "methods" or module not in METHODS:
            text += "\n\n".join(self.prose(p, about) for p in rest) + "\n\n"
        return text + "\n".join(self.entry_text(e) for e in entries)

    def entry_text(self, entry: Entry) -> str:
        """Return the entry of one name, and of the methods of a class."""
        node, module = entry.node, entry.module
        full = _Qualified(self.package, module)
        if isinstance(node, ast.ClassDef):
            parts = [self.class_text(entry, node)]
            for name, method in methods(node):
                marks = {ast.unparse(d) for d in method.decorator_list}
                options = [
                    m for m in ("classmethod", "staticmethod", "abstractmethod")
                    if m in marks
                ]  # fmt: skip
                kind = "method"
                if "property" in marks:
                    kind, options = "property", []
                skip = 0 if "staticmethod" in marks else 1
                shown = signature(method, skip, full) if kind == "method" else ""
                body = self.doc_text(method, module, skip)
                links = self.explained(f"{entry.name}.{name}")
                if self.is_used(f"{entry.name}.{name}"):
                    body += f"\n\nExplained in: {links}"
                parts.append(
                    directive(kind, f"{entry.short}.{name}{shown}", entry, body,
                              options)
                )  # fmt: skip
            return "\n".join(parts)
        if isinstance(node, ast.FunctionDef):
            body = self.doc_text(node, module, 0) + self.footer(entry)
            return directive(
                "function", entry.short + signature(node, 0, full), entry, body, []
            )
        value = node.value
        shown = ast.unparse(value) if value is not None else ""
        body = self.prose(module.comments.get(entry.short, "") or "A constant.", module)
        body += f"\n\nValue: `{shown}`" if 0 < len(shown) <= 120 else ""
        return directive("data", entry.short, entry, body + self.footer(entry), [])

    def is_used(self, name: str) -> bool:
        """Return whether a page uses or names the entry."""
        return name in self.texts or any(name in s.names for s in self.sections)

    def footer(self, entry: Entry) -> str:
        """Return the last lines of an entry: other names, and where it is explained."""
        text = ""
        if entry.aliases:
            names = ", ".join(f"`scgenlib.{alias}`" for alias in entry.aliases)
            text += f"\n\nAlso as {names}."
        links = self.explained(entry.name)
        return text + (f"\n\nExplained in: {links}" if links else "")

    def class_text(self, entry: Entry, node: ast.ClassDef) -> str:
        """Return the entry of a class without its methods."""
        shown, skip = "", 1
        full = _Qualified(self.package, entry.module)
        init = next((n for n in node.body if getattr(n, "name", "") == "__init__"),
                    None)  # fmt: skip
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign)
                  and not ast.unparse(n.annotation).startswith("ClassVar")]  # fmt: skip
        settings = [n for n in fields if is_option(n)]
        if isinstance(init, ast.FunctionDef):
            shown = signature(init, skip, full)
        elif fields and not settings:
            made = ast.parse(f"def f({', '.join(map(ast.unparse, fields))}): ...")
            assert isinstance(made.body[0], ast.FunctionDef)
            shown = signature(made.body[0], 0, full)
        types = {ast.unparse(n.target): ast.unparse(n.annotation) for n in fields}
        if isinstance(init, ast.FunctionDef):
            types |= argument_types(init)
        body = self.sections_text(ast.get_docstring(node) or "", types, entry.module)
        if settings:
            body += "\n\n" + self.settings_text(entry, node, settings)
        inherited = []
        for base in self.package.lineage(entry.name)[1:]:
            own = {name for name, _ in methods(node)}
            names = [n for n, _ in methods(self.package.entries[base].node)]
            inherited += [
                f"{{py:meth}}`{n} <scgenlib.{base}.{n}>`" for n in names if n not in own
            ]
        if inherited:
            body += "\n\nInherited: " + ", ".join(inherited) + "."
        return directive(
            "class", entry.short + shown, entry, body + self.footer(entry), []
        )

    def settings_text(
        self, entry: Entry, node: ast.ClassDef, settings: Sequence[ast.AnnAssign]
    ) -> str:
        """Return the table of the fields of a configuration."""
        profiles: dict[str, Any] = {}
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and item.value is not None:
                if ast.unparse(item.target) == "PROFILES":
                    try:
                        profiles = ast.literal_eval(item.value)
                    except ValueError:
                        profiles = {}
        book = profiles.get("book", {})
        head = ["setting", "type", "paper", *(["book"] if book else []), "what it is"]
        rows = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
        for item in settings:
            assert isinstance(item.value, ast.Call)
            name = ast.unparse(item.target)
            default, doc = item.value.args[:2]
            value = ast.unparse(default)
            limits = {k.arg: ast.unparse(k.value) for k in item.value.keywords}
            about = escape(ast.literal_eval(doc)) + "".join(
                f"; {words} {limits[key]}"
                for key, words in (
                    ("low", "at least"), ("above", "more than"), ("high", "at most")
                )
                if key in limits
            )  # fmt: skip
            if "choices" in limits:
                about += f"; one of `{limits['choices']}`"
            cells = [f"`{name}`", f"`{ast.unparse(item.annotation)}`", f"`{value}`"]
            if book:
                cells.append(f"`{book[name]!r}`" if name in book else "same")
            cells.append(about)
            cells = [c.replace("|", "\\|") for c in cells]
            rows.append(f"| {' | '.join(cells)} |")
        return "\n".join(rows)

    # --- docstrings to Markdown ---

    def doc_text(self, node: ast.FunctionDef, module: Module, skip: int) -> str:
        """Return the docstring of a function as Markdown, with types."""
        types = argument_types(node)
        text = self.sections_text(ast.get_docstring(node) or "", types, module)
        return text

    def sections_text(self, doc: str, types: Mapping[str, str], module: Module) -> str:
        """Return a numpydoc docstring as Markdown."""
        parts = numpydoc(doc)
        done = [self.prose(p, module) for p in paragraphs(parts.pop(""))]
        for title, body in parts.items():
            if title in ("Parameters", "Attributes", "Raises", "Warns", "Returns",
                         "Yields"):  # fmt: skip
                items = list(numpydoc_items(body))
                if items and items[0][1]:
                    done.append(f"**{title}**")
                    for names, text in items:
                        done.append(self.item(title, names, text, types, module))
                    continue
            done.append(f"**{title}**")
            if title == "Examples":
                done.append(f"```python\n{body}\n```")
            else:
                done += [self.prose(p, module) for p in paragraphs(body)]
        return "\n\n".join(done)

    def item(
        self,
        title: str,
        names: str,
        text: str,
        types: Mapping[str, str],
        module: Module,
    ) -> str:
        """Return one parameter, or one error, as an item of a definition list."""
        shown = [n.strip().lstrip("*") for n in names.split(":")[0].split(",")]
        kinds = list(dict.fromkeys(types[n] for n in shown if n in types))
        if title in ("Raises", "Warns"):
            head = ", ".join(self.code(n, module) for n in shown)
        elif title in ("Returns", "Yields"):
            head = self.code(names, module)
        else:
            head = ", ".join(f"`{n}`" for n in shown)
            same = len(kinds) == 1 and all(n in types for n in shown)
            head += f" : *{escape(kinds[0])}*" if same else ""
        lines = "\n\n".join(self.prose(p, module) for p in paragraphs(text))
        inner = "\n".join(f"  {line}" if line else "" for line in lines.splitlines())
        return f"{head}\n: {inner.strip()}"

    def prose(self, paragraph: str, module: Module) -> str:
        """Return a paragraph of a docstring as Markdown."""
        if ".. math::" in paragraph:
            before, formula = paragraph.split(".. math::", 1)
            body = "\n".join(line.strip() for line in formula.strip().splitlines())
            head = self.prose(before.strip(), module) + "\n\n" if before.strip() else ""
            return f"{head}$$\n{body}\n$$"
        paragraph = re.sub(r":math:`([^`]+)`", r"$\1$", paragraph)
        if paragraph.startswith("    ") or paragraph.startswith(">>>"):
            return f"```python\n{paragraph}\n```"
        pieces = re.split(r"(``[^`]+``|`[^`]+`|\$[^$]+\$)", paragraph)
        done = []
        for piece in pieces:
            if piece.startswith("`"):
                done.append(self.code(" ".join(piece.strip("`").split()), module))
            elif piece.startswith("$") and piece.endswith("$") and len(piece) > 2:
                done.append(piece)
            else:
                done.append(escape(piece))
        return (
            "".join(done).replace("::", ":")
            if paragraph.endswith("::")
            else "".join(done)
        )

    def code(self, text: str, module: Module) -> str:
        """Return a piece of code, linked if it is a public name."""
        scope = {m: m for m in self.package.modules if m} | {"scgenlib": ""}
        for name in [*module.definitions, *module.imports]:
            here = self.package.resolve(module.name, name)
            if here:
                scope[name] = here
        bare = text.removesuffix("()")
        if re.fullmatch(r"[A-Za-z_][\w.]*", bare):
            name = bare.removeprefix("scgenlib.")
            if name in self.package.modules and bare != name:
                return f"`{text}`"
            target = self.package.lookup(bare, scope)
            if target:
                return f"{{py:obj}}`{text} <scgenlib.{target}>`"
        return f"`{text}`"


def directive(
    kind: str, shown: str, entry: Entry, body: str, options: Iterable[str]
) -> str:
    """Return an object of the Python domain."""
    lines = [f"`````{{py:{kind}}} {shown}", f":module: scgenlib.{entry.owner}"]
    lines += [f":{option}:" for option in options]
    return "\n".join([*lines, "", body, "`````", ""])


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
    """Return `(arguments) -> result`, without `self`."""
    text = f"def f({ast.unparse(node.args)}): ..."
    copy = ast.parse(text).body[0]
    assert isinstance(copy, ast.FunctionDef)
    args = copy.args
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


def argument_types(node: ast.FunctionDef) -> dict[str, str]:
    """Return the type of each argument, as written, with its default."""
    args = node.args
    every = [*args.posonlyargs, *args.args, *args.kwonlyargs]
    found = [*every, *(a for a in (args.vararg, args.kwarg) if a)]
    return {a.arg: ast.unparse(a.annotation) for a in found if a.annotation}


def is_option(node: ast.AnnAssign) -> bool:
    """Return whether a field is declared by `option`."""
    return isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "option"


def numpydoc(doc: str) -> dict[str, str]:
    """Split a docstring at its underlined titles; what comes before has none."""
    found: dict[str, list[str]] = {"": []}
    title, lines = "", doc.splitlines()
    skip = False
    for number, line in enumerate(lines):
        if skip:
            skip = False
            continue
        below = lines[number + 1].strip() if number + 1 < len(lines) else ""
        if line and re.fullmatch(r"-{3,}", below) and len(below) == len(line.strip()):
            title, skip = line.strip(), True
            found[title] = []
            continue
        found[title].append(line)
    return {name: "\n".join(part).strip("\n") for name, part in found.items()}


def numpydoc_items(body: str) -> Iterator[tuple[str, str]]:
    """Yield (names, text) of a section whose items are not indented."""
    name, text = "", list[str]()
    for line in body.splitlines():
        if line and not line.startswith(" "):
            if name:
                yield name, dedent(text)
            name, text = line, []
        else:
            text.append(line)
    if name:
        yield name, dedent(text)


def dedent(lines: Sequence[str]) -> str:
    """Return lines without their common indentation, joined."""
    return "\n".join(line.removeprefix("    ") for line in lines).strip("\n")


def paragraphs(text: str) -> list[str]:
    """Return the paragraphs of a text; a formula stays with what announces it."""
    parts = [p for p in re.split(r"\n\s*\n", text) if p.strip()]
    done: list[str] = []
    for part in parts:
        if done and done[-1].rstrip().endswith(".. math::"):
            done[-1] += "\n" + part
        else:
            done.append(part)
    return done


def escape(text: str) -> str:
    """Return text that Markdown leaves as it is, but for *stressed words*."""
    parts = re.split(r"((?<![\w*])\*[\w-]+(?: [\w-]+)*\*(?![\w*]))", text)
    plain = (re.sub(r"([\\*_$<>\[\]{}#~|])", r"\\\1", part) for part in parts[::2])
    stressed = [*parts[1::2], ""]
    return "".join(a + b for a, b in zip(plain, stressed, strict=True))


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
