"""Execute, render and check the book; `make` calls it.

    python tools/book.py execute [NAME ...] [--force]
    python tools/book.py render
    python tools/book.py refresh [NAME ...] [--force]
    python tools/book.py strict

`execute` runs the notebooks of `_toc.yml` into `_build/executed/book`, each only
if something that it depends on has changed, and leaves `book/` alone. `render`
builds the pages from there. `refresh` writes the executed outputs back into
`book/`, where the tests compare them. `strict` builds the stored outputs from
nothing, with warnings as errors, and counts what came out.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import nbformat
import yaml

import apidocs
import generated_pages
import pages

HOME = ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "_build"
EXECUTED = BUILD / "executed"
#: Beside the notebooks, what a page may read. Anything else stays out of the build.
SOURCES = ("*.md", "*.bib", "api", "figures", "ledger", "results", "teach")
#: Beside a strict build: the hash of what it was made from.
STAMP = "made_from.sha256"
IMAGES = ("image/png", "image/svg+xml", "image/jpeg")
CELL_TIMEOUT = 1800  # seconds; a laptop may be slow, a hang must end

# Asked of the kernel after the last cell: what the run took.
PROBE = """
import json as _json, sys as _sys
from scgenlib.records import asked as _asked
from scgenlib.records import peak_memory_mb as _peak, versions as _versions
_torch = _sys.modules.get("torch")
_cuda = bool(_torch and _torch.cuda.is_available()
             and _torch.cuda.max_memory_allocated())
print(_json.dumps({"memory_mb": round(_peak()), "versions": _versions(),
                   "device": "cuda" if _cuda else "cpu", "records": _asked()}))
"""


class BookError(Exception):
    """What `main` prints as one line before it exits with 1."""


# --- the table of contents ------------------------------------------------------


def documents() -> list[str]:
    """Return the pages of `_toc.yml`, in order, without their endings."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())

    def walk(node: Any) -> list[str]:
        if isinstance(node, list):
            return [name for item in node for name in walk(item)]
        names = [node[key] for key in ("root", "file") if key in node]
        for key in ("parts", "chapters", "sections"):
            names += walk(node.get(key, []))
        return names

    return walk(toc)


def notebooks() -> list[Path]:
    """Return the notebooks of `_toc.yml`; raise if a page does not exist."""
    missing = [
        name
        for name in documents()
        if not any((ROOT / f"{name}{end}").is_file() for end in (".md", ".ipynb"))
    ]
    if missing:
        raise BookError(f"_toc.yml names pages that do not exist: {', '.join(missing)}")
    paths = [ROOT / f"{name}.ipynb" for name in documents()]
    return [path for path in paths if path.is_file()]


def chosen(names: list[str]) -> list[Path]:
    """Return the notebooks called `names`, or all of them."""
    paths = notebooks()
    wrong = sorted(set(names) - {path.stem for path in paths})
    if wrong:
        allowed = ", ".join(path.stem for path in paths)
        raise BookError(f"unknown chapter {wrong[0]!r}; allowed: {allowed}")
    return [path for path in paths if not names or path.stem in names]


# --- execute --------------------------------------------------------------------


