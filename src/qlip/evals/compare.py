"""`qlip eval compare`: two results side by side, refused unless their cards say that they were measured alike.

What moves a figure (protocol, pictures, networks, names, templates, training pictures) blocks; what moves its last
digits (dtype, device, versions) is only listed.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from qlip.core.errors import UserError
from qlip.core.log import console
from qlip.evals.directions import OWN
from qlip.evals.directions import direction as direction

BLOCKING = (  # a card's keys that begin so, in the order in which they are named
    *("protocol", "preparation", "protocol_settings", "image_size", "antialias", "count", "complete"),
    *("keys_sha256", "pixels_sha256", "reference", "feature_", "lpips_"),
    *("class_names_sha256", "labels_sha256", "num_classes"),
    *("templates", "colour_templates", "captions_sha256", "num_captions", "ties", "scenes"),
    *("train_", "selection", "left_out", "prompts_sha256", "clip_", "seeds"),
    *("questions_sha256", "truths_sha256", "scorer", "answer_rule", "normalisation", "decoding", "categories"),
)
NOTED = (
    *("dtype", "device", "ranks", "batch_size", "versions", "git_commit", "chat_template_sha256"),
    *("text_tokens_sha256", "data", "skipped", "encoder_network", "encoder_fingerprint", "sampling", "generated_size"),
    "softmax",
)
BASELINE = "_baseline"
DASH = "\N{EN DASH}"
SHOWN = 40
ABSENT = object()


@dataclass(kw_only=True, slots=True, frozen=True)
class Differences:
    """What two cards do not share, as `key value -> value`."""

    blocking: list[str]
    """Figures measured so mean different things."""
    notes: list[str]
    """Last digits may move."""


def read_results(path: Path) -> list[dict[str, Any]]:
    """The list of `eval`, `figures`, `details`, `card` that `qlip eval` wrote; of a folder, its results.json.

    Figures are numbers, or None for what could not be measured. Raises `UserError` for a file that is missing, is not
    JSON, or is not such a list.
    """
    path = path / "results.json" if path.is_dir() else path
    remedy = "give a results.json written by `qlip eval`"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {remedy}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not JSON; {remedy}") from None
    if not isinstance(results, list) or not results:
        raise UserError(f"{path} is no list of results; {remedy}")
    for place, result in enumerate(results, start=1):
        mistake = _mistake(result)
        if mistake:
            raise UserError(f"{path}: result {place} {mistake}; {remedy}")
        result.setdefault("details", {})
        result["figures"] = {
            name: None if value is None or not math.isfinite(value) else value
            for name, value in result["figures"].items()
        }
    return results


def _mistake(result: Any) -> str:
    """What is wrong with one result, or nothing."""
    if not isinstance(result, dict):
        return "is no object"
    kind: type
    for key, kind in (("eval", str), ("figures", dict), ("card", dict)):
        if not isinstance(result.get(key), kind):
            return f"has no {key}"
    for name, value in result["figures"].items():
        if value is not None and not _is_number(value):
            return f"has a figure {_shorten(name)} that is no number"
    card = result["card"]
    for key, kind in (("protocol", str), ("count", int)):
        if not isinstance(card.get(key), kind) or isinstance(card[key], bool):
            return f"has a card without {key}"
    for key, kind in (("model", str), ("model_fingerprint", str), ("complete", bool), ("data", str)):
        if not isinstance(card.get(key, kind()), kind):
            return f"has a card whose {key} is no {kind.__name__}"
    for key in ("preparation", "protocol_settings", "versions"):
        if not isinstance(card.get(key, {}), dict):
            return f"has a card whose {key} is no object"
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)


def differences(card_a: dict[str, Any], card_b: dict[str, Any]) -> Differences:
    """What differs between two cards. A key that only one of them has differs.

    The side of the pictures, and with it their pixels, blocks only where the protocol sets it or pixels are what is
    scored: a protocol that leaves the side to the model classifies each model's own squares.
    """
    a, b = _flat(card_a), _flat(card_b)
    changed = [key for key in {**a, **b} if a.get(key, ABSENT) != b.get(key, ABSENT)]
    own_side: set[str] = set()
    if (
        "image_size" in changed
        and "preparation.size" not in changed
        and a.get("preparation.size") == 0
        and "protocol_settings.metrics" not in a
    ):
        own_side = {"image_size", "pixels_sha256"}

    def said(prefixes: tuple[str, ...], keys: list[str]) -> list[str]:
        ordered = [key for prefix in prefixes for key in keys if _begins(key, prefix)]
        return [f"{key} {_shorten(a.get(key, ABSENT))} -> {_shorten(b.get(key, ABSENT))}" for key in ordered]

    return Differences(
        blocking=said(BLOCKING, [key for key in changed if key not in own_side]),
        notes=said(NOTED, changed) + said(("image_size", "pixels_sha256"), [key for key in changed if key in own_side]),
    )


def _begins(key: str, prefix: str) -> bool:
    """Whether a flat key belongs to a prefix: `train_` to all that begin so, `versions` to itself and `versions.*`."""
    if prefix.endswith("_"):
        return key.startswith(prefix)
    if prefix in ("reference", "data"):  # and what is said of them: reference_count, data_identity
        return key == prefix or key.startswith(f"{prefix}_")
    if prefix == "templates":
        return key in (prefix, "templates_sha256", "num_templates")
    return key == prefix or key.startswith(f"{prefix}.")


def _flat(card: dict[str, Any]) -> dict[str, Any]:
    """`preparation: {size: 256}` -> `preparation.size: 256`, and so for all objects."""
    flat: dict[str, Any] = {}
    for key, value in card.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{name}": part for name, part in value.items()}
        else:
            flat[key] = value
    return flat


def _shorten(value: Any) -> str:
    """`absent`, eight characters of a hash, at most forty of anything else; one line."""
    if value is ABSENT:
        return "absent"
    if isinstance(value, str) and len(value) in (40, 64) and all(c in "0123456789abcdef" for c in value):
        return value[:8]
    text = value if isinstance(value, str) else json.dumps(value)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split()) or '""'
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


@dataclass(kw_only=True, slots=True, frozen=True)
class Pair:
    """One evaluation in both files."""

    a: dict[str, Any]
    b: dict[str, Any]
    differences: Differences


def compare_results(a: Path, b: Path, *, force: bool = False) -> None:
    """Print a table per protocol in both files: figure, A, B, difference (B minus A), which is better.

    Protocols in one file only are named. Where no protocol is in both, evaluations of one kind are set side by side,
    which needs `force`; it prints what differs as a warning above each table. Raises `UserError` for results that were
    not measured alike, naming the fields that differ, and as `read_results` does.
    """
    results_a, results_b = _by_protocol(a), _by_protocol(b)
    common = [name for name in results_a if name in results_b]
    pairs = [(results_a.pop(name), results_b.pop(name)) for name in common]
    if force or not pairs:
        pairs += _same_kind(results_a, results_b)
    if not pairs:
        names = [f"{path} has {', '.join(map(_shorten, found))}" for path, found in ((a, results_a), (b, results_b))]
        raise UserError(f"no evaluation in common: {'; '.join(names)}; evaluate both under one protocol")
    found = [Pair(a=x, b=y, differences=differences(x["card"], y["card"])) for x, y in pairs]
    blocking = dict.fromkeys(line for pair in found for line in pair.differences.blocking)
    if blocking and not force:
        raise UserError(f"{a} and {b} cannot be compared: {', '.join(blocking)}; evaluate both alike, or give --force")
    console.print(_legend("A", a, found[0].a["card"]), markup=False)
    console.print(_legend("B", b, found[0].b["card"]), markup=False)
    for pair in found:
        _print_pair(pair)
    for path, rest in ((a, results_a), (b, results_b)):
        if rest:
            console.print(f"only in {path}: {', '.join(map(_shorten, rest))}", markup=False)


def _by_protocol(path: Path) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {}
    for result in read_results(path):
        name = result["card"]["protocol"]
        if name in results:
            raise UserError(f"{path} holds {_shorten(name)} twice; evaluate into one file once")
        results[name] = result
    return results


def _same_kind(
    results_a: dict[str, dict[str, Any]], results_b: dict[str, dict[str, Any]]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Take out pairs of one kind of evaluation under different protocols."""
    pairs = []
    for name_a, result in list(results_a.items()):
        name_b = next((name for name in results_b if results_b[name]["eval"] == result["eval"]), None)
        if name_b is not None:
            pairs.append((results_a.pop(name_a), results_b.pop(name_b)))
    return pairs


