"""A non-finite loss or gradient stops the run before a weight moves, and leaves a record that names the samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_training import CountingLoader, LinearTask

from qlip.core.log import read_metrics
from qlip.engine.guards import NonFiniteStepError, StepPlace, stop_unless_finite
from qlip.engine.trainer import Trainer, TrainerConfig, train

NAN, INF = float("nan"), float("inf")


def place(folder: Path) -> StepPlace:
    return StepPlace(step=7, phase="decoder", folder=folder, device=torch.device("cpu"))


def test_finite_values_pass_without_a_record(tmp_path):
    batch = {"pixel_values": torch.zeros(1, 3, 2, 2), "key": ["a"]}
    stop_unless_finite({"loss": torch.tensor(1.0)}, batch=batch, place=place(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_record_names_step_phase_values_keys_and_the_pictures_at_fault(tmp_path, bad):
    pixels = torch.zeros(3, 3, 2, 2)
    pixels[1, 0, 0, 0] = NAN
    values = {"pixel_loss": torch.tensor(bad), "loss": torch.tensor(2.0)}
    with pytest.raises(NonFiniteStepError, match=r"step 7 \(decoder\): pixel_loss not finite") as stopped:
        stop_unless_finite(values, batch={"pixel_values": pixels, "key": ["a", "b", "c"]}, place=place(tmp_path))
    assert "\n" not in str(stopped.value)
    record = json.loads((tmp_path / "nonfinite_step_00000007.json").read_text())
    assert record == {
        "step": 7,
        "phase": "decoder",
        "values": {"pixel_loss": str(bad), "loss": 2.0},
        "keys": ["a", "b", "c"],
        "nonfinite_pixels": ["b"],
    }


class EndlessSlope(LinearTask):
    """A finite loss whose gradient is infinite at step 3."""

    def loss(self, phase, batch, step):
        fitted = self.model(batch["pixel_values"].flatten(1))
        zero = (fitted - fitted.detach()).abs().sum()
        return {"fit_loss": fitted.square().mean() + (zero.sqrt() if step == 3 else 0.0)}


@pytest.mark.parametrize("task", [LinearTask(poison={3: NAN}), EndlessSlope()], ids=["loss", "gradient"])
def test_the_trainer_stops_at_step_3_with_the_weights_of_step_3(tmp_path, task):
    def untouched(model):
        raise AssertionError("a stopped run exports nothing")

    weights = {}
    whole = task.loss

    def loss(phase, batch, step):
        weights[step] = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
        return whole(phase, batch, step)

    task.loss = loss
    config = TrainerConfig(steps=10, log_every=1, save_every=2, device="cpu", precision="fp32")
    with pytest.raises(NonFiniteStepError, match=r"step 3 \(fit\)"):
        train(
            task,
            CountingLoader(),
            config,
            folder=tmp_path,
            title="t",
            batch_size=4,
            evaluators={},
            export=untouched,
        )
    for name, tensor in task.model.state_dict().items():
        assert torch.equal(tensor, weights[3][name])
        assert not torch.equal(tensor, weights[2][name])
    record = json.loads((tmp_path / "nonfinite_step_00000003.json").read_text())
    assert record["keys"] == ["4-0", "4-1", "4-2", "4-3"]
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    again = Trainer(LinearTask(), CountingLoader(), config, tmp_path)
    again.resume()
    assert again.step == 2
