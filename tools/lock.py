"""Write requirements.lock and requirements-results.lock from an environment.

Run it (`make lock`) in an environment whose packages were tested together. It
takes the requirements of pyproject.toml, walks what they pull in, and writes the
installed versions. `requirements-results.lock` holds only what `make results`
needs on top of the first file, so that the two never disagree.
"""

from __future__ import annotations

import importlib.metadata as metadata
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

#: Where one system needs another version: name -> (its marker, the version there).
ELSEWHERE = {"harmonypy": ('sys_platform == "win32"', "0.2.0")}
ROOT = Path(__file__).resolve().parent.parent
HEADER = """\
# {what}
# Exact pins for Python 3.11, written by `make lock`; do not edit by hand.
# No hashes and plain version numbers, so that one file serves every platform
# and pip may take the build of torch that its index offers.
"""


def closure(requirements: list[str]) -> dict[str, str]:
    """Return name -> installed version of `requirements` and all they need."""
    asked = [Requirement(text) for text in requirements]
    todo = [x for x in asked if x.marker is None or x.marker.evaluate()]
    seen: set[tuple[str, frozenset[str]]] = set()
    pins: dict[str, str] = {}
    while todo:
        need = todo.pop()
        key = (canonicalize_name(need.name), frozenset(need.extras))
        if key in seen:
            continue
        seen.add(key)
        dist = metadata.distribution(need.name)
        if not need.specifier.contains(dist.version, prereleases=True):
            raise SystemExit(f"{need} is asked for, {dist.version} is installed")
        # A local label such as 2.13.0+cpu exists on one machine only.
        pins[key[0]] = dist.version.split("+")[0]
        for text in dist.requires or []:
            child = Requirement(text)
            marker = child.marker
            extras = need.extras or {""}
            if marker is None or any(marker.evaluate({"extra": e}) for e in extras):
                todo.append(child)
    return pins


def inverted(marker: str) -> str:
    """Return the marker of all other systems."""
    return marker.replace("==", "!=")


def write(path: Path, what: str, pins: dict[str, str]) -> None:
    """Write one lock file, sorted by name."""
    lines = []
    for name, version in sorted(pins.items()):
        marker, other = ELSEWHERE.get(name, ("", ""))
        lines.append(f"{name}=={version}" + (f"; {inverted(marker)}" if marker else ""))
        if marker:
            lines.append(f"{name}=={other}; {marker}")
    path.write_text(HEADER.format(what=what) + "\n".join(lines) + "\n")
    print(f"{path.name}: {len(lines)} packages")


def main() -> None:
    """Write both lock files next to pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    first = closure(project["dependencies"] + extras["book"] + extras["test"])
    more = closure(extras["results"])
    second = {name: more[name] for name in more if name not in first}
    write(ROOT / "requirements.lock", "What the book and the tests need.", first)
    write(
        ROOT / "requirements-results.lock",
        "What `make results` needs on top of requirements.lock.",
        second,
    )


if __name__ == "__main__":
    main()
