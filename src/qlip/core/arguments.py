"""Typed command-line arguments through tyro, with every mistake reported as one line that names the nearest option."""

from __future__ import annotations

import contextlib
import functools
import io
import re
from typing import Any

import tyro

from qlip.core.errors import UserError, nearest_name

OPTION = re.compile(r"--[a-z][\w.-]*")
CONFIG = (tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff, tyro.conf.HelptextFromCommentsOff)


def parse_arguments(target: Any, arguments: list[str], *, prog: str, default: Any = None) -> Any:
    """The dataclass that the arguments describe (changed from `default`), or for a function its call, not yet made.

    Prints help and exits for `--help`. Raises `UserError` in one line for anything not understood.
    """
    kwargs = {} if default is None else {"default": default}
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(_deferred(target), args=arguments, prog=prog, config=CONFIG, **kwargs)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_one_line(printed.getvalue(), target, prog=prog, **kwargs)) from None


def _deferred(target: Any) -> Any:
    """A function with the same signature that returns its call instead of making it; anything else as it is."""
    if isinstance(target, type):
        return target

    @functools.wraps(target)
    def call_later(*args: Any, **kwargs: Any) -> Any:
        return functools.partial(target, *args, **kwargs)

    return call_later


def _one_line(message: str, target: Any, *, prog: str, **kwargs: Any) -> str:
    """The gist of tyro's error box."""
    lines = [line.strip("│╭╰─╮╯| ") for line in re.sub(r"\x1b\[[0-9;]*m", "", message).splitlines()]
    text = " ".join(line for line in lines[1:] if line.strip("+-"))  # without the box: its title, rules and end
    help_hint = f"(see `{prog} --help`)"
    if "Unrecognized options" in text:
        rest = re.split(r"Perhaps you meant|For full helptext", text.split("Unrecognized options", 1)[1])[0]
        unknown = OPTION.findall(rest)
        if not unknown:
            return f"too many arguments: {rest.strip(': ')} {help_hint}"
        known = OPTION.findall(tyro.extras.get_parser(target, config=CONFIG, **kwargs).format_help())
        return f"option {unknown[0]} is unknown: {nearest_name(unknown[0], set(known))} {help_hint}"
    if "Missing from" in text:
        missing = re.sub(r"\s+", " ", text.split(":", 1)[1].split("For full helptext")[0])
        return f"missing {missing.strip()[:120]} {help_hint}"
    gist = re.split(r"Argument helptext|For full helptext", text)[0]
    return f"{gist.strip()[:240]} {help_hint}"
