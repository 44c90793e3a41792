"""A folder from which a class is installed and taught without a network.

It holds wheels for each operating system, notebooks, slides, the pages if they were
built, recorded runs, and the data whose licence allows copies. What is missing is
written into its README by name.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from email.parser import BytesParser
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from classroom_myst import ROOT, ClassroomError
from scgenlib.errors import unknown

_GLIBC = (5, 12, 17, 24, 26, 27, 28, 31, 34)
_MANYLINUX = ["1", "2010", "2014", *(f"_2_{minor}" for minor in _GLIBC)]
#: Wheel tags of each system, and what its markers read.
PLATFORMS: dict[str, tuple[list[str], dict[str, str]]] = {
    "linux": (
        ["linux_x86_64", *(f"manylinux{n}_x86_64" for n in _MANYLINUX)],
        {"sys_platform": "linux", "os_name": "posix", "platform_system": "Linux",
         "platform_machine": "x86_64"},
    ),
    "windows": (
        ["win_amd64"],
        {"sys_platform": "win32", "os_name": "nt", "platform_system": "Windows",
         "platform_machine": "AMD64"},
    ),
    "macos": (
        ["macosx_14_0_arm64"],
        {"sys_platform": "darwin", "os_name": "posix", "platform_system": "Darwin",
         "platform_machine": "arm64"},
    ),
}  # fmt: skip
_PYTHON = {"python_version": "3.11", "python_full_version": "3.11.9"}
#: Not in the lock, but a class has to open the notebooks.
EDITOR = "jupyterlab"
#: Licences that let a file be passed on as it is, with its notice.
_FREE = re.compile(r"\b(BSD|MIT|Apache|GPL|CC BY|CC0)\b|\bGPL-", re.I)
_LARGEST_TORCH = 400e6  # bytes; a build for the GPU is larger


def locked(platform: str = "linux") -> dict[str, str]:
    """Return name -> version of requirements.lock, as one system reads it."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    found = [Requirement(x) for x in lines if x and not x.startswith("#")]
    system = {**PLATFORMS[platform][1], **_PYTHON}
    return {
        x.name: str(x.specifier).removeprefix("==")
        for x in found
        if x.marker is None or x.marker.evaluate(system)
    }


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pip and return what it said."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def download(platform: str, wanted: list[str], folder: Path) -> list[str]:
    """Fetch the wheels of `wanted` for one system; return what has none.

    A package without a wheel is built here, and kept if the result fits any system.
    """
    tags = [x for tag in PLATFORMS[platform][0] for x in ("--platform", tag)]
    base = ["download", "--quiet", "--no-deps", "--only-binary=:all:", *tags,
            "--python-version=3.11", "--implementation=cp", "--abi=cp311",
            f"--dest={folder}"]  # fmt: skip
    wanted, absent = list(wanted), []
    while wanted:
        done = pip(*base, *wanted)
        if not done.returncode:
            break
        match = re.search(r"No matching distribution found for ([\w.-]+)", done.stderr)
        text = match and next((w for w in wanted if _name(w) == _name(match[1])), None)
        if not text:
            raise ClassroomError(f"pip fetched no wheels:\n{done.stderr[-2000:]}")
        wanted.remove(text)
        if not _build_pure(text, folder):
            absent.append(text)
    return absent


def _name(requirement: str) -> str:
    return canonicalize_name(Requirement(requirement).name)


def _build_pure(requirement: str, folder: Path) -> bool:
    work = folder / "build"
    pip("wheel", "--quiet", "--no-deps", f"--wheel-dir={work}", requirement)
    made = [p for p in work.glob("*.whl") if p.name.endswith("-none-any.whl")]
    for path in made:
        shutil.move(path, folder / path.name)
    shutil.rmtree(work, ignore_errors=True)
    return bool(made)


