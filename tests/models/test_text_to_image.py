"""The generator looks at captions and the past alone, turns by row and column, and comes back from its files."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_generators import HEADS, captions, some_bits, tiny_config, tiny_generator
from torch import Tensor

from qlip.models.text_to_image import ImageRotary, TextToImageConfig, TextToImageModel, causal_mask

POSITIONS = {"flat": 2, "depth": 1, "bitwise": 1}


@pytest.mark.parametrize("head", HEADS)
def test_a_later_token_changes_no_earlier_likelihood(head):
    model, (features, mask) = tiny_generator(head), captions()
    bits = some_bits()
    with torch.no_grad():
        before = model(features, mask, bits).nll
        for token in range(6):
            other = bits.clone()
            other[:, token] ^= True
            after = model(features, mask, other).nll
            own = token * POSITIONS[head]
            assert torch.equal(after[:, :own], before[:, :own])
            assert not torch.equal(after[:, own:], before[:, own:])
            if token < 5:
                assert (after[:, own + POSITIONS[head] :] != before[:, own + POSITIONS[head] :]).any(1).all()


@pytest.mark.parametrize("head", HEADS)
def test_what_stands_in_padding_never_matters_and_what_a_caption_says_does(head):
    model, (features, mask) = tiny_generator(head), captions()
    noise = torch.where(mask[..., None], features, 100 * torch.randn_like(features))
    changed = torch.where(mask[..., None], features + 0.5, features)
    with torch.no_grad():
        found, same, other = (model(given, mask, some_bits()).nll for given in (features, noise, changed))
    assert torch.equal(found, same)
    assert (found != other).any(1).all()


def test_a_dropped_caption_is_the_empty_one():
    model, (features, mask) = tiny_generator(), captions()
    dropped = torch.tensor([True, False, True])
    empty = model.empty_caption.expand(3, -1, -1)
    with torch.no_grad():
        found = model(features, mask, some_bits(), dropped=dropped).nll
        kept = model(features, mask, some_bits()).nll
        gone = model(empty, torch.ones_like(mask), some_bits()).nll
    assert torch.allclose(found, torch.where(dropped[:, None], gone, kept), atol=1e-6)
    assert not torch.equal(found[0], kept[0]) and empty.std() > 0.1


def test_the_share_of_dropped_captions_in_training():
    model = tiny_generator(caption_dropout=0.25).train()
    features, mask = captions(1)
    with torch.no_grad():
        found = model(features.expand(400, -1, -1), mask.expand(400, -1), some_bits(1).expand(400, -1, -1)).nll
        gone = model(features, mask, some_bits(1), dropped=torch.tensor([True])).nll
    share = (found - gone).abs().amax(1).lt(1e-4).float().mean().item()
    assert share == pytest.approx(0.25, abs=0.07)


def test_a_learned_table_reads_ids():
    model = tiny_generator(caption_encoder="learned", caption_vocab_size=10)
    torch.nn.init.normal_(model.caption_positions)
    ids, mask = torch.tensor([[9, 9, 1, 2], [0, 0, 3, 3]]), torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]])
    features = model.caption_embedding.weight[ids] + model.caption_positions
    same = tiny_generator(caption_encoder="t5")
    same.load_state_dict({name: t for name, t in model.state_dict().items() if not name.startswith("caption_e")}, False)
    with torch.no_grad():
        found = model(ids, mask, some_bits(2)).nll
        assert torch.equal(found, same(features, mask, some_bits(2)).nll)
        assert torch.equal(found, model(torch.where(mask > 0, ids, 5), mask, some_bits(2)).nll)


def test_captions_of_another_length_are_refused():
    features, mask = captions(length=5)
    with pytest.raises(ValueError, match="captions of 5 slots, but this model takes 4, padded on the left"):
        tiny_generator()(features, mask, some_bits())


def turned(x: Tensor, row: int, column: int) -> Tensor:
    """One head (h,) turned by hand: pairs (i, i + h/2), the first quarter by the row, the second by the column."""
    half, quarter = len(x) // 2, len(x) // 4
    out = x.clone()
    for i in range(half):
        angle = torch.tensor((row if i < quarter else column) * 10_000.0 ** (-(i % quarter) / quarter))
        out[i] = x[i] * angle.cos() - x[i + half] * angle.sin()
        out[i + half] = x[i + half] * angle.cos() + x[i] * angle.sin()
    return out


@pytest.mark.parametrize("per_token", [1, 2, 4])
def test_captions_do_not_turn_and_tokens_turn_by_row_and_column(per_token):
    config = tiny_config(grid=[3, 5], hidden_size=32)
    positions = torch.arange(4 + 15 * per_token)[None]
    rotary = ImageRotary(config, positions_per_token=per_token)
    cosine, sine = rotary(torch.zeros(1), positions)
    assert cosine.shape == (1, 4 + 15 * per_token, 16)
    assert torch.equal(cosine[0, :4], torch.ones(4, 16)) and not sine[0, :4].any()
    query = torch.randn(16)
    for place in range(15 * per_token):
        row, column = divmod(place // per_token, 5)
        rotated = torch.cat([-query[8:], query[:8]])
        found = query * cosine[0, 4 + place] + rotated * sine[0, 4 + place]
        assert torch.allclose(found, turned(query, row, column), atol=1e-5)
    angles = torch.stack([cosine, sine])[:, 0, 4:].unflatten(1, (15, per_token))
    assert torch.equal(angles, angles[:, :, :1].expand_as(angles))  # sub-codes of a patch share theirs
    low = rotary(torch.zeros(1, dtype=torch.bfloat16), positions)
    assert low[0].dtype == torch.bfloat16 and torch.equal(low[1], sine.bfloat16())


def test_masks_keep_the_past_without_padding_and_the_diagonal():
    mask = torch.tensor([[False, False, True], [True, True, True]])
    found = causal_mask(mask, length=5, num_keys=7)
    for row in range(2):
        for query in range(5):
            for key in range(7):
                real = key >= 3 or bool(mask[row, key])
                assert found[row, 0, query, key] == (key == query or (key < query and real))
    assert torch.equal(causal_mask(mask, length=5), found[..., :5])


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("encoder", ["t5", "learned"])
def test_files_bring_back_every_tensor(tmp_path, head, encoder):
    model = tiny_generator(head, caption_encoder=encoder, caption_vocab_size=10)
    model.save_pretrained(tmp_path)
    again, info = TextToImageModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and "empty_caption" in ours
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    caption, mask = captions()
    caption = torch.arange(12).reshape(3, 4) % 10 if encoder == "learned" else caption
    with torch.no_grad():
        assert torch.equal(model(caption, mask, some_bits()).nll, again(caption, mask, some_bits()).nll)


def test_the_state_dict_alone_is_the_whole_model():
    model, other = tiny_generator(seed=1), tiny_generator(seed=2)
    assert not torch.equal(model.empty_caption, other.empty_caption)
    other.load_state_dict(model.state_dict())
    everything = {"dropped": torch.ones(3, dtype=torch.bool)}
    with torch.no_grad():
        first, second = (each(*captions(), some_bits(), **everything).nll for each in (model, other))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head": "deep"}, "head 'deep' is unknown; known: flat, depth, bitwise"),
        ({"caption_encoder": "bert"}, "caption_encoder 'bert' is unknown"),
        ({"hidden_size": 12}, "must be a whole multiple of 4"),
        ({"hidden_size": 17}, "must be a whole multiple of 4"),
        ({"division": [3, 2]}, r"division \[3, 2\] does not make num_bits 6"),
        ({"num_bits": 28, "division": [28]}, "give sub-codes of 1 to 16 bits each"),
        ({"division": [6, 0]}, "give sub-codes of 1 to 16 bits each"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0: give at least 1"),
        ({"caption_length": 0}, "caption_length is 0: give at least 1"),
        ({"caption_width": -3}, "caption_width is -3: give at least 1"),
        ({"num_bits": 1, "division": []}, r"division \[1, 0\]: give sub-codes of 1 to 16 bits each"),
        ({"num_bits": 0}, "num_bits is 0: give at least 1"),
        ({"grid": [2, 0]}, r"grid \[2, 0\]"),
        ({"grid": [6]}, r"grid \[6\]"),
        ({"caption_dropout": 1.0}, "caption_dropout is 1.0: give 0 or more, below 1"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"bit_flips": float("nan")}, "bit_flips is nan"),
        ({"hidden_size": 16.5}, "hidden_size"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_configs_that_cannot_be_are_refused(changes, said):
    with pytest.raises(Exception, match=said) as error:
        tiny_config(**changes)
    assert type(error.value).__name__.startswith("StrictDataclass")


def test_defaults_are_llamagens():
    config = TextToImageConfig()
    assert (config.grid, config.num_tokens, config.division) == ([16, 16], 256, [14, 14])
    assert (config.caption_length, config.caption_width, config.caption_dropout) == (120, 2048, 0.1)
    assert (config.guidance, config.dropout, config.rms_norm_eps) == (7.5, 0.1, 1e-5)
    assert TextToImageConfig(num_bits=5).division == [3, 2]


def test_flipped_bits_change_the_history_only():
    """With every bit of the history flipped or none, targets stay: the loss is that of the true bits."""
    model, (features, mask) = tiny_generator("bitwise", bit_flips=0.5, caption_dropout=0.0), captions()
    bits = some_bits()
    with torch.no_grad():
        quiet = model(features, mask, bits).nll
        assert torch.equal(model(features, mask, bits).nll, quiet)  # none in evaluation
        flipped = model.train()(features, mask, bits).nll
    assert torch.allclose(flipped[:, 0], quiet[:, 0], atol=1e-6)  # no history before the first token
    assert (flipped[:, 1:] != quiet[:, 1:]).any(1).all()


def test_dropout_is_for_training_alone_and_goes_with_copies():
    """Averaged weights live in a deep copy, which must obey its own mode."""
    model, (features, mask) = tiny_generator(dropout=0.5), captions()
    kept = torch.zeros(3, dtype=torch.bool)

    def found(part: TextToImageModel) -> Tensor:
        with torch.no_grad():
            return part(features, mask, some_bits(), dropped=kept).nll

    quiet = found(model)
    assert torch.equal(found(model), quiet)
    average = copy.deepcopy(model)
    model.train()
    assert not torch.equal(found(model), quiet) and not torch.equal(found(model), found(model))
    assert torch.equal(found(average), quiet)


def test_fresh_weights_begin_as_the_table_says():
    model = TextToImageModel(tiny_config("depth", caption_encoder="learned", hidden_size=64, initializer_range=0.05))
    for name, tensor in model.state_dict().items():
        if name.endswith("output.weight") or name == "caption_positions":
            assert not tensor.any(), name
        elif "norm" in name:
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        elif name == "empty_caption":
            assert tensor.std().item() == pytest.approx(8**-0.5, rel=0.3)
        else:
            assert tensor.std().item() == pytest.approx(0.05, rel=0.2), name


@pytest.mark.parametrize("head", HEADS)
def test_every_weight_learns(head):
    model = tiny_generator(head, caption_encoder="learned", caption_vocab_size=4).train()
    ids = torch.arange(8).reshape(2, 4) % 4
    model(ids, torch.ones(2, 4), some_bits(2), dropped=torch.zeros(2, dtype=torch.bool)).loss.backward()
    idle = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert idle == []
