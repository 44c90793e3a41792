"""The `scgenlib` command: run a chapter, look after data sets, generate cells.

Heavy packages are imported by the command that needs them, so that `--help` and
a misspelt name answer at once.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import inspect
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import scgenlib
from scgenlib.errors import (
    ConfigError,
    ModelFileError,
    OutputError,
    ScgenError,
    message,
    unknown,
)
from scgenlib.files import atomic

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Parameters
    ----------
    argv
        The arguments without the program's name; those of the process by default.

    Returns
    -------
    int
        0 on success, 1 when a chapter or a check failed, 2 for a mistake in what
        was asked (one line on stderr says which), 130 when interrupted.
    """
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.command(arguments))
    except ScgenError as error:
        print(f"scgenlib: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("scgenlib: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe, such as `head`, has gone; that is no failure.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scgenlib",
        description="Deep generative methods for single-cell RNA-seq.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action="version", version=f"scgenlib {scgenlib.__version__}"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="execute a chapter of the book")
    run.add_argument("chapter", help="its name, such as garage")
    run.add_argument(
        "-p",
        "--parameter",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        dest="parameters",
        help="a parameter of the chapter; may be given again",
    )
    run.add_argument(
        "-o",
        "--output",
        type=Path,
        help="where the executed notebook goes "
        "(default: runs/<chapter>-<dataset>-<time>.ipynb)",
    )
    run.add_argument("--book", type=Path, help="folder that holds the chapters")
    run.set_defaults(command=_run)

    data = commands.add_parser("datasets", help="list, show, fetch, verify data sets")
    verbs = data.add_subparsers(required=True, metavar="ACTION")
    every = verbs.add_parser("list", help="all data sets")
    every.add_argument("--long", action="store_true", help="with titles and licences")
    every.set_defaults(command=_data_list)
    for verb, command, text in (
        ("card", _data_card, "what is known about one"),
        ("fetch", _data_fetch, "download one and check it"),
        ("verify", _data_verify, "check the files at hand against the manifest"),
    ):
        one = verbs.add_parser(verb, help=text)
        one.add_argument("name")
        one.set_defaults(command=command)

    make = commands.add_parser("generate", help="draw cells from a saved model")
    make.add_argument("--model", type=Path, required=True, help="folder of the model")
    make.add_argument(
        "--cells",
        nargs="+",
        action="extend",
        required=True,
        metavar="N | TYPE=N",
        help="how many cells: in all, of each type in order, or of named types; "
        "may be given again",
    )
    make.add_argument("-o", "--output", type=Path, required=True, help="an .h5ad file")
    make.add_argument(
        "--given",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="value of a further condition, such as batch=b1",
    )
    make.add_argument(
        "--counts", action="store_true", help="whole counts at the depth of real cells"
    )
    make.add_argument("--seed", type=int, help="the model's own by default")
    make.add_argument("--device", default="auto")
    make.set_defaults(command=_generate)
    return parser


# --- run ------------------------------------------------------------------------


def _run(arguments: argparse.Namespace) -> int:
    book = _book_folder(arguments.book)
    chapter = _chapter_file(book, arguments.chapter)
    given = dict(arguments.parameters)
    if len(given) < len(arguments.parameters):
        names = [name for name, _ in arguments.parameters]
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(message("A parameter was given twice", found=twice))
    checked = _check_parameters(chapter, given)
    dataset = str(checked.get("dataset", "none"))
    output = _output_file(arguments.output, book, arguments.chapter, dataset)
    return _execute(chapter, output, {name: checked[name] for name in given})


def _book_folder(given: Path | None) -> Path:
    """Return the folder of the chapters: beside the package, or under the cwd."""
    if given is not None:
        if not given.is_dir():
            raise ConfigError(message("--book is not a folder", found=str(given)))
        return given.resolve()
    beside = Path(scgenlib.__file__).resolve().parent.parent / "book"
    for folder in (beside, Path.cwd() / "book"):
        if any(folder.glob("*.ipynb")):
            return folder
    raise ConfigError(
        message(
            "The chapters were not found",
            found=str(beside),
            do="Run it in a clone of the book, or name the folder with --book.",
        )
    )


def _chapter_file(book: Path, name: str) -> Path:
    names = sorted(path.stem for path in book.glob("*.ipynb"))
    if name not in names:
        raise unknown("chapter", name, names)
    return book / f"{name}.ipynb"


def _check_parameters(chapter: Path, given: dict[str, str]) -> dict[str, Any]:
    """Return the chapter's parameters with `given` ones cast and checked.

    The chapter would refuse them as well, but only after a kernel has started.
    """
    from scgenlib.chapter import check_dataset, read_parameters
    from scgenlib.training import resolve_device

    namespace, task = _declared(chapter)
    declared = list(namespace["__annotations__"])
    for name in given:
        if name not in declared:
            raise unknown("parameter", name, declared)
    values = read_parameters({**namespace, **given})
    resolve_device(values.get("device", "auto"))
    if values.get("dataset") is not None:
        check_dataset(values["dataset"], task)
    return values


def _declared(chapter: Path) -> tuple[dict[str, Any], str]:
    """Return the namespace of the parameters cell, and the task of the chapter."""
    import nbformat

    namespace: dict[str, Any] = {"__annotations__": {}}
    task = chapter.stem  # unless chapter.start names another
    for cell in nbformat.read(chapter, as_version=4).cells:
        if cell.cell_type != "code":
            continue
        if "parameters" in cell.metadata.get("tags", []):
            # Only hints and literals belong there, so nothing need be executed.
            for node in ast.parse(cell.source).body:
                if isinstance(node, ast.AnnAssign) and node.value is not None:
                    name = ast.unparse(node.target)
                    namespace[name] = ast.literal_eval(node.value)
                    namespace["__annotations__"][name] = ast.unparse(node.annotation)
        call = r"chapter\.start\(.*?\btask=[\"'](\w+)[\"']"
        found = re.search(call, cell.source, re.DOTALL)
        task = found.group(1) if found else task
    return namespace, task


def _output_file(given: Path | None, book: Path, chapter: str, dataset: str) -> Path:
    """Return where the executed notebook goes, in a folder that can be written to."""
    if given is None:
        is_file = dataset.endswith((".h5ad", ".yml", ".yaml"))
        name = Path(dataset).stem if is_file else dataset
        slug = re.sub(r"[^\w.-]+", "_", name)
        now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        given = Path("runs") / f"{chapter}-{slug}-{now}.ipynb"
    output = given.absolute()
    if output.suffix != ".ipynb":
        raise OutputError(
            message("The output is not a notebook", found=given.name, allowed="*.ipynb")
        )
    if output.resolve().parent == book:
        raise OutputError(
            message(
                "The output would overwrite the book",
                found=str(given),
                do="Choose another folder; `make refresh` renews the book itself.",
            )
        )
    _make_folder(output.parent)
    return output


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            message(
                "The output folder cannot be made",
                found=str(folder),
                do=f"The system says: {error.strerror or error}.",
            )
        ) from error
    if not os.access(folder, os.W_OK):
        raise OutputError(
            message("The output folder cannot be written to", found=str(folder))
        )


