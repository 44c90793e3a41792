"""Fetch one file: resumed where it broke off, from a second mirror if need be.

pooch checks the sha256 and moves the file into place only when it is complete.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scgenlib.errors import DownloadError, OutputError, message

__all__ = ["download"]

_TIMEOUT = (10, 60)  # seconds to connect, and between two pieces
_CHUNK = 1 << 16


def _stream(url: str, part: Path) -> None:
    """Append the rest of `url` to `part`; start over if the server cannot resume."""
    import requests
    from tqdm import tqdm

    start = part.stat().st_size if part.exists() else 0
    # Compressed transfer would make byte positions meaningless.
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as reply:
        if reply.status_code == 416:  # nothing is left to send
            return
        reply.raise_for_status()
        resumed = reply.status_code == 206
        total = int(reply.headers.get("Content-Length", 0)) or None
        bar = tqdm(
            desc=part.name.removesuffix(".part"),
            initial=start if resumed else 0,
            total=total + start if total and resumed else total,
            unit="B",
            unit_scale=True,
            disable=None,
        )
        with bar, part.open("ab" if resumed else "wb") as file:
            for chunk in reply.iter_content(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))


def download(name: str, urls: Sequence[str], path: Path, sha256: str | None) -> None:
    """Download the first mirror that delivers the right file.

    Parameters
    ----------
    name
        Data set, for messages.
    urls
        Mirrors, tried in order; each is tried twice, the second time from where the
        first broke off.
    path
        Where the file shall lie. It appears there only complete and verified.
    sha256
        Checksum, or None where none is known.

    Raises
    ------
    DownloadError
        If no mirror delivers it, or what arrives has another checksum. Such a file is
        removed; the beginning of an interrupted download stays as "<file>.part".
    OutputError
        If the cache cannot be written, or the disk is full.
    """
    import pooch
    import requests

    pooch.get_logger().setLevel("ERROR")
    part = path.with_name(path.name + ".part")

    def fetch_part(url: str, target: Any, _: Any) -> None:
        _stream(url, part)
        shutil.copyfile(part, target)

    broken = (
        requests.ConnectionError,
        requests.Timeout,
        requests.exceptions.ChunkedEncodingError,
    )
    failures = []
    for url in [u for mirror in urls for u in (mirror, mirror)]:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            pooch.retrieve(
                url,
                known_hash=f"sha256:{sha256}" if sha256 else None,
                fname=path.name,
                path=path.parent,
                downloader=fetch_part,
            )
            part.unlink(missing_ok=True)
            return
        except requests.RequestException as error:
            lost = "no connection, or it broke off"
            failures.append(f"{url}: {lost if isinstance(error, broken) else error}")
        except ValueError as error:  # pooch: the checksum differs
            part.unlink(missing_ok=True)
            failures.append(f"{url}: {error}")
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            full = error.errno == errno.ENOSPC
            raise OutputError(
                message(
                    "The disk is full" if full else "The cache cannot be written",
                    found=f"{path.parent}: {error.strerror or error}",
                    allowed="a folder with room that you may write to",
                    do="Free some space, or set XDG_CACHE_HOME to another folder, or"
                    " put the file into SCGENLIB_DATA_DIR.",
                )
            ) from error
    raise DownloadError(
        message(
            f"Could not download {path.name} of the data set {name!r}",
            found="; ".join(dict.fromkeys(failures)) or "no URL in the manifest",
            allowed=f"a file with sha256 {sha256}" if sha256 else None,
            do=f"Without a network: put the file at"
            f" $SCGENLIB_DATA_DIR/{path.parent.name}/{path.name}, or use a data set"
            f" that needs none, such as pbmc68k_reduced or 'simulated:{name}'.",
        )
    )
