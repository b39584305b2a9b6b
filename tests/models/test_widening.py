"""A random Llama 3 widened: the same logits without QK-norm, the documented difference with it, rows at the mean."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from qlip.core.errors import UserError
from qlip.models.widening import (
    BEGIN,
    END,
    RESERVED,
    WideningConfig,
    add_image_markers,
    division_of,
    match_qk_norm,
    widen,
)
from tiny_unified import tiny_llama

IMAGES = SimpleNamespace(num_bits=8, grid=(2, 2), encoder_fingerprint="f" * 64, name="QLIPModel", image_size=16)
LAYOUTS = pytest.mark.parametrize("reserved", [True, False], ids=["reserved ids", "new ids"])
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def some_text(tokenizer, *, rows: int = 3, length: int = 40) -> Tensor:
    """Ids of random text, no markers; longer than the rotary scaling's original context would have to be."""
    special = set(tokenizer.all_special_ids)
    plain = torch.tensor([id for id in range(len(tokenizer)) if id not in special])
    return plain[torch.randint(len(plain), (rows, length))]


def widened(llama, tokenizer, **config):
    """With four sub-codes of two bits."""
    return widen(llama, tokenizer, IMAGES, WideningConfig(**({"division": (2, 2, 2, 2)} | config)))


@TIED
@LAYOUTS
def test_text_logits_are_those_of_the_llama_without_qk_norm(tied, reserved):
    llama, tokenizer = tiny_llama(tied=tied, reserved=reserved)
    ids = some_text(tokenizer)
    before = llama(ids).logits
    model = widened(llama, tokenizer, qk_norm=False)
    after = model(ids).logits
    begin, end = model.config.image_begin_id, model.config.image_end_id
    kept = [id for id in range(before.shape[-1]) if id not in (begin, end)]
    torch.testing.assert_close(after[..., kept], before[..., kept], atol=1e-6, rtol=1e-6)
    assert (end < before.shape[-1]) == reserved
    assert model.config.text_vocab_size == before.shape[-1] + (0 if reserved else 2)
    assert (after[..., model.config.text_vocab_size :] == float("-inf")).all()


@TIED
@LAYOUTS
def test_new_rows_are_the_mean_of_the_text_rows_and_the_tables_are_apart(tied, reserved):
    llama, tokenizer = tiny_llama(tied=tied, reserved=reserved)
    model = widened(llama, tokenizer)
    config = model.config
    assert not config.tie_word_embeddings
    markers = [config.image_begin_id, config.image_end_id]
    pairs = [(llama.get_input_embeddings().weight, model.get_input_embeddings().weight),
             (llama.get_output_embeddings().weight, model.get_output_embeddings().weight)]  # fmt: skip
    assert pairs[0][1].data_ptr() != pairs[1][1].data_ptr()
    for old, new in pairs:
        text = [id for id in range(len(old)) if id not in markers]
        assert torch.equal(new[text], old[text])
        mean = old[text].double().mean(0).float()
        rows = new[[*markers, *range(config.text_vocab_size, config.vocab_size)]]
        assert torch.equal(rows, mean.expand_as(rows))


def test_the_llama_itself_is_left_alone():
    llama, tokenizer = tiny_llama()
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    model = widened(llama, tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())


def states_of_heads(model, ids: Tensor, names: tuple[str, str]) -> list[Tensor]:
    """Queries and keys (b, s, heads, 8) of the first layer, as the modules `names` give them."""
    found: list[Tensor] = []
    attention = model.model.layers[0].self_attn
    hooks = [getattr(attention, name).register_forward_hook(lambda _, __, out: found.append(out)) for name in names]
    model.model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [x.unflatten(-1, (-1, 8)) if x.ndim == 3 else x for x in found]


def test_with_qk_norm_queries_and_keys_are_those_of_the_llama_at_unit_size():
    """The documented difference: same directions, root mean square 1 in every head."""
    llama, tokenizer = tiny_llama()
    ids, model = some_text(tokenizer), widened(llama, tokenizer)
    given = states_of_heads(llama, ids, ("q_proj", "k_proj"))
    normed = states_of_heads(model, ids, ("q_norm", "k_norm"))
    for before, after in zip(given, normed, strict=True):
        rms = before.square().mean(-1, keepdim=True).sqrt()
        torch.testing.assert_close(after, before / rms, atol=1e-4, rtol=1e-4)
    assert (model(ids).logits[..., :300] - llama(ids).logits[..., :300]).abs().max() > 0.01


def test_matched_weights_keep_logits_closer_than_weights_of_one():
    llama, tokenizer = tiny_llama()
    with torch.no_grad():
        for layer in llama.model.layers:
            layer.self_attn.q_proj.weight.mul_(3)
            layer.self_attn.k_proj.weight.mul_(3)
    ids, model = some_text(tokenizer), widened(llama, tokenizer)
    kept = slice(0, model.config.image_begin_id)
    wanted = llama(ids).logits[..., kept].log_softmax(-1)

    def divergence() -> float:
        ours = model(ids).logits[..., kept].log_softmax(-1)
        return (wanted.exp() * (wanted - ours)).sum(-1).mean().item()

    ones = divergence()
    match_qk_norm(model, some_text(tokenizer))  # other text than what is measured
    assert divergence() < 0.8 * ones
    q_norm = model.model.layers[0].self_attn.q_norm.weight
    (queries,) = states_of_heads(llama, ids, ("q_proj",))
    torch.testing.assert_close(q_norm, torch.full_like(q_norm, queries.square().mean().sqrt().item()), rtol=0.1, atol=0)