def _execute(chapter: Path, output: Path, parameters: dict[str, Any]) -> int:
    import papermill
    from papermill.exceptions import PapermillExecutionError

    print(f"{chapter.stem} -> {_shown(output)}", file=sys.stderr)
    status = 0
    # A stopped run never looks finished; a failed one is kept up to its error.
    with atomic(output, "The notebook cannot be written") as part:
        try:
            done = papermill.execute_notebook(
                str(chapter), str(part), parameters, kernel_name="python3"
            )
            # What changes the meaning of a run must not stand in the notebook alone.
            for cell in done.cells:
                for shown in cell.get("outputs", []):
                    lines = "".join(shown.get("text", "")).splitlines()
                    for line in (x for x in lines if x.startswith("Warning: ")):
                        print(f"scgenlib: {line}", file=sys.stderr)
        except PapermillExecutionError as error:
            status = 1
            print(
                f"scgenlib: {chapter.stem} stopped in cell {error.exec_count}: "
                f"{error.ename}: {error.evalue}\n"
                "The notebook up to there is kept:",
                file=sys.stderr,
            )
    print(_shown(output))
    return status


def _shown(path: Path) -> str:
    """Return `path` from the current folder if it lies below it."""
    cwd = Path.cwd()
    return str(path.relative_to(cwd) if path.is_relative_to(cwd) else path)


# --- datasets -------------------------------------------------------------------


def _data_list(arguments: argparse.Namespace) -> int:
    from scgenlib import datasets

    table = datasets.list()
    if not arguments.long:
        table = table.drop(columns=["title", "verified", "licence"])
    print(table.to_string(index=False))
    return 0


