"""Writing whole or not at all, and printing in a column."""

from __future__ import annotations

import os

import pytest

from scgenlib.errors import OutputError
from scgenlib.files import atomic
from scgenlib.words import say


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_with_its_own_name_and_suffix(tmp_path):
    target = tmp_path / "new" / "table.csv"
    with atomic(target, "No") as part:
        assert part.name == "table.csv" and not target.exists()
        part.write_text("a,b")
        assert not target.exists()
    assert target.read_text() == "a,b" and names(target.parent) == ["table.csv"]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_a_broken_write_leaves_what_was_there(tmp_path, error):
    target = tmp_path / "table.csv"
    target.write_text("old")
    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught, atomic(target, "It failed", "Try.") as part:
        part.write_text("half")
        raise error
    if expected is OutputError:
        text = "The system says: No space left. Try."
        assert str(caught.value) == f"It failed. Found: {str(target)!r}. {text}"
    assert target.read_text() == "old" and names(tmp_path) == ["table.csv"]


def test_a_folder_replaces_a_folder(tmp_path):
    target = tmp_path / "model"
    for files in (["a", "b"], ["b", "c"]):
        with atomic(target, "No") as part:
            part.mkdir()
            for name in files:
                (part / name).touch()
    assert names(target) == ["b", "c"] and names(tmp_path) == ["model"]
    assert target.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    before = os.umask(0)
    os.umask(before)
    return before


def test_a_file_never_replaces_a_folder(tmp_path):
    target = tmp_path / "thesis"
    target.mkdir()
    (target / "chapter.txt").touch()
    with pytest.raises(OutputError, match="directory"):
        with atomic(target, "No") as part:
            part.write_text("x")
    assert names(target) == ["chapter.txt"] and names(tmp_path) == ["thesis"]


def test_say_breaks_lines_and_keeps_words(capsys):
    gene = "HLA-" + "x" * 80
    say(f"{'word ' * 20}\nnew line with {gene}", indent=4)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ("word " * 15).strip()
    assert lines[1] == "    " + ("word " * 5).strip()
    assert lines[2:] == ["new line with", f"    {gene}"]
    say("x" * 71 + " 20 %")
    assert capsys.readouterr().out == "x" * 71 + "\n  20 %\n"