def inputs_hash(path: Path) -> str:
    """Return a hash of what a notebook's outputs depend on, but for the records.

    Of the records only those count that the notebook asks for: see `shows_records`.
    """
    digest = hashlib.sha256()
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            digest.update(f"{cell.source}\n\0".encode())
    files = [
        *(ROOT / "scgenlib").rglob("*.py"),
        *(ROOT / "data_manifests").glob("*"),
        *(ROOT / "book" / "weights").glob("*"),
        ROOT / "requirements.lock",
    ]
    for file in sorted(f for f in files if f.is_file()):
        digest.update(f"{file.relative_to(ROOT)}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def shows_records(about: dict[str, Any]) -> bool:
    """Return whether outputs with this metadata show the records as they are now."""
    from scgenlib.records import fingerprint

    folder = ROOT / "book" / "results"
    seen = about.get("records", {"": ""})
    return all(fingerprint(name, folder) == then for name, then in seen.items())


def is_current(path: Path, target: Path) -> bool:
    """Return whether `target` holds the outputs of `path` as it is now."""
    if not target.is_file():
        return False
    about = nbformat.read(target, as_version=4).metadata.get("scgenlib", {})
    return about.get("inputs_hash") == inputs_hash(path) and shows_records(about)


def stale() -> list[str]:
    """Return the notebooks whose stored outputs `refresh` would make anew."""
    out = []
    for path in notebooks():
        about = nbformat.read(path, as_version=4).metadata.get("scgenlib", {})
        if about.get("code_hash") != code_hash(path) or not shows_records(about):
            out.append(path.stem)
    return out


def execute(names: list[str], force: bool = False) -> None:
    """Run every notebook that changed, one after another; raise if any failed."""
    paths = chosen(names)
    failed = []
    began = time.perf_counter()
    for number, path in enumerate(paths, 1):
        target = EXECUTED / "book" / path.name
        head = f"[{number}/{len(paths)}] {path.stem}"
        if not force and is_current(path, target):
            print(f"{head}: unchanged", flush=True)
            continue
        # A failed run must not leave the page of an earlier one to be rendered.
        target.unlink(missing_ok=True)
        try:
            run_notebook(path, target, head)
        except BookError as error:
            print(f"{head}: FAILED\n{error}", file=sys.stderr, flush=True)
            failed.append(path.stem)
    if failed:
        raise BookError(f"{len(failed)} of {len(paths)} failed: {', '.join(failed)}")
    print(f"executed in {time.perf_counter() - began:.0f} s: {EXECUTED}", flush=True)


def run_notebook(path: Path, target: Path, head: str) -> None:
    """Execute `path` cell by cell and write the cleaned result to `target`."""
    from nbclient import NotebookClient
    from nbclient.exceptions import (
        CellExecutionError,
        CellTimeoutError,
        DeadKernelError,
    )

    failures = (CellExecutionError, CellTimeoutError, DeadKernelError)
    hashed = inputs_hash(path)
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    target.parent.mkdir(parents=True, exist_ok=True)
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=CELL_TIMEOUT,
        record_timing=False,
        resources={"metadata": {"path": str(target.parent)}},
    )
    began = time.perf_counter()
    probe = nbformat.v4.new_code_cell(PROBE)
    notebook.cells.append(probe)
    # A kernel chooses the backend that stores its figures, unless it is told another.
    env = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    with client.setup_kernel(env=env):
        for number, cell in enumerate(code, 1):
            show_progress(f"{head}: cell {number}/{len(code)}")
            try:
                client.execute_cell(cell, notebook.cells.index(cell))
            except failures as error:
                where = f"cell {number} of {len(code)}:\n{cell.source}\n"
                raise BookError(f"{where}\n{plain(str(error))}") from None
        seconds = time.perf_counter() - began
        client.execute_cell(probe, len(notebook.cells) - 1)
    notebook.cells.pop()
    show_progress("")
    measured = json.loads("".join(o.text for o in probe.outputs if o.name == "stdout"))
    noise = tidy(notebook)
    notebook.metadata["scgenlib"] = {
        "inputs_hash": hashed,
        "code_hash": code_hash(path),
        "date": datetime.date.today().isoformat(),
        "seconds": round(seconds),
        **measured,
    }
    write_notebook(notebook, target)
    print(f"{head}: {seconds:.0f} s, {measured['memory_mb']} MB", flush=True)
    for number, text in noise:
        print(f"  cell {number} wrote to stderr: {text[:200]}", flush=True)


def code_hash(path: Path) -> str:
    """Return the hash by which tests know whether stored outputs are up to date."""
    from scgenlib import records

    return records.notebook_hash(path)


def show_progress(text: str) -> None:
    """Overwrite one line on a terminal; say nothing in a log."""
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="", flush=True)


