"""`qlip check` of the scenes' recipes, cut down to a few thousand parameters."""

from __future__ import annotations

from qlip.apps.check import CheckOptions
from qlip.core.arguments import parse_arguments
from qlip.recipes import find_recipe

TOWER = {"hidden-size": "16", "num-layers": "1", "num-heads": "2", "intermediate-size": "24"}
SMALL = {
    "model.image-size": "16",
    "model.patch-size": "8",
    "model.context-length": "8",
    "model.projection-dim": "16",
    **{f"model.{part}.{name}": value for part in ("encoder", "decoder", "text") for name, value in TOWER.items()},
    "data.batch-size": "8",
}


def options(recipe: str, *words: str) -> CheckOptions:
    """As the command reads them."""
    fields = [word for name, value in SMALL.items() for word in (f"--{name}", value)]
    return parse_arguments(
        CheckOptions, [*fields, *words], prog="qlip check", default=CheckOptions(run=find_recipe(recipe))
    )
