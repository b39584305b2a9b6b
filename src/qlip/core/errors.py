"""The one exception for mistakes a user can mend: its text is one line that ends with the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave. The command line prints its text as one line and exits with code 2."""


class RankError(UserError):
    """A mistake that one of several processes has met while training; the others may not know of it."""


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Say which known name was probably meant, or list them: the tail of an error line."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(known)}"


def one_line(error: BaseException) -> str:
    """What another library says, on one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]


def last_line(error: BaseException) -> str:
    """The message without the traceback that torch puts before it when it comes from a data worker."""
    line = next((line for line in reversed(str(error).splitlines()) if line.strip()), "")
    return re.sub(r"^[\w.]*Error: ", "", line.strip())