def plain(text: str) -> str:
    """Return `text` without terminal colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def tidy(notebook: nbformat.NotebookNode) -> list[tuple[int, str]]:
    """Make stored notebooks comparable in place; return what went to stderr.

    Cell ids follow from the content, so that they neither change with a run nor
    when a notebook is written again from another format. Execution counts are
    1..n, and only metadata that a page or a test reads is kept.
    """
    noise: list[tuple[int, str]] = []
    used: dict[str, int] = {}
    count = 0
    for cell in notebook.cells:
        name = hashlib.sha256(f"{cell.cell_type}{cell.source}".encode()).hexdigest()[:8]
        used[name] = used.get(name, 0) + 1
        cell.id = name if used[name] == 1 else f"{name}-{used[name]}"
        kept = ("tags", "minutes", "mystnb", "slideshow")
        cell.metadata = nbformat.from_dict(
            {key: cell.metadata[key] for key in kept if key in cell.metadata}
        )
        if cell.cell_type != "code":
            continue
        count += bool(cell.source.strip())
        cell.execution_count = count if cell.source.strip() else None
        clean = []
        for output in cell.outputs:
            if output.output_type == "stream" and output.name == "stderr":
                noise.append((count, output.text.strip()))
                continue
            if output.output_type == "execute_result":
                output.execution_count = count
            clean.append(output)
        cell.outputs = merge_streams(clean)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {
                "display_name": "Python 3 (ipykernel)",
                "language": "python",
                "name": "python3",
            },
            "language_info": {"name": "python", "file_extension": ".py"},
        }
    )
    return noise


def merge_streams(outputs: list[Any]) -> list[Any]:
    """Join neighbouring pieces of stdout: where they break is chance."""
    merged: list[Any] = []
    for output in outputs:
        last = merged[-1] if merged else None
        if last and output.output_type == "stream" == last.output_type:
            last.text += output.text
        else:
            merged.append(output)
    return merged


def write_notebook(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write a notebook whole or not at all."""
    nbformat.validate(notebook)
    part = path.with_name(f".{path.name}.part")
    text = nbformat.writes(notebook)
    part.write_text(text if text.endswith("\n") else text + "\n", encoding="utf-8")
    os.replace(part, path)


def refresh(names: list[str], force: bool = False) -> None:
    """Execute, then replace the outputs stored in `book/`."""
    paths = chosen(names)
    execute(names, force)
    for path in paths:
        notebook = nbformat.read(EXECUTED / "book" / path.name, as_version=4)
        # The text around the code may be newer than the run.
        fresh = nbformat.read(path, as_version=4)
        done = iter([cell for cell in notebook.cells if cell.cell_type == "code"])
        for cell in fresh.cells:
            if cell.cell_type == "code":
                ran = next(done)
                cell.outputs, cell.execution_count = ran.outputs, ran.execution_count
        tidy(fresh)
        about = dict(notebook.metadata["scgenlib"])
        del about["inputs_hash"]
        fresh.metadata["scgenlib"] = {**about, "code_hash": code_hash(path)}
        write_notebook(fresh, path)
        print(f"refreshed {path.relative_to(ROOT)}")


# --- render ---------------------------------------------------------------------


def assemble(tree: Path, executed: bool) -> None:
    """Lay out in `tree` what jupyter-book reads.

    Parameters
    ----------
    tree
        The folder to fill; what no longer belongs there is removed.
    executed
        Whether the notebooks in `tree` are already there, from `execute`; the
        text around their code is renewed. Otherwise the stored ones are copied.
    """
    paths = notebooks()
    book = tree / "book"
    book.mkdir(parents=True, exist_ok=True)
    keep = {path.name for path in paths} if executed else set()
    for old in book.iterdir():
        if old.name not in keep:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    for pattern in SOURCES:
        for source in sorted((ROOT / "book").glob(pattern)):
            copy(source, book / source.name)
    for path in paths:
        if executed:
            renew_text(path, book / path.name)
        else:
            copy(path, book / path.name)
    for name in ("_toc.yml", "_static"):
        copy(ROOT / name, tree / name)
    copy(mathjax(), tree / "vendor" / "mathjax" / "tex-svg.js")
    configure(tree / "_config.yml")
    staged = [book / path.name for path in paths]
    pages.label_all(staged)
    # The functions of a page are read from the package beside this file.
    reference = apidocs.Reference(HOME, book, staged)
    for name, text in generated_pages.pages(ROOT, staged, reference):
        page = book / name
        marker = f"% generated: {name.removesuffix('.md').replace('/', '-')}\n"
        if marker not in page.read_text():
            raise BookError(f"book/{name} has no line {marker.strip()!r}")
        page.write_text(page.read_text().replace(marker, text))
    pages.decorate(ROOT, tree, staged, reference)


