"""UM3's network: Eq 6 against loops in float64, packed rows against single ones, hidden modalities, configs refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from qlip.models import unified
from qlip.models.text_to_image import CACHE_ARGUMENT
from qlip.models.unified import UM3Config, UM3ForCausalLM
from tiny_unified import tiny_config, tiny_um3

BOS, EOS, BEGIN, END, TEXT = 1, 2, 38, 39, 40
IMAGE = [id for place in range(6) for id in (40 + (7 * place) % 16, 56 + (5 * place + 3) % 16)]
CAPTIONED = [BOS, BEGIN, *IMAGE, END, 5, 6, 7, EOS]
DRAWN = [BOS, 9, 8, BEGIN, *IMAGE, END, EOS]
SENTENCE = [BOS, 5, 6, 7, 8, 9, 10, 11, EOS]


def some_rows() -> tuple[Tensor, Tensor]:
    """Ids and labels (3, 20) of all three tasks; first ids and what fills rows up are not learned."""
    rows = [CAPTIONED, DRAWN, SENTENCE]
    ids = torch.tensor([row + [0] * (20 - len(row)) for row in rows])
    learned = torch.tensor([[0] + [1] * (len(row) - 1) + [0] * (20 - len(row)) for row in rows]) > 0
    return ids, ids.masked_fill(~learned, -100)


def all_logits(model: UM3ForCausalLM, ids: Tensor, **inputs: Tensor) -> Tensor:
    """(b, s, V), nothing hidden."""
    return F.linear(model.model(input_ids=ids, use_cache=False, **inputs).last_hidden_state, model.lm_head.weight)


def nll_by_loop(logits: np.ndarray, labels: np.ndarray, *, separate: bool) -> tuple[np.ndarray, np.ndarray]:
    """Eq 6 for one target after the other: -ln p and the logarithm of the normaliser, (b, s) each."""
    nll, normalizer = np.zeros(labels.shape), np.zeros(labels.shape)
    for row in range(len(labels)):
        for place in range(labels.shape[1] - 1):
            target = labels[row, place + 1]
            if target == -100:
                continue
            others = range(len(logits[row, place]))
            if separate:
                others = range(TEXT) if target < TEXT else range(TEXT, len(others))
            total = math.fsum(math.exp(logits[row, place, other]) for other in others)
            normalizer[row, place] = math.log(total)
            nll[row, place] = -math.log(math.exp(logits[row, place, target]) / total)
    return nll, normalizer


@pytest.mark.parametrize("softmax", ["separate", "joint"])
def test_the_loss_is_equation_6_by_brute_force(softmax):
    model = tiny_um3(softmax=softmax)
    ids, labels = some_rows()
    output = model(input_ids=ids, labels=labels)
    logits = all_logits(model, ids).detach().double().numpy()
    nll, normalizer = nll_by_loop(logits, labels.numpy(), separate=softmax == "separate")
    np.testing.assert_allclose(output.nll.detach(), nll, atol=2e-5)
    np.testing.assert_allclose(output.log_normalizer.detach(), normalizer, atol=2e-5)
    assert output.loss.item() == pytest.approx(nll.sum() / (labels[:, 1:] != -100).sum().item(), abs=1e-5)
    if softmax == "joint":
        expected = F.cross_entropy(torch.from_numpy(logits[:, :-1]).flatten(0, 1), labels[:, 1:].flatten())
        assert output.loss.item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("softmax", ["separate", "joint"])
def test_its_gradient_is_softmax_minus_one_hot_within_the_modality(softmax):
    """Of the output table, summed by hand over targets; those of the other modality get nothing from it."""
    model = tiny_um3(softmax=softmax)
    ids, labels = some_rows()
    model(input_ids=ids, labels=labels).loss.backward()
    states = model.model(input_ids=ids, use_cache=False).last_hidden_state.detach().double().numpy()
    table = model.lm_head.weight.detach().double().numpy()
    expected, count = np.zeros_like(table), 0
    for row, place in np.argwhere(labels.numpy()[:, 1:] != -100):
        target, state = labels[row, place + 1].item(), states[row, place]
        among = slice(None) if softmax == "joint" else slice(0, TEXT) if target < TEXT else slice(TEXT, None)
        share = np.zeros(len(table))
        share[among] = np.exp(table[among] @ state) / np.exp(table[among] @ state).sum()
        share[target] -= 1
        expected += np.outer(share, state)
        count += 1
    np.testing.assert_allclose(model.lm_head.weight.grad, expected / count, atol=2e-6)


@pytest.mark.parametrize("softmax", ["separate", "joint"])
def test_chunks_of_positions_change_nothing(softmax, monkeypatch):
    model, (ids, labels) = tiny_um3(softmax=softmax), some_rows()
    found = []
    for size in (2048, 7):
        monkeypatch.setattr(unified, "POSITIONS_AT_ONCE", size)
        model.zero_grad()
        output = model(input_ids=ids, labels=labels)
        (output.loss + output.log_normalizer.square().sum()).backward()
        found.append([output.nll.detach(), *(parameter.grad for parameter in model.parameters())])
    for whole, chunked in zip(*found, strict=True):
        torch.testing.assert_close(whole, chunked, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kept", ["text", "visual", "none"])
def test_batches_of_one_modality_or_without_targets(kept):
    model, (ids, labels) = tiny_um3(), some_rows()
    out = {"text": ids >= TEXT, "visual": ids < TEXT, "none": ids >= 0}[kept]
    labels = labels.masked_fill(out, -100)
    output = model(input_ids=ids, labels=labels)
    logits = all_logits(model, ids).detach().double().numpy()
    nll, _ = nll_by_loop(logits, labels.numpy(), separate=True)
    np.testing.assert_allclose(output.nll.detach(), nll, atol=2e-5)
    if kept == "none":
        assert output.loss == 0
        return
    output.loss.backward()
    text, visual = model.lm_head.weight.grad.split([TEXT, 32])
    assert text.any() == (kept == "text") and visual.any() == (kept == "visual")


# --- packed rows ----------------------------------------------------------------------------------------------------


def packed(*documents: list[int]) -> tuple[Tensor, Tensor]:
    """Ids and positions (1, s) of documents one behind the other."""
    ids = torch.tensor([[id for document in documents for id in document]])
    return ids, torch.cat([torch.arange(len(document)) for document in documents])[None]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_are_what_they_are_alone(attention):
    """Logits and losses; rows of a batch are cut at different places."""
    model = tiny_um3(attn_implementation=attention)
    rows = [[CAPTIONED, SENTENCE, DRAWN], [SENTENCE, DRAWN, CAPTIONED]]
    ids, positions = (torch.cat(both) for both in zip(*[packed(*row) for row in rows], strict=True))
    labels = ids.masked_fill(positions == 0, -100)
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    nll = model(input_ids=ids, position_ids=positions, labels=labels).nll
    mixed = model(input_ids=ids, use_cache=False).logits
    for row, documents in enumerate(rows):
        start = 0
        for document in documents:
            single = torch.tensor([document])
            here = slice(start, start + len(document))
            torch.testing.assert_close(logits[row, here], model(input_ids=single).logits[0], atol=1e-5, rtol=1e-5)
            alone = model(input_ids=single, labels=single).nll[0]
            torch.testing.assert_close(nll[row, here], alone, atol=1e-5, rtol=1e-5)
            if start:  # without the positions a document sees what is before it
                assert (mixed[row, here] - logits[row, here]).nan_to_num().abs().max() > 0.01
            start += len(document)


def test_a_packed_document_gets_no_gradient_from_its_neighbours():
    model, (ids, positions) = tiny_um3(), packed(SENTENCE, DRAWN)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    model(inputs_embeds=embedded, position_ids=positions, use_cache=False).logits[:, len(SENTENCE) :].sum().backward()
    assert not embedded.grad[:, : len(SENTENCE)].any() and embedded.grad[:, len(SENTENCE) :].any()


# --- logits ---------------------------------------------------------------------------------------------------------


def test_a_softmax_over_all_logits_is_equation_6():
    """What whoever scores text takes: visual logits are -inf behind text, text logits inside an image."""
    model, ids = tiny_um3(), torch.tensor([CAPTIONED, [*DRAWN[:-1], 3, EOS]])
    logits = model(input_ids=ids).logits
    visual_next = ids[:, 1:] >= TEXT
    assert torch.equal(logits[:, :-1, :TEXT].isfinite().all(-1), ~visual_next)
    assert torch.equal(logits[:, :-1, TEXT:].isfinite().all(-1), visual_next)
    assert not logits[..., TEXT:].isfinite().any(-1)[:, -1].any()
    log_p = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(-log_p, model(input_ids=ids, labels=ids).nll[:, :-1], atol=1e-5, rtol=1e-5)


def test_joint_logits_hide_nothing():
    model, ids = tiny_um3(softmax="joint"), torch.tensor([CAPTIONED])
    assert torch.equal(model(input_ids=ids).logits, all_logits(model, ids))


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([2, 17, 5])], ids=["last", "last three", "places"])
def test_only_some_logits(keep):
    model, ids = tiny_um3(), torch.tensor([CAPTIONED, [*DRAWN, EOS]])
    places = slice(-keep, None) if isinstance(keep, int) else keep
    kept = model(input_ids=ids, logits_to_keep=keep).logits
    torch.testing.assert_close(kept, model(input_ids=ids).logits[:, places], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("document", [CAPTIONED, DRAWN], ids=["captioned", "drawn"])
def test_cached_steps_are_the_whole_pass(document):
    """Where the beginning of an image is not given, nothing is hidden; finite logits agree everywhere."""
    model, ids = tiny_um3(), torch.tensor([document])
    whole, cache = model(input_ids=ids).logits[0], DynamicCache(config=model.config)
    for place in range(len(document)):
        step = model(input_ids=ids[:, place : place + 1], use_cache=True, **{CACHE_ARGUMENT: cache})
        here = whole[place]
        seen = here.isfinite()
        torch.testing.assert_close(step.logits[0, -1][seen], here[seen], atol=1e-4, rtol=1e-4)
        if document[place] < TEXT:  # then a step alone knows
            assert torch.equal(step.logits[0, -1].isfinite(), seen)


def test_attention_sees_queries_and_keys_of_unit_size():
    """One layer's attention written out, with QK-norm: RMS of every head is 1 where its weights are 1."""
    model, ids = tiny_um3(num_hidden_layers=1, attn_implementation="eager"), torch.tensor([SENTENCE])
    attention, heads = model.model.layers[0].self_attn, {}
    for name in ("q_norm", "k_norm"):
        getattr(attention, name).register_forward_hook(lambda _, __, out, name=name: heads.update({name: out}))
    seen = model.model(input_ids=ids, output_attentions=True, use_cache=False).attentions[0]
    for head in heads.values():
        torch.testing.assert_close(head.square().mean(-1), torch.ones(head.shape[:-1]), atol=1e-3, rtol=0)
    states = model.model.layers[0].input_layernorm(model.get_input_embeddings()(ids))
    cosine, sine = model.model.rotary_emb(states, torch.arange(ids.shape[1])[None])
    turned = []
    for projection, count in ((attention.q_proj, 4), (attention.k_proj, 2)):
        x = projection(states).view(ids.shape[1], count, 8)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        rotated = torch.cat([-x[..., 4:], x[..., :4]], dim=-1)
        turned.append((x * cosine[0, :, None] + rotated * sine[0, :, None]).transpose(0, 1))
    keys = turned[1].repeat_interleave(2, dim=0)
    scores = turned[0] @ keys.transpose(1, 2) / math.sqrt(8)
    scores = scores.masked_fill(torch.ones(ids.shape[1], ids.shape[1]).triu(1) > 0, float("-inf"))
    torch.testing.assert_close(seen[0], scores.softmax(-1), atol=1e-5, rtol=1e-4)