def _legend(letter: str, path: Path, card: dict[str, Any]) -> str:
    fingerprint = card.get("model_fingerprint", "")
    return f"{letter}: {path}  (model {_shorten(card.get('model', 'unknown'))}, {_shorten(fingerprint)})"


def _print_pair(pair: Pair) -> None:
    """Warning, table, notes."""
    card_a, card_b = pair.a["card"], pair.b["card"]
    if pair.differences.blocking:
        console.print(f"\n[bold yellow]not measured alike:[/] {escape(', '.join(pair.differences.blocking))}")
    protocols = dict.fromkeys(_shorten(card["protocol"]) for card in (card_a, card_b))
    counts = dict.fromkeys(str(card["count"]) for card in (card_a, card_b))
    title = escape(f"{' -> '.join(protocols)}  ({' -> '.join(counts)} samples)")
    table = Table(title=title, title_justify="left")
    table.add_column("figure")
    for column in ("A", "B", "difference"):
        table.add_column(column, justify="right")
    table.add_column("better?")
    for name in {**pair.a["figures"], **pair.b["figures"]}:
        if name.endswith(BASELINE):
            continue
        value_a, value_b = pair.a["figures"].get(name), pair.b["figures"].get(name)
        better = _better(name, value_a, value_b)
        others = [words for key, words in OWN.get(name, ()) if card_a.get(key) != card_b.get(key)]
        better = others[0] if better and others else better  # each in its own unit: their difference says nothing
        table.add_row(escape(_shorten(name)), _value(value_a), _value(value_b), _difference(value_a, value_b), better)
    console.print(table)
    if pair.differences.notes:
        console.print(f"[dim]also different, may move last digits: {escape(', '.join(pair.differences.notes))}[/]")


def _value(value: float | None) -> str:
    return DASH if value is None else f"{value:.4f}"


def _difference(a: float | None, b: float | None) -> str:
    if a is None or b is None:
        return DASH
    text = f"{b - a:+.4f}"
    return "0" if a == b else f"{b - a:+.0e}" if float(text) == 0 else text


def _better(name: str, a: float | None, b: float | None) -> str:
    """`A`, `B`, `same`, or nothing where no direction is better or one was not measured."""
    if a is None or b is None or not direction(name):
        return ""
    if a == b:
        return "same"
    return "B" if (b > a) == (direction(name) == "higher") else "A"
