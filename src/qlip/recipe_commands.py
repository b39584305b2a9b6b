"""The commands whose options depend on a recipe: `qlip train|balance|check RECIPE [--field value ...]`.

They parse their own arguments; what each prints without a recipe is here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qlip.core.arguments import parse_arguments
from qlip.core.errors import UserError
from qlip.recipes import RECIPES, find_recipe

if TYPE_CHECKING:
    from qlip.recipes.run import RunConfig

TRAIN_HELP = """usage: qlip train RECIPE [--out FOLDER] [--accept-changes] [--field value ...]

Train a recipe, or resume it: starting again in the same folder goes on from the newest checkpoint.

recipes:
{recipes}

options:
  --out FOLDER        run folder (default runs/RECIPE)
  --accept-changes    resume although the config has changed
  --field value       any field of the recipe; `qlip train RECIPE --help` lists them all

examples:
  qlip train scenes_tiny --data.train 'PATH/{{00000..00009}}.tar' --out runs/mine
  qlip train scenes_tiny_stage2 --data.train PATH --task.init runs/mine/export
"""

BALANCE_HELP = """usage: qlip balance RECIPE [--out FOLDER] [--steps N] [--field value ...]

Find the weight of the pixel loss: train on alignment alone and on reconstruction alone, and take the ratio of their
final losses. Starting again in the same folder resumes.

options:
  --out FOLDER        for both trainings and balance.json (default runs/RECIPE_balance)
  --steps N           optimizer steps of each training (default: the recipe's)
  --field value       any field of the recipe; `qlip balance RECIPE --help` lists them all

Example: qlip balance scenes_tiny --data.train PATH --steps 500 --task.optimizer.warmup-steps 25
"""

CHECK_HELP = """usage: qlip check RECIPE [--gpus N] [--vram GB] [--mfu SHARE] [--tflops T] [--field value ...]

Say what a run will need, without a GPU: parameters, FLOPs, memory, the largest batches, time, and what is missing.

options:
  --gpus N            GPUs of the run (default 1)
  --vram GB           memory of one GPU (default 80)
  --mfu SHARE         share of the peak that training is assumed to reach (default 0.35)
  --tflops T          bf16 peak of one GPU (default 989, an H100)
  --field value       any field of the recipe; `qlip check RECIPE --help` lists them all

Example: qlip check qlip_b_16_256 --gpus 8 --vram 80
"""


def train(arguments: list[str]) -> None:
    """Train a recipe, or resume it: qlip train RECIPE [--field value ...]"""
    if not arguments or arguments[0] in ("-h", "--help"):
        recipes = "\n".join(f"  {name:<28}{summary}" for name, (_, summary) in RECIPES.items())
        print(TRAIN_HELP.format(recipes=recipes))
        return
    name, options = arguments[0], arguments[1:]
    base = find_recipe(name)
    from qlip.core.distributed import stop

    prog, out = f"qlip train {name}", Path("runs") / name
    if base.task.kind == "next_token":
        from qlip.recipes.generation_run import GenerationOptions, run_generation

        asked = parse_arguments(GenerationOptions, options, prog=prog, default=GenerationOptions(run=base, out=out))
        run_generation(asked.run, folder=asked.out, accept_changes=asked.accept_changes)
    elif base.task.kind == "instruct":
        from qlip.recipes.instruction_run import InstructionOptions, run_instruction

        asked = parse_arguments(InstructionOptions, options, prog=prog, default=InstructionOptions(run=base, out=out))
        run_instruction(asked.run, folder=asked.out, accept_changes=asked.accept_changes)
    elif base.task.kind == "unified":
        from qlip.recipes.unified_run import UnifiedOptions, run_unified

        asked = parse_arguments(UnifiedOptions, options, prog=prog, default=UnifiedOptions(run=base, out=out))
        run_unified(asked.run, folder=asked.out, accept_changes=asked.accept_changes)
    else:
        from qlip.recipes.run import TrainOptions, run_recipe

        asked = parse_arguments(TrainOptions, options, prog=prog, default=TrainOptions(run=base, out=out))
        run_recipe(asked.run, folder=asked.out, accept_changes=asked.accept_changes)
    stop()


def balance(arguments: list[str]) -> None:
    """Find the weight of the pixel loss from two trainings: qlip balance RECIPE [--field value ...]"""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(BALANCE_HELP)
        return
    name = arguments[0]
    base = _tokenizer_recipe(name, "balance")
    from qlip.apps.balance import BalanceOptions, run_balance
    from qlip.core.distributed import stop

    default = BalanceOptions(run=base, out=Path("runs") / f"{name}_balance")
    options = parse_arguments(BalanceOptions, arguments[1:], prog=f"qlip balance {name}", default=default)
    run_balance(options.run, out=options.out, steps=options.steps)
    stop()


def check(arguments: list[str]) -> None:
    """Say what a run will need, without a GPU: qlip check RECIPE --gpus 8 --vram 80 [--field value ...]"""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(CHECK_HELP)
        return
    name = arguments[0]
    base = _tokenizer_recipe(name, "check")
    from qlip.apps.check import CheckOptions, run_check

    run_check(parse_arguments(CheckOptions, arguments[1:], prog=f"qlip check {name}", default=CheckOptions(run=base)))


def _tokenizer_recipe(name: str, command: str) -> RunConfig:
    """A recipe that trains a tokenizer. Raises `UserError` for others and unknown names."""
    base = find_recipe(name)
    downstream = {
        "next_token": ("a text-to-image model over one", "docs/text_to_image.md"),
        "instruct": ("an assistant that sees through one", "docs/understanding.md"),
        "unified": ("a model of text and of images over one", "docs/unified.md"),
    }
    if base.task.kind in downstream:
        what, page = downstream[base.task.kind]
        raise UserError(
            f"`qlip {command}` knows recipes of tokenizers, and {name} trains {what}: {page} says what it needs"
        )
    return base
