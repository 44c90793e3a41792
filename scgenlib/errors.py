"""Messages that say what was found, what is allowed, and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

__all__ = [
    "ConfigError",
    "DataError",
    "DeviceError",
    "DownloadError",
    "ManifestError",
    "ModelFileError",
    "NotFittedError",
    "OutputError",
    "ScgenError",
    "message",
    "nearest",
    "unknown",
]


class ScgenError(ValueError):
    """Base of every error that a user of scgenlib can cause and mend."""


class ConfigError(ScgenError):
    """A parameter, profile or option that does not exist or is out of range."""


class DataError(ScgenError):
    """A data set that is unknown or does not hold what a method needs."""


class ManifestError(DataError):
    """A data manifest that does not fit the schema."""


class DownloadError(DataError):
    """A file that could not be fetched, or arrived different from its checksum."""


class ModelFileError(ScgenError):
    """A saved model that cannot be read as the model asked for."""


class NotFittedError(ScgenError):
    """A verb was called on a model that has not been fitted."""


class DeviceError(ScgenError):
    """A device that this machine does not have."""


class OutputError(ScgenError):
    """A place that cannot be written to."""


def nearest(found: Any, allowed: Iterable[Any]) -> str | None:
    """Return the allowed name most like `found`, or None if none is close."""
    names = {str(name).lower(): str(name) for name in allowed}
    close = difflib.get_close_matches(str(found).lower(), list(names), 1, 0.6)
    return names[close[0]] if close else None


def message(
    problem: str,
    *,
    found: Any = None,
    allowed: Iterable[Any] | str | None = None,
    do: str | None = None,
    limit: int = 30,
) -> str:
    """Build an error text of one to four short parts.

    Parameters
    ----------
    problem
        One sentence, without full stop, saying what is wrong.
    found
        The value that was found; left out when None.
    allowed
        The allowed values, or a sentence that describes them. With a list, the
        nearest match to `found` is named as well.
    do
        What the reader can do next.
    limit
        How many allowed values are listed at most.
    """
    parts = [problem + "."]
    if found is not None:
        parts.append(f"Found: {found!r}.")
    if isinstance(allowed, str):
        parts.append(f"Allowed: {allowed}.")
    elif allowed is not None:
        options = [str(name) for name in allowed]
        shown = ", ".join(options[:limit])
        more = f", and {len(options) - limit} more" if len(options) > limit else ""
        parts.append(f"Allowed: {shown}{more}." if options else "Allowed: nothing.")
        guess = nearest(found, options)
        if guess is not None and guess != str(found):
            parts.append(f"Did you mean {guess!r}?")
    if do:
        parts.append(do)
    return " ".join(parts)


def unknown(
    kind: str,
    found: Any,
    allowed: Iterable[Any],
    do: str | None = None,
    error: type[ScgenError] = ConfigError,
) -> ScgenError:
    """Return (not raise) the error for a name that is not one of `allowed`."""
    return error(message(f"Unknown {kind}", found=found, allowed=allowed, do=do))
