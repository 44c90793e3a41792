"""A pseudo-terminal, for the lines that a reader types."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent


def on_a_terminal(
    command: str, cwd: Path, seconds: float = 120, **env: str
) -> tuple[int, str]:
    """Run a shell line on a pseudo-terminal; return its exit status and its output."""
    pty = pytest.importorskip("pty", reason="needs a terminal of the Unix kind")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command,
        shell=True,
        cwd=cwd,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, **env, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},
        close_fds=True,
    )
    os.close(theirs)
    seen, until = b"", time.monotonic() + seconds
    while time.monotonic() < until:
        if select.select([ours], [], [], 0.2)[0]:
            try:
                seen += os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
        elif process.poll() is not None:
            break
    os.close(ours)
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
    return process.wait(), seen.decode(errors="replace")
