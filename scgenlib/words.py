"""Printed sentences, broken at the width of the page's column."""

from __future__ import annotations

import textwrap

__all__ = ["WIDTH", "say"]

#: Characters in a line of a page's printed output.
WIDTH = 75


def say(text: str, indent: int = 2) -> None:
    """Print `text` in lines of at most `WIDTH` characters.

    Parameters
    ----------
    text
        One sentence or list; its own line breaks are kept.
    indent
        Spaces before each continued line.

    Notes
    -----
    Words are never cut: a name longer than the column stays whole, so that it can
    be searched for and copied.
    """
    for line in text.splitlines():
        filled = textwrap.fill(
            line.replace(" %", "\N{NO-BREAK SPACE}%"),  # stays with its number
            WIDTH,
            subsequent_indent=" " * indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
        print(filled.replace("\N{NO-BREAK SPACE}", " "))
