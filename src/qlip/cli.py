"""The command line: `qlip COMMAND ...`. A table of commands, each of which loads what it needs when it is called."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from qlip import __version__
from qlip.core.arguments import parse_arguments
from qlip.core.errors import UserError, nearest_name
from qlip.recipes import RECIPES, find_recipe

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


def demo(*, out: Path = Path("runs/demo"), train_scenes: int = 40_000, test_scenes: int = 4_000, seed: int = 0) -> None:
    """Make scenes, train both stages, evaluate, and write OUT/report.html; run it again to resume.

    Example: qlip demo --out runs/demo

    Args:
        out: Folder for data, both run folders, results and the report.
        train_scenes: How many captioned scenes to train on.
        test_scenes: How many held-out scenes to evaluate on.
        seed: Seed of the scenes, the weights and the data order.
    """
    from qlip.apps.demo import run_demo

    run_demo(out, train_scenes=train_scenes, test_scenes=test_scenes, seed=seed)


def evaluate(
    model: Positional[Path],
    *,
    data: str,
    evals: tuple[str, ...] = ("reconstruction", "zero_shot"),
    max_samples: int = 2000,
    device: str = "auto",
    json: Path | None = None,
) -> None:
    """Measure a model on held-out shards; every figure is printed beside its baseline and carries its protocol card.

    Example: qlip eval runs/demo/stage2/export --data runs/demo/data/test --json result.json

    Args:
        model: Model folder, for instance a run's export folder.
        data: Shards as for training: a folder, PATH/{00000..00009}.tar, or several joined by ::.
        evals: Which evaluations: reconstruction, zero_shot.
        max_samples: Score at most so many samples.
        device: auto, cpu, cuda, ...
        json: Also write figures, details and cards to this file.
    """
    from qlip.evals.run import print_results, run_evals, write_results

    results = run_evals(model, data=data, evals=evals, max_samples=max_samples, device=device)
    print_results(results)
    if json is not None:
        write_results(json, results)


def data_scenes(
    out: Positional[Path],
    *,
    num: int,
    split: Literal["train", "test"] = "train",
    image_size: int = 64,
    object_counts: tuple[float, float, float, float] = (0.55, 0.15, 0.15, 0.15),
    format: str = "png",
    seed: int = 0,
) -> None:
    """Write captioned scenes as img2dataset shards (tar with image, txt, json; parquet; stats).

    Example: qlip data scenes data/train --num 20000

    Args:
        out: Folder for the shards, 1,000 scenes each; complete shards are kept on a second run.
        num: How many scenes.
        split: train leaves ten colour-shape pairs out, test draws all hundred.
        image_size: Side of the square pictures in pixels.
        object_counts: Probabilities of one, two, three and four objects.
        format: png, jpg or webp.
        seed: Another seed gives other scenes.
    """
    from qlip.data.scene_shards import write_scene_shards
    from qlip.data.scenes import SceneConfig

    config = SceneConfig(image_size=image_size, object_counts=object_counts, seed=seed)
    paths = write_scene_shards(out, num=num, split=split, config=config, image_format=format)
    print(f"{num} scenes in {len(paths)} shards under {out}; look at them with `qlip data inspect {out}`")


def data_inspect(src: Positional[str], *, limit: int | None = None, caption_field: str = "txt") -> None:
    """Read shards as training would and report samples, sizes, captions, and what would be skipped and why.

    Example: qlip data inspect 'PATH/{00000..00009}.tar'

    Args:
        src: A folder, PATH/{00000..00009}.tar, or several joined by ::.
        limit: Look at no more than so many samples.
        caption_field: Member that holds the caption.
    """
    from qlip.data.inspect import format_report, inspect_shards
    from qlip.data.shards import ShardConfig

    config = ShardConfig(shards=src, caption_field=caption_field)
    print(format_report(inspect_shards(src, limit=limit, config=config)))


def reconstruct(
    model: Positional[Path], images: Positional[tuple[Path, ...]], *, out: Path, device: str = "auto"
) -> None:
    """Send pictures through the tokens and back; writes each reconstruction and a sheet of before and after.

    Example: qlip reconstruct runs/demo/stage2/export photo.jpg --out looks

    Args:
        model: Model folder.
        images: Picture files.
        out: Folder for <name>.png and sheet.png.
        device: auto, cpu, cuda, ...
    """
    from qlip.apps.first_look import reconstruct_images

    reconstruct_images(model, list(images), out=out, device=device)


def classify(model: Positional[Path], image: Positional[Path], *, labels: str, device: str = "auto") -> None:
    """Score a picture against labels, most probable first.

    Example: qlip classify runs/demo/stage1/export picture.png --labels "red circle,blue star"

    Args:
        model: Model folder.
        image: Picture file.
        labels: Labels separated by commas.
        device: auto, cpu, cuda, ...
    """
    from qlip.apps.first_look import classify_image

    classify_image(model, image, labels=labels, device=device)


def export(run: Positional[Path], out: Positional[Path], *, step: int | None = None) -> None:
    """Write a run's newest checkpoint as a folder that from_pretrained reads.

    Example: qlip export runs/demo/stage1 my_model

    Args:
        run: Run folder.
        out: Folder to write.
        step: Take the checkpoint of this step instead of the newest.
    """
    from qlip.recipes.run import export_run

    export_run(run, out, step=step)


def doctor() -> None:
    """Say what this machine has: versions, devices, precision, disk, optional packages; and what does not fit."""
    from qlip.apps.doctor import print_diagnosis

    print_diagnosis()


def train(arguments: list[str]) -> None:
    """Train a recipe, or resume it: qlip train RECIPE [--field value ...]"""
    if not arguments or arguments[0] in ("-h", "--help"):
        recipes = "\n".join(f"  {name:<22}{summary}" for name, (_, summary) in RECIPES.items())
        print(TRAIN_HELP.format(recipes=recipes))
        return
    name, options = arguments[0], arguments[1:]
    base = find_recipe(name)
    from qlip.recipes.run import TrainOptions, run_recipe

    options = parse_arguments(
        TrainOptions, options, prog=f"qlip train {name}", default=TrainOptions(run=base, out=Path("runs") / name)
    )
    run_recipe(options.run, folder=options.out, accept_changes=options.accept_changes)


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "train": train,  # parses its own arguments: its options depend on the recipe
    "eval": evaluate,
    "data scenes": data_scenes,
    "data inspect": data_inspect,
    "reconstruct": reconstruct,
    "classify": classify,
    "export": export,
    "doctor": doctor,
}


def _help(group: str = "") -> str:
    """All commands, or those of a group such as `data`."""
    lines = ["usage: qlip COMMAND ...", "", "A visual tokenizer aligned with text: train, tokenize, evaluate.", ""]
    for name, function in COMMANDS.items():
        if not name.startswith(group):
            continue
        summary = (function.__doc__ or "").strip().splitlines()[0]
        lines.append(f"  {name:<14}{summary}")
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
    if name == "train":
        train(arguments[1:])
    else:
        parse_arguments(COMMANDS[name], arguments[words:], prog=f"qlip {name}")()


def _last_line(error: UserError) -> str:
    """The message without the traceback that torch puts before it when it comes from a data worker."""
    line = next((line for line in reversed(str(error).splitlines()) if line.strip()), "")
    return re.sub(r"^qlip[\w.]*Error: ", "", line.strip())


def main() -> None:
    """Entry point: exit code 0, 2 with one line for a mistake that the user can mend, 130 after Ctrl-C."""
    try:
        dispatch(sys.argv[1:])
    except UserError as error:
        print(f"qlip: {_last_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("qlip: stopped; start the same command again to go on from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None