def test_bits_are_signs_in_the_rows_if_asked_for():
    """Rows of a sub-code differ by twice the vectors of the bits that differ."""
    llama, tokenizer = tiny_llama()
    model = widened(llama, tokenizer, bit_structure=0.5)
    rows = model.get_input_embeddings().weight[model.config.text_vocab_size :].view(4, 4, -1)  # (place, code, d)
    first, second = rows[:, 2] - rows[:, 0], rows[:, 1] - rows[:, 0]
    torch.testing.assert_close(rows[:, 3] - rows[:, 0], first + second)
    assert 0.3 < (first / 2).std() < 0.7 and not torch.equal(first[0], first[1])
    plain = widened(*tiny_llama()).get_input_embeddings().weight[-1]
    torch.testing.assert_close(rows.mean(1), plain.expand(4, -1), atol=1e-5, rtol=1e-5)


# --- other language models, other divisions, mistakes ---------------------------------------------------------------

SMALL = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 1, "intermediate_size": 24}  # fmt: skip


def test_a_qwen3_keeps_its_own_qk_norm_and_head_size():
    _, tokenizer = tiny_llama()
    qwen = Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=12)).eval()
    with torch.no_grad():
        qwen.model.layers[0].self_attn.q_norm.weight.uniform_(0.5, 2)
    ids = torch.randint(20, (2, 9))
    before, after = qwen(ids).logits, widened(qwen, tokenizer)(ids).logits
    torch.testing.assert_close(after[..., :20], before, atol=1e-6, rtol=1e-6)


def test_other_language_models_are_refused():
    _, tokenizer = tiny_llama()
    other = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(UserError, match=r"'gpt2' model cannot be widened: give"):
        widened(other, tokenizer)
    with pytest.raises(UserError, match="biases in its feed-forward"):
        widened(LlamaForCausalLM(LlamaConfig(**SMALL, mlp_bias=True)), tokenizer)


@pytest.mark.parametrize("division", [(4, 5), (8, 0), (17,), (8, -1, 1), (-1, 9)], ids=str)
def test_divisions_that_do_not_make_the_bits_are_one_line(division):
    with pytest.raises(UserError, match="change --division") as caught:
        widened(*tiny_llama(), division=division)
    assert "\n" not in str(caught.value) and "visual_division" in str(caught.value)


@pytest.mark.parametrize(
    ("num_bits", "asked", "division"),
    [
        (28, (), (14, 14)),
        (8, (), (8,)),
        (14, (), (14,)),
        (18, (), (9, 9)),
        (29, (), (9, 10, 10)),
        (28, [7] * 4, (7,) * 4),
    ],
    ids=str,
)
def test_divisions_have_as_few_sub_codes_as_it_takes(num_bits, asked, division):
    assert division_of(num_bits, asked) == division


@LAYOUTS
def test_markers_are_reserved_tokens_or_new_ones_and_asked_twice_the_same(reserved):
    _, tokenizer = tiny_llama(reserved=reserved)
    size = len(tokenizer)
    markers = add_image_markers(tokenizer)
    assert markers == tuple(tokenizer.convert_tokens_to_ids(list(RESERVED if reserved else (BEGIN, END))))
    assert add_image_markers(tokenizer) == markers
    assert len(tokenizer) == size + (0 if reserved else 2)
    assert set(markers) <= set(tokenizer.all_special_ids)
    assert tokenizer.bos_token == "<s>" and tokenizer.eos_token == "</s>"


def test_a_tokenizer_longer_than_the_table_gets_rows():
    """Tokens that were added behind the model's own: their rows start at the mean like all new ones."""
    llama, tokenizer = tiny_llama()
    size = llama.config.vocab_size
    tokenizer.add_tokens(["<another>", "<third>"])
    model = widened(llama, tokenizer)
    table = model.get_input_embeddings().weight
    assert model.config.text_vocab_size == size + 2
    assert torch.equal(table[size], table[model.config.image_begin_id])


def test_sequences_end_as_the_tokenizer_ends_them():
    """Llama and Qwen folders may name another end in their config than their tokenizer, which training goes by."""
    language_model, tokenizer = tiny_llama()
    language_model.config.eos_token_id = 7
    model = widened(language_model, tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id != 7
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_a_sliding_window_is_refused():
    config = Qwen3Config(**SMALL, use_sliding_window=True, max_window_layers=0)
    _, tokenizer = tiny_llama()
    with pytest.raises(UserError, match="attends within a sliding window, which UM3 does not"):
        widened(Qwen3ForCausalLM(config), tokenizer)
