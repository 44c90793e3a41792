"""The pages on trouble and upkeep quote what the code prints, and name what exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import book

BOOK = book.HOME / "book"
TROUBLE = (BOOK / "troubleshooting.md").read_text(encoding="utf-8")
UPKEEP = (BOOK / "upkeep.md").read_text(encoding="utf-8")

#: Words of other tools; the tests named here see them printed.
OTHERS = {
    "Missing argument 'OUTPUT_PATH'": "test_readme: papermill on a terminal",
    "CUDA out of memory": "torch, on a GPU only",
    "No such kernel named scgenlib": "test_missing_kernel",
}


@cache
def printed() -> list[str]:
    """Return each text that the package can print, with {} for what varies."""
    found = []
    for path in (book.HOME / "scgenlib").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "{}"
                         for p in node.values)  # fmt: skip
                found.append("".join(map(str, parts)))
            # unknown("profile", ...) says "Unknown profile."
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "unknown":
                if isinstance(node.args[0], ast.Constant):
                    found.append(f"Unknown {node.args[0].value}.")
    return [text for text in found if len(text) >= 10]


def is_printed(quote: str) -> bool:
    """Return whether the package prints a quote, as a whole or as a part."""
    quote = quote.strip().rstrip(".")
    plain = re.sub(r"'\w+'", "{}", quote)
    for text in printed():
        if quote in text or plain in text:
            return True
        if "{}" in text and len(text.replace("{}", "")) >= 12:
            pieces = map(re.escape, text.rstrip(".").split("{}"))
            if re.fullmatch(".{1,40}".join(pieces), quote):
                return True
    return False


def quotes() -> list[str]:
    """Return each message that the page on trouble quotes."""
    found = re.findall(r"^```text\n(.*?)\n```$", TROUBLE, re.MULTILINE)
    found += re.findall(r"^\| `([^`]+)` \|", TROUBLE, re.MULTILINE)
    found += re.findall(r"Or `([^`]+)`", TROUBLE)
    return found


def test_there_are_quotes():
    assert len(quotes()) > 25


@pytest.mark.parametrize("quote", quotes())
def test_a_quoted_message_is_one_that_is_printed(quote):
    assert quote in OTHERS or is_printed(quote), f"nothing prints {quote!r}"


def test_an_invented_message_is_found_out():
    assert not is_printed("X holds purple values")
    assert not is_printed("Unknown weather.")


def test_every_error_of_the_contract_is_explained():
    """What stops a reader's own file stands on the page, message by message."""
    for name in ("contract", "h5ad"):
        tree = ast.parse((book.HOME / "scgenlib" / f"{name}.py").read_text())
        for node in ast.walk(tree):
            is_call = isinstance(node, ast.Call)
            if not is_call or ast.unparse(node.func) not in ("message", "unknown"):
                continue
            first = node.args[0]
            parts = first.values if isinstance(first, ast.JoinedStr) else [first]
            words = [p.value for p in parts if isinstance(p, ast.Constant)]
            longest = max(words, key=len).strip(" '")
            assert longest in TROUBLE, f"{name}.py: {longest!r} is not explained"


def test_missing_kernel(tmp_path):
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    with pytest.raises(NoSuchKernel, match="No such kernel named scgenlib-nowhere"):
        KernelSpecManager(data_dir=str(tmp_path)).get_kernel_spec("scgenlib-nowhere")


# --- Windows ----------------------------------------------------------------------


def test_windows_lines_are_those_of_the_makefile():
    makefile = re.sub(r"\\\n\s*", "", (book.HOME / "Makefile").read_text())
    makefile = re.sub(r"\s+", " ", makefile)
    blocks = re.findall(r"^```powershell\n(.*?)^```$", TROUBLE, re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) >= 14
    for line in lines:
        if found := re.match(r'\$env:(\w+) = "(\w+)"', line):
            name, value = found.groups()
            rule = re.search(rf"export {name} \??:?= (\S+)", makefile)
            assert rule and rule[1] in (value, "$(OMP_NUM_THREADS)"), line
            continue
        plain = line.replace(".venv\\Scripts\\", "$(BIN)/")
        plain = plain.replace("py -3.11 -m venv", "$(PYTHON) -m venv")
        plain = plain.replace("http.server 8000", "http.server $(PORT)")
        plain = plain.replace("refresh garage", "refresh $(ONLY)")
        if "scgenlib run" in plain:
            assert "$(BIN)/scgenlib run" in makefile
            continue
        assert plain in makefile, f"the Makefile has no such line: {plain}"


def test_programs_that_the_windows_lines_name_exist():
    for name in re.findall(r"(tools/\w+\.py)", TROUBLE):
        assert (book.HOME / name).is_file()


# --- upkeep -----------------------------------------------------------------------


def test_tests_that_upkeep_names_exist():
    named = set(re.findall(r"`(test_\w+\.py)`", UPKEEP))
    assert len(named) >= 8
    here = Path(__file__).parent
    assert all((here / name).is_file() for name in named), named


def test_settings_that_upkeep_names_exist():
    tool = (book.HOME / "tools" / "book.py").read_text()
    assert "BOOK_PUBLIC_URL" in tool and "BOOK_PUBLIC_URL" in UPKEEP
    assert "public_url:" in UPKEEP and '"public_url"' in tool
    rules = (book.HOME / "experiments" / "Snakefile").read_text()
    for chapter, dataset in re.findall(r"^  ([a-z]+)_(\w+):", UPKEEP, re.MULTILINE):
        if chapter in ("slurm", "mem"):
            continue
        assert f'"{chapter}": {{' in rules and f'"{dataset}"' in rules
    make = (book.HOME / "Makefile").read_text()
    for target in re.findall(r"`make (\w+)", UPKEEP + TROUBLE):
        assert re.search(rf"^{target}:", make, re.MULTILINE), target