def requires(wheel: Path) -> list[Requirement]:
    """Return what a wheel says it needs."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        about = BytesParser().parsebytes(archive.read(name))
    return [Requirement(text) for text in about.get_all("Requires-Dist") or []]


def gather(
    platform: str, roots: list[str], wheels: Path, closed: bool
) -> tuple[dict[str, str], list[str]]:
    """Fetch `roots` and, if `closed`, all that they need on one system.

    The lock was made on one system; others need packages that it does not name.

    Returns
    -------
    versions, absent
        Name -> version of what was fetched, and the requirements without a wheel.
    """
    folder, shared = wheels / platform, wheels / "any"
    folder.mkdir(parents=True, exist_ok=True)
    shared.mkdir(exist_ok=True)
    have: dict[str, Path] = {}
    absent: list[str] = []
    seen: set[tuple[str, frozenset[str]]] = set()
    todo, wanted = [Requirement(text) for text in roots], roots
    environment = {**PLATFORMS[platform][1], **_PYTHON}
    while wanted:
        absent += download(platform, wanted, folder)
        have |= {str(parse_wheel_filename(p.name)[0]): p
                 for p in folder.glob("*.whl")}  # fmt: skip
        wanted, later = [], list[Requirement]()
        while closed and todo:
            need = todo.pop()
            name, extras = canonicalize_name(need.name), frozenset(need.extras)
            if name not in have:
                later.append(need)
            if (name, extras) in seen or name not in have:
                continue
            seen.add((name, extras))
            for child in requires(have[name]):
                marked = child.marker is None or any(
                    child.marker.evaluate({**environment, "extra": extra})
                    for extra in extras or {""}
                )
                if not marked:
                    continue
                todo.append(child)
                known = canonicalize_name(child.name)
                texts = [_name(text) for text in [*wanted, *absent]]
                if known not in have and known not in texts:
                    wanted.append(f"{child.name}{child.specifier}")
        todo = later
    versions: dict[str, str] = {}
    for package, path in have.items():
        versions[package] = parse_wheel_filename(path.name)[1].public
        if package == "torch" and path.stat().st_size > _LARGEST_TORCH:
            raise ClassroomError(
                f"the index offers {path.name}, a build for the GPU; let PIP_INDEX_URL"
                " or PIP_FIND_LINKS name one with the CPU build of torch first"
            )
        if path.name.endswith("-none-any.whl"):
            shutil.move(path, shared / path.name)
    return versions, absent


# --- data -----------------------------------------------------------------------


def copy_data(target: Path, dry_run: bool = False) -> list[str]:
    """Copy the data files that may be passed on; return a line for each data set.

    Files are taken from `SCGENLIB_DATA_DIR` and compared with their checksums.
    """
    at_hand = Path(os.environ.get("SCGENLIB_DATA_DIR") or ROOT / "data")
    lines = []
    for path in sorted((ROOT / "data_manifests").glob("*.yml")):
        about = yaml.safe_load(path.read_text(encoding="utf-8"))
        head, licence = f"`{about['name']}`", str(about.get("licence", ""))
        if about.get("embedded"):
            lines.append(f"- {head}: needs no file")
            continue
        if not _FREE.search(licence):
            lines.append(f"- {head}: left out, no licence to pass it on ({licence})")
            continue
        files = list(about.get("files") or [])
        for design in (about.get("designs") or {}).values():
            files += design.get("files") or []
        good = {f["path"] for f in files if _is(at_hand / f["path"], f.get("sha256"))}
        size = sum((at_hand / name).stat().st_size for name in good) / 1e6
        for name in () if dry_run else sorted(good):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(at_hand / name, target / name)
        found = f"{len(good)} of {len({f['path'] for f in files})} files, {size:.1f} MB"
        lines.append(f"- {head}: {found}. {licence}. {about.get('citation', '')}."
                     f" {about.get('source', '')}")  # fmt: skip
    return lines


def _is(path: Path, sha256: str | None) -> bool:
    if not path.is_file() or not sha256:
        return False
    return hashlib.sha256(path.read_bytes()).hexdigest() == sha256


# --- the folder -----------------------------------------------------------------

_INSTALL = """\
#!/bin/sh
# Installs the class into ./venv without a network. Needs Python 3.11.
set -e
cd "$(dirname "$0")"
"${PYTHON:-python3.11}" -m venv venv
venv/bin/python -m pip install --disable-pip-version-check --no-index \\
    --find-links wheels/any --find-links wheels/@ -r requirements-@.txt
"""
_START = """\
#!/bin/sh
# Opens the student notebooks in a browser.
cd "$(dirname "$0")"
export SCGENLIB_DATA_DIR="$PWD/data" SCGENLIB_RESULTS_DIR="$PWD/results"
exec venv/bin/jupyter lab student
"""
_INSTALL_WINDOWS = """\
@rem Installs the class into venv without a network. Needs Python 3.11.
cd /d "%~dp0"
py -3.11 -m venv venv || exit /b 1
venv\\Scripts\\python -m pip install --disable-pip-version-check --no-index ^
    --find-links wheels/any --find-links wheels/windows -r requirements-windows.txt
"""
_START_WINDOWS = """\
@rem Opens the student notebooks in a browser.
cd /d "%~dp0"
set SCGENLIB_DATA_DIR=%CD%\\data
set SCGENLIB_RESULTS_DIR=%CD%\\results
venv\\Scripts\\jupyter lab student
"""
_README = """\
# A class without a network

