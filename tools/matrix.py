"""Run every chapter on every data set at hand; write what happened.

The result is `book/status.json`, which the status page shows, and the table in
the README. A data set whose file is neither at hand nor downloadable is left out
and said so: nothing takes its place.

    python tools/matrix.py [--chapter NAME] [--dataset NAME]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import time
from typing import Any

import book
import generated_pages
import scgenlib
from scgenlib import cli, datasets
from scgenlib.errors import ScgenError
from scgenlib.training import resolve_device

STATUS = book.ROOT / "book" / "status.json"
BEGIN, END = "<!-- matrix: begin -->\n", "<!-- matrix: end -->\n"


def run(chapter: str, dataset: str) -> dict[str, Any]:
    """Execute one pair in a process of its own and measure it."""
    name = f"{chapter}-{dataset.replace('/', '_')}.ipynb"
    output = book.BUILD / "matrix" / name
    command = [sys.executable, "-m", "scgenlib.cli", "run", chapter]
    command += ["-p", "dataset", dataset, "-o", str(output)]
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=book.ROOT, stdin=subprocess.DEVNULL)
    # wait4 counts the kernel too, which its parent has waited for.
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    unit = 1e6 if sys.platform == "darwin" else 1e3
    return {
        "chapter": chapter,
        "dataset": dataset,
        "ok": process.returncode == 0,
        "seconds": round(time.perf_counter() - began),
        "memory_mb": round(usage.ru_maxrss / unit),
        "device": resolve_device("auto").type,
        "version": scgenlib.__version__,
        "date": datetime.date.today().isoformat(),
    }


def pairs() -> list[tuple[str, str]]:
    """Return the chapters with a `dataset` parameter, and what each can be run on."""
    found = []
    for path in book.notebooks():
        parameters, task = cli._declared(path)
        if "dataset" in parameters:
            found += [(path.stem, name) for name in datasets.names(task=task)]
    return found


def write_readme() -> None:
    """Renew the table of chapters and data sets in the README."""
    path = book.ROOT / "README.md"
    text = path.read_text()
    fresh = BEGIN + generated_pages.matrix_table(book.ROOT).rstrip() + "\n" + END
    pattern = re.escape(BEGIN) + ".*" + re.escape(END)
    path.write_text(re.sub(pattern, lambda _: fresh, text, flags=re.DOTALL))


def main() -> int:
    """Run the chosen pairs, keep the results of the others."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chapter")
    parser.add_argument("--dataset")
    chosen = parser.parse_args()
    stored = json.loads(STATUS.read_text()) if STATUS.is_file() else []
    results = {(run["chapter"], run["dataset"]): run for run in stored}
    ok = True
    for chapter, dataset in pairs():
        if (chosen.chapter or chapter, chosen.dataset or dataset) != (chapter, dataset):
            continue
        print(f"== {chapter} on {dataset}", flush=True)
        try:
            if not datasets.verify(dataset)["ok"]:
                datasets.fetch(dataset)
        except ScgenError as error:
            print(f"left out: {error}")
            continue
        results[chapter, dataset] = result = run(chapter, dataset)
        ok &= result["ok"]
    kept = [results[pair] for pair in pairs() if pair in results]
    part = STATUS.with_name(".status.json.part")
    part.write_text(json.dumps(kept, indent=1) + "\n")
    os.replace(part, STATUS)
    write_readme()
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
