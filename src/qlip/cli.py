"""The command line: `qlip COMMAND ...`. The table of commands, and every mistake as one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from qlip import __version__, chat_commands, commands, eval_commands, recipe_commands, store_commands, token_commands
from qlip.core.arguments import parse_arguments
from qlip.core.errors import RankError, UserError, last_line, nearest_name

COMMANDS: dict[str, Callable[..., None]] = {
    "demo": commands.demo,
    "train": recipe_commands.train,
    "balance": recipe_commands.balance,
    "check": recipe_commands.check,
    "eval": eval_commands.evaluate,
    "eval protocols": eval_commands.eval_protocols,
    "eval compare": eval_commands.eval_compare,
    "eval explain": eval_commands.eval_explain,
    "eval results": eval_commands.eval_results,
    "table": eval_commands.table,
    "data scenes": commands.data_scenes,
    "data inspect": commands.data_inspect,
    "data conversations": commands.data_conversations,
    "tokenize": token_commands.tokenize,
    "detokenize": store_commands.detokenize,
    "tokens verify": store_commands.tokens_verify,
    "tokens merge": store_commands.tokens_merge,
    "tokens export": store_commands.tokens_export,
    "search": store_commands.search,
    "generate": token_commands.generate,
    "ask": chat_commands.ask,
    "caption": chat_commands.caption,
    "complete": chat_commands.complete,
    "app": store_commands.app,
    "reconstruct": commands.reconstruct,
    "verify": commands.verify,
    "classify": commands.classify,
    "export": commands.export,
    "import": commands.import_command,
    "doctor": commands.doctor,
}


def _help(group: str = "") -> str:
    """All commands, or those of a group such as `data`."""
    lines = ["usage: qlip COMMAND ...", "", "A visual tokenizer aligned with text: train, tokenize, evaluate.", ""]
    for name, function in COMMANDS.items():
        if not name.startswith(group):
            continue
        summary = (function.__doc__ or "").strip().splitlines()[0]
        lines.append(f"  {name:<20}{summary}")
    lines += ["", "`qlip COMMAND --help` says more. Start with `qlip demo`."]
    return "\n".join(lines)


def dispatch(arguments: list[str]) -> None:
    """Find the command and run it with the rest of the arguments."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return
    if arguments[0] == "--version":
        print(f"qlip {__version__}")
        return
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    name = " ".join(arguments[:words])
    if name not in COMMANDS:
        if any(command.startswith(f"{name} ") for command in COMMANDS):  # `qlip data`, `qlip data foo`
            if arguments[1:2] in ([], ["-h"], ["--help"]):
                print(_help(f"{name} "))
                return
            name = " ".join(arguments[:2])
        raise UserError(f"command {name!r} is unknown: {nearest_name(name, COMMANDS)}")
    if name in ("train", "balance", "check"):  # parse their own arguments: the options depend on the recipe
        COMMANDS[name](arguments[1:])
    else:
        parse_arguments(COMMANDS[name], arguments[words:], prog=f"qlip {name}")()


def main() -> None:
    """Entry point: exit code 0, 2 with one line for a mistake that the user can mend, 130 after Ctrl-C."""
    try:
        dispatch(sys.argv[1:])
    except UserError as error:
        if isinstance(error, RankError) or os.environ.get("RANK", "0") == "0":  # what all ranks meet is said once
            print(f"qlip: {last_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except KeyboardInterrupt:
        print("qlip: stopped; start the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None
