"""Next-token training learns a batch by heart, of bits or of the pictures they come from."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny_qlip import scene_batch, tiny_model, trainer_of

from qlip.core.pixels import to_uint8
from qlip.engine.interfaces import Batch, OptimizerConfig
from qlip.models.caption_encoder import CaptionEncoder, open_caption_encoder
from qlip.models.image_tokenizer import QLIPTokenizer
from qlip.models.measured import MeasuredQLIP
from qlip.models.qlip.processing import QLIPProcessor
from qlip.models.text_to_image import TextToImageConfig, TextToImageModel
from qlip.tasks.next_token import NextTokenConfig, NextTokenTask

HEADS = ("flat", "depth", "bitwise")


def config(head: str = "depth", **changes: object) -> TextToImageConfig:
    """2 x 2 tokens of 28 bits after 8 caption slots, width 32."""
    fields: dict[str, object] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "initializer_range": 0.1,
        "head": head,
        "grid": [2, 2],
        "division": [7, 7, 7, 7],
        "depth_layers": 1,
        "dropout": 0.0,
        "caption_encoder": "learned",
        "caption_width": 16,
        "caption_length": 8,
        "caption_dropout": 0.0,
    }
    return TextToImageConfig(**(fields | changes))


@pytest.fixture(scope="module")
def tokenizer() -> QLIPTokenizer:
    return QLIPTokenizer(MeasuredQLIP(tiny_model().eval(), QLIPProcessor.for_size(16, context_length=8)))


@pytest.fixture(scope="module")
def captions() -> CaptionEncoder:
    return open_caption_encoder(config(), tokenizer_model=None)


@pytest.fixture(scope="module")
def pictures(captions: CaptionEncoder) -> Batch:
    """Four scenes with four texts."""
    batch = scene_batch(4)
    return batch | captions.tokenize(["a red star", "a blue ring", "two squares", "nothing"])


@pytest.fixture(scope="module")
def tokens(pictures: Batch, tokenizer: QLIPTokenizer) -> Batch:
    """The same as bits."""
    bits = tokenizer.encode(to_uint8(pictures["pixel_values"])).clone()
    return {name: value for name, value in pictures.items() if name != "pixel_values"} | {"bits": bits}


def task_of(captions: CaptionEncoder, *, head: str = "depth", tokenizer: QLIPTokenizer | None = None) -> NextTokenTask:
    torch.manual_seed(0)
    settings = NextTokenConfig(optimizer=OptimizerConfig(name="adamw", lr=0.02, warmup_steps=5, clip_norm=1.0))
    return NextTokenTask(TextToImageModel(config(head)), settings, captions=captions, tokenizer=tokenizer)


@pytest.mark.parametrize("head", HEADS)
def test_it_learns_four_pictures_by_heart(tmp_path: Path, captions: CaptionEncoder, tokens: Batch, head: str) -> None:
    """From the uniform guess to less than a tenth of it, and of other captions it knows nothing."""
    task = task_of(captions, head=head)
    trainer = trainer_of(task, tmp_path, steps=40)
    losses = [float(trainer.train_step([tokens])["token_loss"]) for _ in range(40)]
    assert losses[0] == pytest.approx(28 * math.log(2), rel=1e-5)
    assert losses[-1] < losses[0] / 10
    swapped = tokens | {"bits": tokens["bits"].flip(0)}
    with torch.no_grad():
        right, wrong = (task.loss(task.phases(0)[0], batch, 40) for batch in (tokens, swapped))
    assert wrong["token_loss"] > 3 * right["token_loss"]
    assert right["bits_per_bit"].item() == pytest.approx(right["token_loss"].item() / (28 * math.log(2)))


def test_pictures_give_the_loss_of_their_bits(
    captions: CaptionEncoder, tokenizer: QLIPTokenizer, pictures: Batch, tokens: Batch
) -> None:
    task = task_of(captions, tokenizer=tokenizer)
    for output in (part for name, part in task.model.head.named_modules() if name.endswith("output")):
        torch.nn.init.normal_(output.weight)
    phase, gradients, losses = task.phases(0)[0], [], []
    for batch in (pictures, tokens):
        task.model.zero_grad()
        losses.append(task.loss(phase, batch, 0)["token_loss"])
        losses[-1].backward()
        gradients.append([parameter.grad.clone() for parameter in task.model.parameters()])
    assert torch.equal(losses[0], losses[1]) and losses[0] > 20
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))
    assert not any(parameter.grad is not None for parameter in tokenizer.measured.model.parameters())


def test_one_phase_trains_the_generator_alone(captions: CaptionEncoder, tokenizer: QLIPTokenizer) -> None:
    task = task_of(captions, tokenizer=tokenizer)
    assert set(task.modules()) == {"model"} and task.phases(0) == task.phases(10)
    (phase,) = task.phases(3)
    assert phase.modules == ("model",) and phase.optimizer.lr == 0.02
    defaults = NextTokenConfig().optimizer
    assert (defaults.name, defaults.lr, defaults.betas, defaults.weight_decay, defaults.clip_norm) == (
        *("adamw", 1e-4, (0.9, 0.95)),
        *(0.05, 1.0),
    )


def test_pictures_without_a_tokenizer_are_a_programmers_mistake(captions: CaptionEncoder, pictures: Batch) -> None:
    task = task_of(captions)
    with pytest.raises(AssertionError, match="pictures need a tokenizer"):
        task.loss(task.phases(0)[0], pictures, 0)


def test_what_is_dropped_depends_on_seed_step_micro_batch_and_rank(monkeypatch, tokenizer, captions, pictures):
    batch = {name: pictures[name] for name in ("input_ids", "attention_mask")}
    batch["bits"] = tokenizer.encode(to_uint8(pictures["pixel_values"])).clone()
    torch.manual_seed(0)
    model = TextToImageModel(config(dropout=0.3)).train()
    for part in model.head.modules():
        if isinstance(part, torch.nn.Linear):
            torch.nn.init.normal_(part.weight, std=0.3)

    def losses(*, seed: int = 0, steps: tuple[int, ...] = (5, 5), rank: int = 0) -> list[float]:
        monkeypatch.setattr("qlip.tasks.next_token.rank", lambda: rank)
        task = NextTokenTask(model, NextTokenConfig(), captions=captions, seed=seed)
        return [task.loss(task.phases(step)[0], batch, step)["token_loss"].item() for step in steps]

    first, second = losses()
    assert losses() == [first, second] and first != second
    assert losses(steps=(4, 5))[1] == first  # a resumed run draws what an uninterrupted one did
    assert losses(seed=1)[0] != first and losses(rank=1)[0] != first
