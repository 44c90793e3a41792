"""What is added to the pages of the book when its build is laid out.

The notebooks and texts in `book/` stay as their authors wrote them. In the copy that
jupyter-book reads, `decorate` gives every heading a label, links the first use of each
glossary term to its entry, and ends each notebook's page with its download link, how
to cite it, its run card and the functions it uses. `switch_on` adds what needs a
public address, if there is one.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
import yaml

import apidocs
import apinames

# --- labels ------------------------------------------------------------------------


def slug(text: str) -> str:
    """Return a text as part of a label."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def add_labels(notebook: Any, page: str) -> None:
    """Give each heading of a notebook a label, so that other pages can name it."""
    used: set[str] = set()
    for cell in notebook.cells:
        if cell.cell_type != "markdown":
            continue
        lines = cell.source.splitlines()
        for number, _, title, label in reversed(list(apinames.headings(cell.source))):
            if label:
                continue
            name = base = f"at-{page}-{slug(title)}"
            while name in used:
                name = f"{base}-{len(used)}"
            used.add(name)
            lines.insert(number, f"({name})=")
            if number and lines[number - 1].strip():
                lines.insert(number, "")
        cell.source = "\n".join(lines)


# --- glossary ----------------------------------------------------------------------

#: Other forms under which a term is met: form -> entry of the glossary.
ALSO = {
    "VAE": "variational auto-encoder",
    "PCA": "principal components",
    "WGAN-GP": "Wasserstein GAN",
    "kNN graph": "k-nearest-neighbour graph",
    "nearest-neighbour graph": "k-nearest-neighbour graph",
    "latent vector": "latent space",
    "two-sample test": "two-sample test by classifier",
    "Poisson": "Poisson distribution",
}

#: Words that mean something else elsewhere: entry -> pages where they are the term.
ONLY = {
    "atlas": ("scatlasvae", "scale"),
    "batch": ("scatlasvae",),
    "calibration": ("evaluation", "garage", "cscgan", "scatlasvae"),
    "claim": ("how_to_read",),
    "condition": ("regina",),
    "coverage": ("evaluation", "garage", "cscgan"),
    "density": ("evaluation",),
    "embedding": ("scatlasvae", "scgacl", "regina"),
    "generator": ("machines", "cscgan", "garage", "scgacl"),
    "head": ("machines",),
    "integration": ("scatlasvae", "evaluation"),
    "landmark": ("machines",),
    "profile": ("how_to_read", "setup"),
    "prompt": ("regina",),
    "query": ("scatlasvae",),
    "rank": ("scale",),
    "rejection": ("scatlasvae",),
    "responsibility": ("scgacl", "machines"),
    "spread": ("evaluation",),
    "target": ("regina",),
    "temperature": ("machines", "scgacl"),
    "token": ("regina",),
    "train mean": ("regina",),
    "transition": ("regina",),
    "vocabulary": ("scatlasvae",),
}

#: Two meanings in one word: the entry is chosen by the authors, never by a rule.
NEVER = re.compile(r"\(")

#: Pages that are lists, or the glossary itself.
UNLINKED = ("glossary", "references", "status", "datasets", "notation", "index")

#: Directives whose content is prose.
PROSE = {"admonition", "margin", "note", "tip", "important", "warning", "seealso",
         "div", "card", "grid", "grid-item-card", "tab-item", "tab-set", "aside",
         "dropdown", "hint", "attention", "sidebar"}  # fmt: skip

# What a link must not be put into, in the order in which it is looked for.
_MASKED = re.compile(
    r"""\$\$.*?\$\$                      # displayed math
    | (?<![\\$])\$(?!\s)[^$]+?\$         # math in a line
    | \{[\w:-]+\}`[^`]*`                 # roles
    | (`+)(?!`).*?(?<!`)\1(?!`)          # code
    | !?\[[^\]]*\](?:\([^)]*\)|\{[^}]*\}|\[[^\]]*\])   # links, spans, attributes
    | <[^>\n]+>                          # HTML
    | https?://\S+
    | ^\s*\#.*?$                         # headings
    | ^\s*\|.*?$                         # tables
    | ^\([\w-]+\)=$                      # labels
    | ^:[\w-]+:.*?$                      # options of a directive
    | ^%.*?$                             # comments
    """,
    re.VERBOSE | re.MULTILINE | re.DOTALL,
)