def _data_card(arguments: argparse.Namespace) -> int:
    import yaml

    from scgenlib import datasets

    card = datasets.card(arguments.name)
    print(yaml.safe_dump(card, sort_keys=False, allow_unicode=True).rstrip())
    return 0


def _data_fetch(arguments: argparse.Namespace) -> int:
    from scgenlib import datasets

    print(datasets.fetch(arguments.name))
    return 0


def _data_verify(arguments: argparse.Namespace) -> int:
    from scgenlib import datasets

    found = datasets.verify(arguments.name)
    for file in found["files"]:
        if file["found"] is None:
            state = f"not here; `scgenlib datasets fetch {arguments.name}` brings it"
        elif file["ok"]:
            state = f"ok         {file['found']}"
        elif not file["expected"]:
            state = f"no checksum is known for it    {file['found']}"
        else:
            state = f"differs    {file['found']}\n  sha256 {file['sha256']}"
            state += f"\n  wanted {' or '.join(file['expected'])}"
        print(f"{file['path']}: {state}")
    if not found["files"]:
        print(f"{arguments.name}: no files, the cells are drawn by load()")
    return 0 if found["ok"] else 1


# --- generate -------------------------------------------------------------------


def _generate(arguments: argparse.Namespace) -> int:
    cells = _cells(arguments.cells)
    output = arguments.output.absolute()
    if output.suffix != ".h5ad":
        raise OutputError(
            message("The output is not an .h5ad", found=output.name, allowed="*.h5ad")
        )
    _make_folder(output.parent)
    model_class = _model_class(arguments.model)
    options: dict[str, Any] = {"seed": arguments.seed}
    if arguments.given:
        options["given"] = _pairs(arguments.given)
    if arguments.counts:
        options["counts"] = True
    takes = inspect.signature(model_class.generate).parameters
    for name in options:
        if name not in takes:
            raise ConfigError(
                message(f"A {model_class.__name__} model has no use for --{name}")
            )
    # A method that can draw cells of a given type says so on its class.
    if not isinstance(cells, int) and not model_class.by_type:
        raise ConfigError(
            message(
                f"{model_class.__name__} cannot be asked for cells of one type",
                found=" ".join(arguments.cells),
                allowed="one number, such as --cells 500",
            )
        )
    model = model_class.load(arguments.model, device=arguments.device)
    generated = model.generate(cells, **options)
    with atomic(output, "The cells cannot be written") as part:
        generated.write_h5ad(part, compression="gzip")
    print(f"{generated.n_obs} cells, {generated.n_vars} genes -> {_shown(output)}")
    return 0


def _cells(given: Sequence[str]) -> int | list[int] | dict[str, int]:
    """Return a number of cells, one for each type in order, or those of named types."""
    pairs = [text.rpartition("=") for text in given]
    names = [name for name, separator, _ in pairs if separator]
    for text, (_, _, number) in zip(given, pairs, strict=True):
        bad = not number.strip().isdigit() or names.count(text.rpartition("=")[0]) > 1
        if bad or 0 < len(names) < len(given):
            allowed = "500, or 1000 500 0 200, or TYPE=N such as 'CD4 T=500'"
            raise ConfigError(
                message("--cells cannot be read", found=text, allowed=allowed)
            )
    numbers = [int(number) for _, _, number in pairs]
    if names:
        return dict(zip(names, numbers, strict=True))
    return numbers if len(numbers) > 1 else numbers[0]


def _pairs(given: Sequence[str]) -> dict[str, str]:
    """Return NAME=VALUE texts as a dict."""
    for text in given:
        if not all(text.partition("=")):
            allowed = "NAME=VALUE such as batch=b1"
            raise ConfigError(
                message("--given cannot be read", found=text, allowed=allowed)
            )
    return dict(text.split("=", 1) for text in given)


def _model_class(folder: Path) -> Any:
    """Return the class that wrote the model in `folder`."""
    from scgenlib.estimator import Estimator, read_about

    method = read_about(folder)["method"]
    for name in scgenlib._EXPORTS:
        found = getattr(scgenlib, name)
        if issubclass(found, Estimator) and found.method == method:
            if "generate" not in found.tasks:
                raise ModelFileError(
                    message(
                        f"A {name} model cannot generate cells",
                        found=method,
                        allowed=f"its verbs: {', '.join(sorted(found.tasks))}",
                    )
                )
            return found
    raise ModelFileError(
        message("The model is of a method unknown to this version", found=method)
    )


if __name__ == "__main__":
    sys.exit(main())
