"""`qlip balance`: two single-objective trainings, and the paper's ratio of the losses they end with."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from statistics import fmean

import pytest
import torch

from qlip.apps.balance import OBJECTIVES, final_loss, run_balance, say_if_warmup_is_long, single_objectives
from qlip.core.errors import UserError
from qlip.core.log import read_metrics
from qlip.data.scene_shards import write_scene_shards
from qlip.data.scenes import SceneConfig
from qlip.recipes import find_recipe
from qlip.recipes.model import ModelConfig, TowerSize
from qlip.recipes.run import RunConfig
from ranks import on_ranks


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Two shards, one for each of two ranks."""
    shard = write_scene_shards(tmp_path_factory.mktemp("s"), num=24, split="train", config=SceneConfig())[0]
    shutil.copy(shard, shard.with_name("00001.tar"))
    return str(shard.parent)


def tiny(data: str, name: str = "qlip_b_16_256_small") -> RunConfig:
    """At 16 px and one layer."""
    config = find_recipe(name)
    tower = TowerSize(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24)
    config.model = ModelConfig(
        image_size=16, patch_size=8, encoder=tower, decoder=tower, text=tower, context_length=16, projection_dim=16
    )
    config.data.train, config.data.shuffle_buffer, config.data.num_workers = data, 8, 0
    config.data.batch_size = config.data.global_batch_size = 4
    config.trainer.log_every, config.trainer.device, config.trainer.compile = 1, "cpu", False
    return config


def test_the_weight_is_the_ratio_of_the_final_losses(tmp_path, data, capsys):
    """First of a real training; then of losses put in their place, from which the rule makes the paper's 1e3."""
    config = tiny(data)
    config.task.contrastive_weight = 2.0
    result = run_balance(config, out=tmp_path, steps=3)
    lines = {name: read_metrics(tmp_path / name / "metrics.jsonl") for name in OBJECTIVES}
    align, mse = lines["alignment"][-1]["contrastive"], lines["reconstruction"][-1]["mse"]
    assert result is not None and (result.alignment, result.reconstruction) == (align, mse)
    assert result.ratio == pytest.approx(align / mse)
    assert result.rounded == pytest.approx(10 ** round(math.log10(align / mse)))
    written = json.loads((tmp_path / "balance.json").read_text())
    assert (written["align_end"], written["pixel_end"], written["pixel_weight"]) == (align, mse, 2 * result.rounded)
    assert (written["recipe"], written["steps"]) == ("qlip_b_16_256_small", 3) and "torch" in written["versions"]
    (tmp_path / "alignment" / "metrics.jsonl").write_text('{"step": 3, "contrastive": 2.0}\n')
    (tmp_path / "reconstruction" / "metrics.jsonl").write_text('{"step": 3, "mse": 0.004}\n')
    capsys.readouterr()
    result = run_balance(config, out=tmp_path, steps=3)
    assert result is not None and (result.ratio, result.rounded) == pytest.approx((500, 1000))
    assert "use: --task.pixel-weight 2000\n" in capsys.readouterr().out


def test_each_training_knows_its_objective_only(tmp_path, data):
    run_balance(tiny(data), out=tmp_path, steps=2)
    align, pixels = (read_metrics(tmp_path / name / "metrics.jsonl") for name in OBJECTIVES)
    assert [line["step"] for line in align] == [line["step"] for line in pixels] == [1, 2]
    assert all("contrastive" in line and "mse" not in line for line in align)
    assert all("mse" in line and "contrastive" not in line for line in pixels)
    for name, (absent, _) in OBJECTIVES.items():
        task = json.loads((tmp_path / name / "config.json").read_text())["config"]["task"]
        kept = {"pixel_weight": 1e3, "contrastive_weight": 1.0} | {absent: 0.0}
        assert {key: task[key] for key in kept} == kept