def glossary_terms(text: str) -> list[str]:
    """Return the entries of the glossary page."""
    inner = text.split("```{glossary}\n")[1].split("\n```")[0]
    return re.findall(r"^(\S.*)$", inner, re.MULTILINE)


def term_pattern(forms: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that finds any of the forms, the longest first."""
    parts = []
    for form in sorted(forms, key=len, reverse=True):
        words = r"\s+".join(re.escape(word) for word in form.split())
        # A name keeps its capitals; another word may begin a sentence.
        if form == form.lower():
            words = f"(?i:{words})"
        parts.append(words + ("" if form.endswith("s") else "s?"))
    return re.compile(rf"(?<![\w-])({'|'.join(parts)})(?![\w-])")


class Linker:
    """Link the first use of each term on one page to the glossary."""

    def __init__(self, terms: Sequence[str], page: str) -> None:
        name = page.rsplit("/", 1)[-1]
        fit = [t for t in terms if not NEVER.search(t)]
        fit = [t for t in fit if t not in ONLY or name in ONLY[t]]
        self.entry = {t: t for t in fit}
        self.entry |= {form: t for form, t in ALSO.items() if t in fit}
        lower = {form.lower(): t for form, t in self.entry.items()}
        self.lower = lower
        self.pattern = term_pattern(self.entry)
        self.seen: set[str] = set()

    def link(self, source: str) -> str:
        """Return Markdown with links at the first uses that were not yet seen."""
        return "".join(
            self._prose(text) if is_prose else text for is_prose, text in blocks(source)
        )

    def _prose(self, text: str) -> str:
        done, position = [], 0
        for masked in _MASKED.finditer(text):
            done.append(self.pattern.sub(self._term, text[position : masked.start()]))
            for term in re.findall(r"\{term\}`(?:[^`<]*<)?([^`>]+)>?`", masked[0]):
                self.seen.add(" ".join(term.split()))
            done.append(masked[0])
            position = masked.end()
        done.append(self.pattern.sub(self._term, text[position:]))
        return "".join(done)

    def _term(self, match: re.Match[str]) -> str:
        shown = " ".join(match[1].split())
        single = shown if shown.lower() in self.lower else shown[:-1]
        entry = self.lower.get(single.lower())
        if entry is None or entry in self.seen:
            return match[0]
        self.seen.add(entry)
        return (
            f"{{term}}`{shown}`" if shown == entry else f"{{term}}`{shown} <{entry}>`"
        )


def blocks(source: str) -> list[tuple[bool, str]]:
    """Split Markdown into (is prose, text): code, options and HTML are not prose."""
    found: list[tuple[bool, list[str]]] = [(True, [])]
    open_fences: list[tuple[str, bool]] = []
    for line in source.splitlines(keepends=True):
        inside_code = bool(open_fences) and not open_fences[-1][1]
        mark = re.match(r"\s*(`{3,}|~{3,}|:{3,})\s*(\{[\w:-]+\})?", line)
        prose = not inside_code
        if open_fences and mark and not mark[2]:
            fence = open_fences[-1][0]
            if line.strip() == mark[1] and mark[1].startswith(fence):
                open_fences.pop()
                mark, prose = None, False
        if mark and not inside_code:
            name = (mark[2] or "").strip("{}")
            open_fences.append((mark[1], name in PROSE))
            prose = False
        if found[-1][0] != prose:
            found.append((prose, []))
        found[-1][1].append(line)
    return [(prose, "".join(lines)) for prose, lines in found]


# --- the end of a page ------------------------------------------------------------


def card(root: Path, page: str, notebook: Any, reference: apidocs.Reference) -> str:
    """Return the Markdown that ends a notebook's page."""
    about = notebook.metadata.get("scgenlib", {})
    at_hand = reference.documents
    rows = [
        ("Download", download(page, "setup" in at_hand)),
        ("How to cite", citation(root, notebook)),
        ("Run card", run_card(about)),
        ("Last verified", verified(root, page, about, "status" in at_hand)),
    ]
    functions = apidocs.used_on(page, reference) if reference.has_pages else []
    text = f"(about-{page})=\n## About this page\n\n"
    text += "".join(f"**{name}**\n: {value}\n\n" for name, value in rows)
    if functions:
        listed = "\n".join(functions)
        text += f"````{{dropdown}} Functions used on this page\n{listed}\n````\n"
    return text


def download(page: str, setup: bool) -> str:
    """Return the link to the notebook as its authors wrote it."""
    return (
        f'<a href="../_sources/book/{page}.ipynb" download>{page}.ipynb</a>, '
        "the notebook with the outputs of this page."
        + " {doc}`Setting up </book/setup>` says how to run it."
        * setup
    )


def citation(root: Path, notebook: Any) -> str:
    """Return how to cite the page, and the method if it names one at its head."""
    path = root / "CITATION.cff"
    about = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    first = notebook.cells[0].source if notebook.cells else ""
    title = next((title for _, _, title, _ in apinames.headings(first)), "")
    authors = ", ".join(a.get("name", "") for a in about.get("authors", []))
    end = "" if title.endswith(("?", "!", ".")) else "."
    text = f"{authors}: *{title}{end}* In: {about.get('title', 'this book')}"
    text += f", version {about['version']}." if "version" in about else "."
    cited = re.findall(r"\{cite:[pt]\}`([^`,]+)", first)
    if cited:
        keys = ",".join(dict.fromkeys(cited))
        text += f" Cite the method too: {{cite:t}}`{keys}`."
    return text


def run_card(about: Mapping[str, Any]) -> str:
    """Return in one line what made the outputs of the page."""
    if "seconds" not in about:
        return "the outputs of this page carry no record of their making."
    versions = about.get("versions", {})
    used = ", ".join(f"{k} {versions[k]}" for k in ("scgenlib", "torch", "python")
                     if k in versions)  # fmt: skip
    memory = about.get("memory_mb")
    parts = [
        f"executed on {about.get('date', '?')}",
        f"{about['seconds']:.0f} s",
        f"{memory:,.0f} MB" if memory is not None else "",
        str(about.get("device", "")),
        used,
        f"code {about['code_hash'][:12]}" if "code_hash" in about else "",
    ]
    return ", ".join(part for part in parts if part) + "."


def verified(root: Path, page: str, about: Mapping[str, Any], status: bool) -> str:
    """Return when the page was last run, and on how many data sets."""
    path = root / "book" / "status.json"
    runs = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    runs = [run for run in runs if run["chapter"] == page]
    date = max([r["date"] for r in runs] + [about.get("date", "")])
    if not date:
        return "not run yet."
    if not runs:
        return f"{date}, with the data that this page shows."
    passed = sum(bool(run["ok"]) for run in runs)
    return (
        f"{date}. It ran to its end on {passed} of {len(runs)} data sets."
        + " {doc}`What was run where </book/status>` lists them." * status
    )


# --- all of it ---------------------------------------------------------------------


def label_all(paths: Iterable[Path]) -> None:
    """Give the headings of the copied notebooks their labels."""
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        add_labels(notebook, path.stem)
        path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


def decorate(
    root: Path, tree: Path, paths: Sequence[Path], reference: apidocs.Reference
) -> None:
    """Link terms and end the notebooks' pages, in the copy that is built.

    Parameters
    ----------
    root
        The root of the repository.
    tree
        The copy: a folder that holds `book`.
    paths
        Its notebooks.
    reference
        Where they use which function.
    """
    book = tree / "book"
    glossary = book / "glossary.md"
    terms = glossary_terms(glossary.read_text()) if glossary.is_file() else []
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        linker = Linker(terms, path.stem) if terms else None
        for cell in notebook.cells:
            if cell.cell_type == "markdown" and linker:
                cell.source = linker.link(cell.source)
        text = card(root, path.stem, notebook, reference)
        last = nbformat.v4.new_markdown_cell(text, metadata={"tags": ["shelf"]})
        last.id = f"about-{path.stem}"[:64]
        notebook.cells.append(last)
        path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    if not terms:
        return
    for page in sorted(book.rglob("*.md")):
        name = page.relative_to(book).with_suffix("").as_posix()
        if name in UNLINKED or name.startswith("api/"):
            continue
        page.write_text(Linker(terms, name).link(page.read_text()))


# --- a public address -------------------------------------------------------------


def switch_on(config: dict[str, Any], address: str) -> dict[str, Any]:
    """Return the configuration of jupyter-book for a public address, or for none.

    Parameters
    ----------
    config
        What `_config.yml` holds. Its key `public_url` is ours and is taken out.
    address
        The address of the public repository; empty: launch buttons and issue links
        are left out.

    Raises
    ------
    ValueError
        The address is not that of a repository.
    """
    config = {k: v for k, v in config.items() if k != "public_url"}
    address = address.strip().rstrip("/")
    if not address:
        return config
    if not re.fullmatch(r"https://[\w.-]+/[\w.-]+/[\w.-]+", address):
        raise ValueError(
            f"public_url: {address!r} is not the address of a repository; "
            "write https://HOST/OWNER/NAME, or leave it empty"
        )
    html = dict(config.get("html", {}))
    html |= {"use_repository_button": True, "use_issues_button": True}
    config |= {"html": html, "repository": {"url": address, "branch": "main"}}
    # The launchers know this host only.
    if address.startswith("https://github.com/"):
        config["launch_buttons"] = {
            "notebook_interface": "jupyterlab",
            "binderhub_url": "https://mybinder.org",
            "colab_url": "https://colab.research.google.com",
        }
    return config


# --- the site ----------------------------------------------------------------------

#: What the theme brings and no page of this book loads.
UNUSED = (
    "_static/locales",
    "_static/**/*.map",
    "_static/sphinx-thebe.*",
    # The icons a second time, as a script; the style sheet has them as a font.
    "_static/scripts/fontawesome.js",
    "_static/vendor/**/*.woff",
    "_static/vendor/**/*.ttf",
    "_static/vendor/**/*.eot",
)


#: Live kernels, which need a server and load from elsewhere; and the icons' script.
_UNUSED_TAGS = re.compile(
    r"""<script>[^<]*THEBE_JS_URL[^<]*</script>
    | <script[^>]*(?:sphinx-thebe|fontawesome)[^>]*></script>
    | <link[^>]*fontawesome[^>]*>
    | <link[^>]*sphinx-thebe[^>]*>
    | <script\ type="text/x-thebe-config">.*?</script>
    | <script>kernelName\ =[^<]*</script>""",
    re.VERBOSE | re.DOTALL,
)


_IMAGE = re.compile(r"""<img\b[^>]*\bsrc="((?:\.\./)*_images/[^"]+)"[^>]*>""")


# The extension for exercises gives each of a page the same id.
_REPEATED_ID = re.compile(r' id="(?:exercise|solution)-content"')


def link_images(text: str) -> str:
    """Link each picture of a page to its file, which may be larger than the column."""

    def linked(match: re.Match[str]) -> str:
        before = text[: match.start()].rstrip()
        if re.search(r"<a\b[^>]*>$", before):
            return match[0]
        return f'<a class="whole-picture" href="{match[1]}">{match[0]}</a>'

    return _IMAGE.sub(linked, text)


def slim(site: Path) -> None:
    """Remove what no page loads, or loads from elsewhere; link pictures to files."""
    for pattern in UNUSED:
        for path in sorted(site.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in (site / "_static").rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        # Every browser of the last ten years takes the first form, woff2.
        lean = re.sub(
            r",\s*url\([^)]*\.(?:ttf|woff|eot)[^)]*\)\s*format\([^)]*\)", "", text
        )
        lean = re.sub(r"/\*# sourceMappingURL=[^*]*\*/", "", lean)
        if lean != text:
            path.write_text(lean, encoding="utf-8")
    options = site / "_static" / "documentation_options.js"
    if options.is_file():
        # A browser lets no page read another from a folder: search without excerpts.
        text = options.read_text(encoding="utf-8")
        shown = 'SHOW_SEARCH_SUMMARY: location.protocol !== "file:"'
        options.write_text(text.replace("SHOW_SEARCH_SUMMARY: true", shown))
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        lean = link_images(_REPEATED_ID.sub("", _UNUSED_TAGS.sub("", text)))
        if lean != text:
            path.write_text(lean, encoding="utf-8")