def configure(target: Path) -> None:
    """Write the configuration of the build, with or without a public address."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    address = os.environ.get("BOOK_PUBLIC_URL", config.get("public_url") or "")
    try:
        config = pages.switch_on(config, address)
    except ValueError as error:
        raise BookError(str(error)) from None
    target.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def copy(source: Path, target: Path) -> None:
    """Copy a file or a folder, keeping its times so that builds stay incremental."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
    elif source.is_file():
        shutil.copy2(source, target)


def renew_text(path: Path, target: Path) -> None:
    """Give an executed notebook the present text, tags and alternative texts."""
    if not target.is_file():
        raise BookError(f"{path.stem} was not executed; run `make book`")
    ran = nbformat.read(target, as_version=4)
    outputs = [
        (cell.source, cell.outputs, cell.execution_count)
        for cell in ran.cells
        if cell.cell_type == "code"
    ]
    fresh = nbformat.read(path, as_version=4)
    code = [cell for cell in fresh.cells if cell.cell_type == "code"]
    if [cell.source for cell in code] != [source for source, _, _ in outputs]:
        raise BookError(f"{path.stem} changed since it was executed; run `make book`")
    for cell, (_, out, count) in zip(code, outputs, strict=True):
        cell.outputs, cell.execution_count = out, count
    tidy(fresh)
    fresh.metadata["scgenlib"] = ran.metadata["scgenlib"]
    write_notebook(fresh, target)


def mathjax() -> Path:
    """Return the one file that draws formulas without the network.

    It comes from a package of the lock, so that it is neither committed here nor
    fetched when a page is looked at. It must not lie below `_static`, where
    jupyter-book would load every script twice.
    """
    import importlib.metadata

    target = ROOT / "vendor" / "mathjax" / "tex-svg.js"
    dist = importlib.metadata.distribution("sphinx-mathjax-offline")
    for file in dist.files or []:
        if file.name == "tex-svg.js":
            copy(Path(str(dist.locate_file(file))), target)
            return target
    raise BookError("sphinx-mathjax-offline holds no tex-svg.js; run `make lock`?")


def jupyter_book(tree: Path, output: Path, *options: str) -> None:
    """Run jupyter-book on `tree`; raise if it fails."""
    program = Path(sys.executable).with_name("jupyter-book")
    command = [str(program), "build", str(tree)]
    command += ["--path-output", str(output), *options]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_COLOR": "1"})
    if done.returncode:
        raise BookError(f"jupyter-book failed with status {done.returncode}")


def render() -> None:
    """Build the pages of the executed notebooks into `_build/html`."""
    assemble(EXECUTED, executed=True)
    jupyter_book(EXECUTED, ROOT, "--quiet", "--all")
    finish(EXECUTED, BUILD / "html")
    check_pages(EXECUTED, BUILD / "html")
    print(f"\nThe book: {(BUILD / 'html' / 'index.html').as_uri()}")
    print("or `make serve`, then http://localhost:8000")


def strict() -> None:
    """Build the stored outputs from nothing; any warning or gap is a failure."""
    work = BUILD / "strict"
    shutil.rmtree(work, ignore_errors=True)
    assemble(work / "source", executed=False)
    jupyter_book(work / "source", work, "--all", "-W", "--keep-going")
    site = work / "_build" / "html"
    finish(work / "source", site)
    check_pages(work / "source", site)
    (work / STAMP).write_text(f"{site_hash()}\n")


def site_hash() -> str:
    """Return a hash of all files that the pages are made from."""
    digest = hashlib.sha256()
    files = [ROOT / name for name in ("_config.yml", "_toc.yml", "CITATION.cff")]
    for folder in ("book", "_static", "scgenlib", "tools", "data_manifests"):
        files += [f for f in (ROOT / folder).rglob("*") if "__pycache__" not in f.parts]
    for file in sorted(f for f in files if f.is_file()):
        digest.update(f"{file.relative_to(ROOT)}\0".encode())
        digest.update(file.read_bytes())
    digest.update(os.environ.get("BOOK_PUBLIC_URL", "").encode())
    return digest.hexdigest()


