# SPDX-License-Identifier: Apache-2.0
"""The two mistakes a user of the lab can make: a wrong word, and a data set that is not there."""

import difflib
from collections.abc import Iterable
from pathlib import Path


class UsageError(ValueError):
    """A wrong name, option or combination; the text says what is allowed."""


class MissingDataError(FileNotFoundError):
    """A data file is not where it was looked for; the text says what it is and how to get it.

    Args:
        path: The file that is missing.
        what: What the file is, in words.
        source: Where people get it: the public home of the data set.
    """

    def __init__(self, path: Path, what: str, source: str) -> None:
        self.path = path
        super().__init__(
            f"missing data file: {path}\n"
            f"  it is:      {what}\n"
            f"  get it at:  {source}\n"
            "  looked in:  the folder of --data-dir, else of $PARABOLA_DATA, else ./data"
        )


def unknown(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that does not exist, with the nearest names that do.

    Args:
        kind: What the name should have been, for instance ``"optimizer"``.
        name: The name that was given.
        known: All valid names.
    """
    choices = sorted(known)
    near = difflib.get_close_matches(name, choices, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(word) for word in near)}? " if near else ""
    return UsageError(f"no {kind} named {name!r}: {hint}known: {', '.join(choices)}")
