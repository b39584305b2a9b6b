"""Recipes by name. The table is all that `qlip train --help` needs, so listing them loads nothing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from qlip.core.errors import UserError, nearest_name

if TYPE_CHECKING:
    from qlip.recipes.run import RunConfig

RECIPES = {
    "scenes_tiny": ("qlip.recipes.scenes", "stage 1 on procedural scenes, two CPU cores, minutes"),
    "scenes_tiny_stage2": ("qlip.recipes.scenes", "stage 2 of the same: perceptual and adversarial, frozen encoder"),
}


def find_recipe(name: str) -> RunConfig:
    """The config a recipe returns. Raises `UserError` naming the nearest recipe for an unknown name."""
    if name not in RECIPES:
        raise UserError(f"recipe {name!r} is unknown: {nearest_name(name, RECIPES)}")
    return getattr(importlib.import_module(RECIPES[name][0]), name)()