def is_built(site: Path) -> bool:
    """Return whether `strict` has built these very files."""
    stamp = site.parent.parent / STAMP
    return stamp.is_file() and stamp.read_text().strip() == site_hash()


def finish(tree: Path, site: Path) -> None:
    """Make the site lighter, and its downloads what their authors wrote."""
    for path in notebooks():
        # What was added for the page does not belong into a reader's notebook; what
        # was executed does.
        notebook = nbformat.read(path, as_version=4)
        ran = nbformat.read(tree / "book" / path.name, as_version=4)
        outputs = iter([cell for cell in ran.cells if cell.cell_type == "code"])
        for cell in notebook.cells:
            if cell.cell_type == "code":
                done = next(outputs)
                cell.outputs = done.outputs
                cell.execution_count = done.execution_count
        write_notebook(notebook, site / "_sources" / "book" / path.name)
    pages.slim(site)


# --- check ----------------------------------------------------------------------


def check_pages(tree: Path, site: Path) -> None:
    """Compare the pages with `_toc.yml` and the notebooks; raise on any gap."""
    problems: list[str] = []
    total = {"pages": 0, "code cells with output": 0, "images": 0}
    for name in documents():
        page = site / f"{name}.html"
        if not page.is_file():
            problems.append(f"{name}: no page")
            continue
        total["pages"] += 1
        text = page.read_text(encoding="utf-8")
        ids = Counter(re.findall(r'\bid="([^"]+)"', text))
        # A link to such a place ends at the first of them.
        twice = ", ".join(one for one, count in ids.items() if count > 1)
        if twice:
            problems.append(f"{name}: ids that stand more than once: {twice}")
        source = tree / f"{name}.ipynb"
        if not source.is_file():
            continue
        want = expected(source)
        have = {
            "code cells with output": len(re.findall(r'class="cell_output ', text)),
            "images": len(re.findall(r"<img\b[^>]*_images/[0-9a-f]{40,}", text)),
        }
        for key, count in want.items():
            total[key] += have[key]
            if have[key] != count:
                problems.append(f"{name}: {have[key]} {key}, the notebook has {count}")
            if count == 0 and key != "images":
                problems.append(f"{name}: the notebook has no {key}")
        problems += unlabelled(name, text)
    problems += [f"no {key} at all" for key, count in total.items() if count == 0]
    index = site / "searchindex.js"
    if not index.is_file() or index.stat().st_size < 1000:
        problems.append("the search index is missing or empty")
    print("checked: " + ", ".join(f"{count} {key}" for key, count in total.items()))
    if problems:
        raise BookError("the built pages have gaps:\n  " + "\n  ".join(problems))


def expected(path: Path) -> dict[str, int]:
    """Return how many outputs and images a notebook's page must show."""
    outputs = images = 0
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type != "code":
            continue
        outputs += bool(cell.outputs)
        images += sum(
            any(kind in output.get("data", {}) for kind in IMAGES)
            for output in cell.outputs
        )
    return {"code cells with output": outputs, "images": images}


def unlabelled(name: str, text: str) -> list[str]:
    """Return a line for each image of a page without a description."""
    article = text.split("<article", 1)[-1].split("</article>", 1)[0]
    found = []
    for tag in re.findall(r"<img\b[^>]*>", article):
        alt = html.unescape(next(iter(re.findall(r'\balt="([^"]*)"', tag)), ""))
        if not alt.strip() or re.search(r"\.(png|svg|jpe?g)$", alt):
            found.append(f"{name}: an image without a description: {tag[:90]}")
    return found


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("execute", "refresh"):
        one = commands.add_parser(name)
        one.add_argument("names", nargs="*", help="chapters; all by default")
        one.add_argument("--force", action="store_true", help="run unchanged ones too")
    commands.add_parser("stale", help="chapters whose stored outputs are out of date")
    commands.add_parser("render")
    commands.add_parser("strict")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")
    try:
        if arguments.command == "execute":
            execute(arguments.names, arguments.force)
        elif arguments.command == "refresh":
            refresh(arguments.names, arguments.force)
        elif arguments.command == "stale":
            print(" ".join(stale()))
        elif arguments.command == "render":
            render()
        else:
            strict()
    except BookError as error:
        print(f"book: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
