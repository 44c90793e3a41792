"""Writing that happens whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from scgenlib.errors import OutputError, message

__all__ = ["atomic"]


@contextlib.contextmanager
def atomic(path: Path, problem: str, do: str | None = None) -> Iterator[Path]:
    """Give a place to write to, which becomes `path` when the block has ended well.

    ::

        with atomic(path, "The record cannot be written") as part:
            part.write_text(text)

    Parameters
    ----------
    path
        File or folder to write; its parents are made. What was there before stays
        until the new one is complete, and is put back if that fails.
    problem
        First sentence of the error, without full stop.
    do
        What the reader can do; what the system says is put before it.

    Yields
    ------
    pathlib.Path
        A free path with the name of `path`, on the same disk.

    Raises
    ------
    OutputError
        The block or the move into place met an OSError; nothing is left behind.
    """
    hidden = earlier = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        hidden = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        part = hidden / path.name
        yield part
        if part.is_dir() and path.is_dir():  # a full folder cannot be replaced
            earlier = hidden / f"{path.name}-earlier"
            os.replace(path, earlier)
        os.replace(part, path)
    except OSError as error:
        says = f"The system says: {error.strerror or error}."
        text = message(problem, found=str(path), do=f"{says} {do or ''}".strip())
        raise OutputError(text) from error
    finally:
        # Also after Ctrl-C: the earlier folder goes only when the new one is there.
        if earlier is not None and earlier.exists() and not path.exists():
            os.replace(earlier, path)
        if hidden is not None:
            shutil.rmtree(hidden, ignore_errors=True)
