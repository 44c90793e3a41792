from __future__ import annotations

from scgenlib import errors


def test_message_holds_all_four_parts():
    text = errors.message(
        "No such set", found="polen", allowed=["pollen", "yan"], do="List them."
    )
    assert text == (
        "No such set. Found: 'polen'. Allowed: pollen, yan. "
        "Did you mean 'pollen'? List them."
    )


def test_no_guess_without_a_likely_one():
    assert errors.nearest("zzzz", ["pollen", "yan"]) is None
    assert errors.nearest("Pollen", ["pollen"]) == "pollen"


def test_long_lists_are_cut():
    text = errors.message("x", found="q", allowed=map(str, range(99)), limit=3)
    assert "0, 1, 2, and 96 more" in text


def test_unknown_returns_the_asked_error():
    error = errors.unknown("device", "gpu", ["cpu"], error=errors.DeviceError)
    assert isinstance(error, errors.DeviceError) and isinstance(error, ValueError)