Each machine needs Python 3.11 and this folder. Nothing is fetched.

| | Linux | macOS (Apple silicon) | Windows |
|---|---|---|---|
| install | `sh install-linux.sh` | `sh install-macos.sh` | `install-windows.bat` |
| start | `sh start.sh` | `sh start.sh` | `start.bat` |

`student` has the notebooks without solutions, `slides` the slides, `html` the pages of
the book if they were built. **`instructor` has the solutions: take it out before you
hand the folder on.** A machine needs `wheels/any` and the folder of its own system.

## Wheels

{wheels}

## Data

{data}

A licence named here is that of the package or site that publishes the file. Simulated
cells and those inside a package need no file.
"""


def wheelhouse(
    out: Path,
    platforms: list[str],
    *,
    only: list[str],
    dry_run: bool,
    makers: Iterable[Callable[[list[str], Path], object]],
) -> None:
    """Fill `out`; `only` takes these packages of the lock and nothing they need."""
    pins = locked()
    for name in only:
        if name != "scgenlib" and name not in pins:
            raise unknown("package of requirements.lock", name, [*pins, "scgenlib"])
    chosen = [n for n in pins if not only or n in only]
    own = not only or "scgenlib" in only
    extra = [] if only else [EDITOR]
    if dry_run:
        print(f"{len(chosen) + own} packages{' and ' + EDITOR if extra else ''},"
              f" for {', '.join(platforms)}, into {out}")  # fmt: skip
        print("\n".join(copy_data(out / "data", dry_run=True)))
        return
    wheels = out / "wheels"
    if wheels.is_dir() and any(wheels.iterdir()):
        raise ClassroomError(f"{wheels} holds wheels already; name an empty folder")
    wheels.mkdir(parents=True, exist_ok=True)
    lines = []
    for platform in platforms:
        pins = locked(platform)
        roots = [f"{name}=={pins[name]}" for name in chosen]
        found, absent = gather(platform, roots + extra, wheels, closed=not only)
        added = sorted(set(found) - set(pins))
        if own:
            found["scgenlib"] = _own_wheel(wheels / "any")
        rows = [f"{name}=={version}" for name, version in sorted(found.items())]
        (out / f"requirements-{platform}.txt").write_text("\n".join(rows) + "\n")
        size = sum(p.stat().st_size for p in (wheels / platform).glob("*.whl")) / 1e6
        line = f"- {platform}: {len(rows)} packages, {size:.0f} MB for it alone"
        line += f"; not in the lock: {', '.join(added)}" if added else ""
        line += f"; **no wheel: {', '.join(absent)}**" if absent else ""
        lines.append(line)
        print(line, flush=True)
        _scripts(out, platform)
    shared = sum(p.stat().st_size for p in (wheels / "any").glob("*.whl")) / 1e6
    lines.append(f"- any system: {shared:.0f} MB")
    shutil.copyfile(ROOT / "requirements.lock", out / "requirements.lock")
    if not only:
        for make in makers:
            make([], out)
        shutil.copytree(ROOT / "book/results", out / "results", dirs_exist_ok=True)
        if (pages := ROOT / "_build" / "html").is_dir():
            shutil.copytree(pages, out / "html", dirs_exist_ok=True)
    data = copy_data(out / "data", dry_run=bool(only))
    readme = _README.format(wheels="\n".join(lines), data="\n".join(data))
    (out / "README.md").write_text(readme, encoding="utf-8")
    total = sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) / 1e6
    print(f"{out}: {total:.0f} MB")


def _own_wheel(folder: Path) -> str:
    """Build the wheel of scgenlib; return its version."""
    done = pip("wheel", "--quiet", "--no-deps", "--no-build-isolation",
               f"--wheel-dir={folder}", str(ROOT))  # fmt: skip
    made = sorted(folder.glob("scgenlib-*.whl"))
    if done.returncode or not made:
        raise ClassroomError(f"scgenlib was not built:\n{done.stderr[-2000:]}")
    return parse_wheel_filename(made[-1].name)[1].public


def _scripts(out: Path, platform: str) -> None:
    if platform == "windows":
        (out / "install-windows.bat").write_text(_INSTALL_WINDOWS, newline="\r\n")
        (out / "start.bat").write_text(_START_WINDOWS, newline="\r\n")
        return
    install = _INSTALL.replace("@", platform)
    for name, text in ((f"install-{platform}", install), ("start", _START)):
        (out / f"{name}.sh").write_text(text, newline="\n")