# --- configs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"softmax": "both"}, "softmax 'both'"),
        ({"grid": [2, 0]}, "grid"),
        ({"grid": [6]}, "grid"),
        ({"num_bits": 9}, "num_bits 9"),
        ({"visual_division": [8, 0]}, "sub-codes of 1 to"),
        ({"visual_division": [28], "num_bits": 28}, "sub-codes of 1 to"),
        ({"image_begin_id": 40}, "image_begin_id is 40"),
        ({"image_end_id": -1}, "image_end_id is -1"),
        ({"image_end_id": 38}, "the same"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_impossible_configs_are_refused(change, words):
    with pytest.raises(Exception, match=words):
        tiny_config(**change)


def test_a_vocabulary_of_another_size_is_refused():
    with pytest.raises(ValueError, match="vocab_size 73 is not 72"):
        UM3ForCausalLM(tiny_config(vocab_size=73))


def test_the_default_is_the_papers_images():
    vocabulary = UM3Config(vocab_size=128_256 + 2 * 16_384).vocabulary
    assert (vocabulary.image_length, vocabulary.visual_size) == (512, 32_768)


def test_it_can_be_described_on_the_meta_device():
    with torch.device("meta"):
        described = UM3ForCausalLM(tiny_config())
    assert all(parameter.is_meta for parameter in described.parameters())
    names = {name.replace(".self_attn.q_norm.weight", "") for name, _ in described.named_parameters()}
    assert "model.embed_tokens.weight" in names and "lm_head.weight" in names