def test_a_second_start_goes_on_and_trains_nothing_twice(tmp_path, data, monkeypatch, capsys):
    """Stopped between the two trainings; then both are there and only told of."""
    config = tiny(data)
    trained = []
    import qlip.apps.balance as app

    real = app.run_recipe

    def stop_after_the_first(run: RunConfig, *, folder: Path) -> Path:
        if trained:
            raise KeyboardInterrupt
        trained.append(folder.name)
        return real(run, folder=folder)

    monkeypatch.setattr(app, "run_recipe", stop_after_the_first)
    with pytest.raises(KeyboardInterrupt):
        run_balance(config, out=tmp_path, steps=2)
    assert trained == ["alignment"] and not (tmp_path / "balance.json").exists()
    monkeypatch.setattr(app, "run_recipe", real)
    weights = tmp_path / "alignment" / "export" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    first = run_balance(config, out=tmp_path, steps=2)
    assert weights.stat().st_mtime_ns == before
    capsys.readouterr()
    assert run_balance(config, out=tmp_path, steps=2) == first
    assert capsys.readouterr().out.count("is finished (2 steps)") == 2
    config.task.optimizer.lr = 1e-5
    with pytest.raises(UserError, match=r"was started with another config: task\.optimizer\.lr"):
        run_balance(config, out=tmp_path, steps=2)


def balanced(data: str, folder: str) -> dict[str, float]:
    config = tiny(data)
    config.data.batch_size = 2
    result = run_balance(config, out=Path(folder), steps=2)
    return {} if result is None else {"ratio": result.ratio}


@pytest.mark.slow
def test_two_processes_train_both_objectives_in_one_start(tmp_path, data):
    first, second = on_ranks(balanced, data, str(tmp_path / "b"), num_ranks=2, folder=tmp_path / "ranks")
    assert first["ratio"] > 0 and second == {}
    assert json.loads((tmp_path / "b" / "balance.json").read_text())["ratio"] == first["ratio"]


def test_the_end_is_the_mean_of_the_last_tenth(tmp_path):
    losses = torch.rand(40, dtype=torch.float64).tolist()
    lines = [{"step": step, "mse": loss} for step, loss in enumerate(losses)]
    lines += [{"step": 40, "skipped_steps": 1.0}, {"step": 40, "eval": "reconstruction", "mse": 99.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert final_loss(tmp_path, "mse") == pytest.approx(fmean(losses[-4:]))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "mse": 0.5}\n{"step": 2, "mse": 0.25}\n')
    assert final_loss(tmp_path, "mse") == 0.25
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "mse": null}\n')
    assert math.isnan(final_loss(tmp_path, "mse"))
    with pytest.raises(UserError, match="has logged no 'contrastive'"):
        final_loss(tmp_path, "contrastive")


def test_the_default_length_is_the_recipes(data):
    config = tiny(data)
    runs = single_objectives(config, steps=0)
    assert {run.trainer.steps for run in runs.values()} == {14_000}
    config.task.balance = "running"  # would need both losses
    assert {run.task.balance for run in single_objectives(config, steps=5).values()} == {"fixed"}
    assert (config.task.pixel_weight, config.trainer.steps, config.task.balance) == (1e3, 14_000, "running")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("scenes_tiny_stage2", "recipe scenes_tiny_stage2 is of stage 2, which does not align: give a stage-1 recipe"),
        ("clip_b_16", "recipe clip_b_16 has one objective only, nothing to balance: give a recipe with both"),
        ("bsqvit_b_16", "recipe bsqvit_b_16 has one objective only"),
    ],
)
def test_what_cannot_be_balanced_is_one_line(tmp_path, name, said):
    with pytest.raises(UserError, match=said) as error:
        run_balance(find_recipe(name), out=tmp_path / "out", steps=2)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_long_warmup_is_pointed_out(tmp_path, data, capsys):
    config = tiny(data)
    for warmup, said in ((500, "the warm-up takes 500 of 2 steps"), (0, "")):
        config.task.optimizer.warmup_steps = warmup
        say_if_warmup_is_long(single_objectives(config, steps=2)["alignment"])
        out = capsys.readouterr().out
        assert said in out and bool(said) == bool(out)
