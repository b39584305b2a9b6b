"""`qlip check` names every file that a run will miss, with its remedy; sizes are those of the model in `task.init`."""

from __future__ import annotations

from pathlib import Path

import pytest
from check_options import options

from qlip.apps.check import check, print_report
from qlip.apps.check_files import meta_model, not_ready
from qlip.models.qlip.modeling import QLIPModel


def small_model_folder(folder: Path, *, width: int) -> Path:
    wide = ("--model.encoder.hidden-size", str(width), "--model.decoder.hidden-size", str(width))
    config = options("scenes_tiny", *wide).run
    QLIPModel(config.model.build_config()).save_pretrained(folder)
    return folder


def test_files_that_are_there_make_it_ready(tmp_path, capsys):
    for number in range(2):
        (tmp_path / f"{number:05d}.tar").touch()
    init = small_model_folder(tmp_path / "model", width=24)
    words = ("--data.train", str(tmp_path), "--data.num-workers", "2", "--task.init", str(init))
    report = check(options("scenes_tiny", *words))
    assert report.problems == []
    encoder = next(part for part in report.parts if part.name == "vision encoder")
    ours = next(part for part in check(options("scenes_tiny")).parts if part.name == "vision encoder")
    assert encoder.parameters > ours.parameters  # the folder's width, not the recipe's
    print_report(report)
    assert "ready: qlip train scenes_tiny finds its files" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("recipe", "words", "said"),
    [
        ("scenes_tiny", ("--data.train", "nowhere/{00..01}.tar"), "shard nowhere/00.tar is not there (2 of 2 missing)"),
        ("scenes_tiny", ("--evals.data", "nowhere.tar"), "nowhere.tar is not there"),
        ("scenes_tiny", ("--trainer.eval-every", "5"), "trainer.eval_every has nothing to measure: add --evals.data"),
        ("scenes_tiny", ("--data.global-batch-size", "12"), "is not a multiple of 2 processes x data.batch_size 8"),
        ("scenes_tiny", ("--trainer.parallel", "none"), "trainer.parallel is none with 2 GPUs: take"),
        ("scenes_tiny_stage2", ("--task.perceptual", "lpips"), "LPIPS has no VGG-16 weights: fetch https://"),
        (
            "scenes_tiny_stage2",
            ("--task.perceptual", "lpips", "--task.vgg-weights", "vgg.pth"),
            "no VGG-16 weights at vgg.pth: fetch",
        ),
    ],
)
def test_what_is_missing_is_one_line_with_its_remedy(recipe, words, said):
    problems = not_ready(options(recipe, *words).run, num_gpus=2)
    assert [problem for problem in problems if said in problem] and all("\n" not in problem for problem in problems)


def test_a_start_that_is_not_there_leaves_the_recipes_sizes(tmp_path):
    model, problems = meta_model(options("scenes_tiny_stage2").run)
    assert problems == ["stage 2 starts from a stage-1 model: add --task.init RUN/export; the sizes are the recipe's"]
    assert model.config.vision_config.hidden_size == 16
    _, problems = meta_model(options("scenes_tiny", "--task.init", "nowhere").run)
    assert "task.init nowhere is no folder here" in problems[0] and "sizes below are the recipe's" in problems[0]
    _, problems = meta_model(options("scenes_tiny", "--task.init", str(tmp_path)).run)
    assert str(tmp_path) in problems[0]
