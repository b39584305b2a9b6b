"""Non-finite steps move no weight, leave a record, are skipped or stop the run; a series of them rolls back once."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import torch
from tiny_training import CountingLoader, LinearTask, no_tracker
from torch import Tensor, nn

from qlip.core.log import read_metrics
from qlip.engine.guards import CollapseWatch, FiniteGuard, NonFiniteStepError, StepPlace
from qlip.engine.trainer import Trainer, TrainerConfig, train

NAN, INF = float("nan"), float("inf")


def place(folder: Path) -> StepPlace:
    return StepPlace(step=7, phase="decoder", folder=folder, device=torch.device("cpu"))


def batch(pixels: Tensor) -> dict:
    return {"pixel_values": pixels, "key": ["a", "b", "c"][: len(pixels)]}


def test_finite_values_pass_without_a_record(tmp_path):
    guard = FiniteGuard("stop", max_skipped_steps=0)
    values = {"loss": torch.tensor(1.0)}
    assert guard.allows(
        values, batches=[batch(torch.zeros(1, 3, 2, 2))], modules=nn.ModuleDict(), place=place(tmp_path)
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_record_has_place_values_keys_pictures_norms_history_and_random_state(tmp_path, bad):
    pixels = torch.zeros(3, 3, 2, 2)
    pixels[1, 0, 0, 0] = NAN
    modules = nn.ModuleDict({"model": nn.Sequential(nn.Linear(2, 1, bias=False))})
    modules["model"][0].weight.data = torch.tensor([[3.0, 4.0]])
    modules["model"][0].weight.grad = torch.tensor([[INF, 0.0]])
    guard = FiniteGuard("stop", max_skipped_steps=0)
    guard.allows({"pixel_loss": torch.tensor(0.5)}, batches=[], modules=modules, place=place(tmp_path))
    values = {"pixel_loss": torch.tensor(bad), "loss": torch.tensor(2.0)}
    with pytest.raises(NonFiniteStepError, match=r"step 7 \(decoder\): pixel_loss not finite") as stopped:
        guard.allows(values, batches=[batch(pixels[:1]), batch(pixels)], modules=modules, place=place(tmp_path))
    assert "\n" not in str(stopped.value)
    record = json.loads((tmp_path / "nonfinite_step_00000007_rank0.json").read_text())
    random_state = record.pop("cpu_random_state")
    assert torch.equal(torch.tensor(list(base64.b64decode(random_state)), dtype=torch.uint8), torch.get_rng_state())
    assert record == {
        "step": 7,
        "phase": "decoder",
        "rank": 0,
        "values": {"pixel_loss": str(bad), "loss": 2.0},
        "keys": [["a"], ["a", "b", "c"]],
        "nonfinite_pixels": ["b"],
        "norms": {"model.0.weight": {"weight": 5.0, "gradient": "inf"}},
        "recent": [
            {"step": 7, "phase": "decoder", "pixel_loss": 0.5},
            {"step": 7, "phase": "decoder", "pixel_loss": str(bad), "loss": 2.0},
        ],
    }


class EndlessSlope(LinearTask):
    """A finite loss whose gradient is infinite at step 3."""

    def loss(self, phase, batch, step):
        fitted = self.model(batch["pixel_values"].flatten(1))
        zero = (fitted - fitted.detach()).abs().sum()
        return {"fit_loss": fitted.square().mean() + (zero.sqrt() if step == 3 else 0.0)}


def run(task: LinearTask, folder: Path, **changes) -> None:
    options = {"steps": 10, "log_every": 1, "save_every": 2, "device": "cpu", "precision": "fp32"}
    config = TrainerConfig(**(options | changes))
    train(
        task,
        CountingLoader(),
        config,
        folder=folder,
        title="t",
        batch_size=4,
        evaluators={},
        tracker=no_tracker,
        export=lambda model: torch.save(model.state_dict(), folder / "exported.pt"),
    )


def recording(task: LinearTask) -> dict[int, dict[str, Tensor]]:
    """The weights at the start of every step, filled while the task trains."""
    weights, whole = {}, task.loss

    def loss(phase, batch, step):
        weights[step] = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
        return whole(phase, batch, step)

    task.loss = loss
    return weights


TASKS = [lambda: LinearTask(poison={3: NAN}), EndlessSlope]


@pytest.mark.parametrize("make_task", TASKS, ids=["loss", "gradient"])
def test_a_run_told_to_stops_at_step_3_with_the_weights_of_step_3(tmp_path, make_task):
    task = make_task()
    weights = recording(task)
    with pytest.raises(NonFiniteStepError, match=r"step 3 \(fit\)"):
        run(task, tmp_path, nonfinite="stop")
    for name, tensor in task.model.state_dict().items():
        assert torch.equal(tensor, weights[3][name])
        assert not torch.equal(tensor, weights[2][name])
    assert not (tmp_path / "exported.pt").exists()
    record = json.loads((tmp_path / "nonfinite_step_00000003_rank0.json").read_text())
    assert record["keys"] == [["4-0", "4-1", "4-2", "4-3"]]
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    options = {"steps": 10, "save_every": 2, "device": "cpu", "precision": "fp32"}
    again = Trainer(LinearTask(), CountingLoader(), TrainerConfig(**options), tmp_path)
    again.resume()
    assert again.step == 2


@pytest.mark.parametrize("make_task", TASKS, ids=["loss", "gradient"])
def test_a_skipped_step_moves_nothing_and_training_goes_on(tmp_path, make_task, capsys):
    task = make_task()
    weights = recording(task)
    run(task, tmp_path, ema_decay=0.5)
    assert all(torch.equal(weights[4][name], weights[3][name]) for name in weights[3])
    assert not any(torch.equal(weights[5][name], weights[4][name]) for name in weights[4])
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["step"] for line in lines if line.get("skipped_steps")] == [4]
    assert "loss" not in lines[3] and all(line["loss"] > 0 for line in lines if line["step"] != 4)
    assert "step 3 (fit): " in capsys.readouterr().out
    assert all(bool(tensor.isfinite().all()) for tensor in torch.load(tmp_path / "exported.pt").values())


def test_too_many_skipped_steps_roll_back_and_a_passing_fault_is_forgotten(tmp_path, capsys):
    """Steps 3 to 5 fail the first time; after the roll-back to step 2 the same data are read again and pass."""
    task, straight = LinearTask(), LinearTask()
    whole, failing = task.loss, {3, 4, 5}

    def loss(phase, batch, step):
        terms = whole(phase, batch, step)
        if step in failing:
            failing.remove(step)
            return {"fit_loss": terms["fit_loss"] * NAN}
        return terms

    task.loss = loss
    (tmp_path / "straight").mkdir()
    run(task, tmp_path, max_skipped_steps=2)
    run(straight, tmp_path / "straight", max_skipped_steps=2)
    assert "3 steps in a row: going back to step 2" in capsys.readouterr().out
    ours, others = (torch.load(folder / "exported.pt") for folder in (tmp_path, tmp_path / "straight"))
    assert ours.keys() == others.keys() and all(torch.equal(ours[name], others[name]) for name in ours)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 11))


def test_a_fault_that_stays_stops_after_one_roll_back(tmp_path):
    task = LinearTask(poison=dict.fromkeys(range(5, 10), NAN))
    with pytest.raises(NonFiniteStepError, match="the same as before the roll-back; lower the learning rate"):
        run(task, tmp_path, max_skipped_steps=1, save_every=4)
    assert sorted(path.name for path in tmp_path.glob("nonfinite*")) == [
        f"nonfinite_step_{step:08d}_rank0.json" for step in (5, 6)
    ]
    (tmp_path / "never").mkdir()
    with pytest.raises(NonFiniteStepError, match="no checkpoint to go back to"):
        run(LinearTask(poison=dict.fromkeys(range(10), NAN)), tmp_path / "never", max_skipped_steps=1, save_every=4)


def test_symptoms_warn_once_after_several_lines(capsys):
    watch = CollapseWatch(lines=3)
    healthy = {"bits_alive": 1.0, "bit_entropy": 0.68, "discriminator/discriminator_loss": 0.6}
    sick = {"bits_alive": 0.75, "bit_entropy": 0.1, "discriminator/discriminator_loss": 0.01}
    assert watch.look(1, healthy) == watch.look(2, sick) == watch.look(3, sick) == []
    warnings = watch.look(4, sick)
    assert [line.split(":")[0] for line in warnings] == ["warning at step 4"] * 3
    assert "75% of the bits are alive" in warnings[0] and "0.10 nats" in warnings[1] and "it has won" in warnings[2]
    assert watch.look(5, sick) == []
    assert watch.look(6, healthy) == watch.look(7, sick) == watch.look(8, sick) == [] != watch.look(9, sick)
    assert "collapsing" in capsys.readouterr().out
