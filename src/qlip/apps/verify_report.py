"""What `qlip verify` prints: flips per setting, the margins as a bar chart, and one sentence."""

from __future__ import annotations

from typing import Any

from rich.bar import Bar
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from qlip.core.log import console

EXACT = ("again", "again in one batch")
"""Settings whose bits batch-invariant encoding promises to keep."""
SHOWN_FILES = 5


def print_report(result: dict[str, Any]) -> None:
    """Print a result of `qlip.apps.verify`, in the shape that --json writes."""
    card, details = result["card"], result["details"]
    console.print(_flip_table(card, details))
    console.print()
    _print_left_out(details["settings"])
    if details["margins"] is None:
        console.print(f"\nno margins: bits of quantizer {card['quantizer']} are not signs, zero is no threshold there")
    else:
        _print_margins(details["margins"], num_bits=details["bits"])
    _print_unusable(details["unusable"])
    console.print(f"\n{conclusion(details)}")


def conclusion(details: dict[str, Any]) -> str:
    """The one sentence to remember."""
    measured = {row["name"]: row for row in details["settings"] if not row["left_out"]}
    broken = [name for name in EXACT if name in measured and measured[name]["bits_flipped"]]
    exact = "batch-invariant encoding is exact here"
    if broken:
        exact = f"batch-invariant encoding is not exact here: bits differ in {' and '.join(map(repr, broken))}"
    rows = [row for name, row in measured.items() if name not in EXACT and row["bits_flipped"]]
    if not rows:
        return f"none of {details['bits']:,} bits differs in any setting; {exact}"
    worst = max(rows, key=lambda row: row["bits_flipped"])
    far = "" if worst["largest_margin"] is None else f", none further than {worst['largest_margin']:.1e} from zero"
    return f"at most {worst['bits_flipped']:,} of {details['bits']:,} bits differ ({worst['name']}){far}; {exact}"


def _flip_table(card: dict[str, Any], details: dict[str, Any]) -> Table:
    bits, tokens, pictures = (f"{details[name]:,}" for name in ("bits", "tokens", "pictures"))
    title = (
        f"{bits} bits in {tokens} tokens of {pictures} picture{'s' if details['pictures'] > 1 else ''}\n"
        f"compared with float32, picture by picture (batch-invariant), on {card['device']} ({card['device_name']}), "
        f"{details['reference_seconds']:.1f} s"
    )
    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("setting", no_wrap=True)
    for column in ("bits\nflipped", "share", "tokens\nchanged", "pictures\nchanged", "largest\nmargin", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in details["settings"]:
        if not row["left_out"]:
            table.add_row(
                escape(row["name"]),
                f"{row['bits_flipped']:,}",
                _percent(row["bits_share"]),
                _percent(row["tokens_share"]),
                f"{row['pictures_changed']:,}",
                "" if row["largest_margin"] is None else f"{row['largest_margin']:.1e}",
                f"{row['seconds']:.{1 if row['seconds'] >= 10 else 2}f}",
            )
    return table


def _print_left_out(settings: list[dict[str, Any]]) -> None:
    """One line per reason."""
    if any("compile" in row["name"] and not row["left_out"] for row in settings):
        console.print("seconds of torch.compile include compiling")
    names: dict[str, list[str]] = {}
    for row in settings:
        if row["left_out"]:
            names.setdefault(row["left_out"], []).append(row["name"])
    for reason, left_out in names.items():
        console.print(f"left out: {', '.join(left_out)} ({reason})", markup=False)


def _print_margins(margins: dict[str, Any], *, num_bits: int) -> None:
    edges, counts = margins["edges"], margins["counts"]
    title = f"margins |u|: how far the latents of {num_bits:,} bits lie from zero"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=False)
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    for _ in range(2):
        table.add_column(justify="right", no_wrap=True)
    first = next(i for i, count in enumerate(counts) if count)
    for low, high, count in list(zip(edges, edges[1:], counts, strict=False))[first:]:
        label = f"{low:.1e} \N{EN DASH} {high:.1e}" if low else f"below {high:.1e}"
        bar = Bar(size=max(counts), begin=0, end=count, width=36)
        table.add_row(label, bar, f"{count:,}", _percent(count / num_bits))
    console.print()
    console.print(table)
    console.print()
    shares = Table("margin below", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    shares.add_column("share of bits", justify="right")
    shares.add_column("if directions were random" if "random" in margins["below"][0] else "", justify="right")
    for entry in margins["below"]:
        random = _percent(entry["random"]) if "random" in entry else ""
        shares.add_row(f"{entry['threshold']:.0e}", _percent(entry["share"]), random)
    console.print(shares)
    quantiles = (f"{100 * float(share):g} % below {value:.1e}" for share, value in margins["quantiles"].items())
    console.print(f"\nquantiles: {', '.join(quantiles)}")


def _print_unusable(unusable: dict[str, str]) -> None:
    for path, reason in list(unusable.items())[:SHOWN_FILES]:
        console.print(f"not used: {path}: {reason}", markup=False)
    if len(unusable) > SHOWN_FILES:
        console.print(f"not used: {len(unusable) - SHOWN_FILES} more; --json FILE names all")


def _percent(share: float) -> str:
    """Two significant digits, so that one bit of a million still shows."""
    if share in (0, 1):
        return f"{100 * share:.0f} %"
    return f"{100 * share:#.2g} %" if share < 0.0995 else f"{100 * share:.1f} %"
