"""`qlip import llama` as a user runs it: a UM3 folder, what became of everything, and mistakes in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.vq_model import VQModel
from tiny_runs import Shell
from transformers import AutoTokenizer, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from qlip.models import opening
from qlip.models.qlip.loading import load_processor
from qlip.models.unified_model import open_unified
from qlip.models.widening import BEGIN, END, RESERVED
from tiny_tokenizer import save_tiny_tokenizer
from tiny_unified import tiny_llama, tiny_llama_folder

PROBE = "Once upon a time there was a red star and a blue ring. " * 20
SMALL = ("--division", 7, 7, 7, 7)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama, an image tokenizer, a text."""
    place = tmp_path_factory.mktemp("weights of others")
    tiny_llama_folder(place / "llama")
    save_tiny_tokenizer(place / "images")
    (place / "probe.txt").write_text(PROBE)
    return place


@pytest.fixture(autouse=True, scope="module")
def vocabulary(home: Path) -> Iterator[None]:
    """Reading CLIP's vocabulary is half of the time that opening a tiny model takes."""
    processor = load_processor(home / "images")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "load_processor", lambda source: processor)
        yield


def llama(home: Path, out: Path, *options: object, src: str = "llama") -> tuple[object, ...]:
    return ("import", "llama", home / src, out, "--tokenizer", home / "images", *options)


def test_a_llama_becomes_a_folder_that_captions_and_is_told_line_by_line(qlip: Shell, home, tmp_path):
    out = tmp_path / "my um3 ü"
    lines = qlip.works(*llama(home, out)).splitlines()
    assert lines[2:-1] == [
        "text        312 ids",
        "images      32,768 ids of 14 + 14 bits; a picture of 16 px is 2 x 2 tokens, 8 ids between "
        f"{RESERVED[0]} (310) and {RESERVED[1]} (311)",
        "tables      the table it shared came apart into input and output; new rows are the mean of the text rows",
        "softmax     separate, of text and images (Eq 6)",
        "QK-norm     weights one: text is continued worse than before until it is trained; --probe TEXT matches them",
        "parameters  25,504 -> 2,132,672",
    ]
    assert f"qlip train um3_1_5b --init {out} --data.text" in lines[-1]
    report = json.loads((out / "import_report.json").read_text(encoding="utf-8"))
    assert report["image_begin"] == {"token": RESERVED[0], "id": 310} and report["ids_per_picture"] == 8
    assert report["qk_norm"] == {"weights": "ones"}
    unified = open_unified(out)
    assert sum(parameter.numel() for parameter in unified.model.parameters()) == report["parameters"]["after"]
    before = LlamaForCausalLM.from_pretrained(home / "llama").model.embed_tokens.weight
    rows = unified.model.model.embed_tokens.weight
    assert torch.equal(rows[:310], before[:310])
    assert torch.allclose(rows[312:], before[:310].mean(0), atol=1e-6)
    assert qlip("complete", out, "a star", "--device", "cpu", "--max-new-tokens", 3)[0] == 0


def test_a_probe_matches_the_norms_and_a_second_import_replaces_the_first(qlip: Shell, home, tmp_path):
    out = tmp_path / "out"
    qlip.works(*llama(home, out, *SMALL))
    (out / "stale").write_text("of the first import")
    said = qlip.works(*llama(home, out, *SMALL, "--softmax", "joint", "--probe", home / "probe.txt"))
    assert "matching QK-norm on 256 tokens of" in said and "16 ids between" in said
    assert "softmax     joint\n" in said and not (out / "stale").exists()
    report = json.loads((out / "import_report.json").read_text())["qk_norm"]
    unified = open_unified(out)
    assert unified.model.config.softmax == "joint"
    for layer, told in zip(unified.model.model.layers, report["layers"], strict=True):
        assert (layer.self_attn.q_norm.weight == told["q"]).all() and told["q"] != 1
        assert (layer.self_attn.k_norm.weight == told["k"]).all()
    ids = torch.tensor([unified.processor.encode([PROBE])[:256]])
    with torch.inference_mode():
        before = LlamaForCausalLM.from_pretrained(home / "llama")(input_ids=ids, labels=ids).loss
        after = unified.model(input_ids=ids, labels=ids).loss
    assert report["nats_per_token"]["before"] == pytest.approx(float(before), abs=1e-4)
    assert report["nats_per_token"]["matched"] == pytest.approx(float(after), abs=1e-4)


def test_a_tokenizer_longer_than_the_embedding_and_a_qwen3(qlip: Shell, home, tmp_path):
    model, tokenizer = tiny_llama(reserved=False)
    tokenizer.add_tokens(["<one>", "<two>"])
    model.save_pretrained(home / "longer")
    tokenizer.save_pretrained(home / "longer")
    said = qlip.works(*llama(home, tmp_path / "longer", *SMALL, src="longer"))
    assert "text        314 ids, 4 more than the model had rows" in said and f"{BEGIN} (312) and {END} (313)" in said
    assert len(AutoTokenizer.from_pretrained(tmp_path / "longer")) == 314
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen3Config(vocab_size=400, intermediate_size=48, head_dim=16, max_position_embeddings=64, **sizes)
    qwen = Qwen3ForCausalLM(config)
    torch.nn.init.normal_(qwen.model.layers[0].self_attn.q_norm.weight)
    qwen.save_pretrained(home / "qwen")
    tokenizer.save_pretrained(home / "qwen")
    said = qlip.works(*llama(home, tmp_path / "qwen", *SMALL, src="qwen"))
    assert "QK-norm     the model's own" in said and "text        400 ids\n" in said
    kept = open_unified(tmp_path / "qwen").model.model.layers[0].self_attn.q_norm.weight
    assert torch.equal(kept, qwen.model.layers[0].self_attn.q_norm.weight)
    said = qlip.refused(*llama(home, tmp_path / "other", "--probe", home / "probe.txt", src="qwen"))
    assert "has a QK-norm of its own, which is taken as it is: leave --probe out" in said


def test_another_tokenizers_codes_become_one_id_a_token(qlip: Shell, home, tmp_path):
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    sizes = {"block_out_channels": [8, 8], "norm_num_groups": 2, "num_vq_embeddings": 16_384, "vq_embed_dim": 4}
    VQModel(**blocks, **sizes, latent_channels=4).save_pretrained(home / "vq")
    command = ("import", "llama", home / "llama", tmp_path / "out", "--tokenizer", home / "vq")
    assert "--image-size" in qlip.refused(*command)
    said = qlip.works(*command, "--image-size", 8)
    assert "16,384 ids of 14 bits; a picture of 8 px is 4 x 4 tokens, 16 ids" in said
    assert open_unified(tmp_path / "out").image_size == 8


REFUSED = {
    "no such folder": (("gone", "--tokenizer", "images"), "there is nothing at"),
    "no tokenizer of images": (("llama", "--tokenizer", "llama"), "holds a model of llama"),
    "no image tokenizer": (("llama",), "no image tokenizer: add --tokenizer QLIP"),
    "tokenizer of the hub": (("llama", "--tokenizer", "someone/qlip"), "there is nothing at someone/qlip"),
    "too few bits": (("llama", "--tokenizer", "images", "--division", 14, 13), "does not make num_bits 28"),
    "no bits": (("llama", "--tokenizer", "images", "--division", 0, 28), "give sub-codes of 1 to 16 bits"),
    "no text tokenizer": (("bare", "--tokenizer", "images"), "cannot read a tokenizer from bare"),
    "no beginning": (("unmarked", "--tokenizer", "images"), "the tokenizer of unmarked has no bos_token"),
    "an image tokenizer": (("images", "--tokenizer", "images"), "holds a 'qlip' model, no language model"),
    "option of eva": (("llama", "--tokenizer", "images", "--head-dim", 8), "--head-dim is for `qlip import eva`"),
    "no probe": (("llama", "--tokenizer", "images", "--probe", "gone.txt"), "cannot read --probe gone.txt"),
    "bytes as a probe": (("llama", "--tokenizer", "images", "--probe", "bytes"), "is no text in UTF-8"),
    "short probe": (("llama", "--tokenizer", "images", "--probe", "short.txt"), "give a text of at least 64"),
    "another size": (("llama", "--tokenizer", "images", "--image-size", 32), "leave --image-size out"),
}


@pytest.fixture(scope="module")
def broken(home: Path) -> Path:
    """Beside the whole Llama one without a tokenizer, one without a beginning, and two unfit probes."""
    for name in ("bare", "unmarked"):
        shutil.copytree(home / "llama", home / name)
    for path in (home / "bare").glob("tokenizer*"):
        path.unlink()
    settings = home / "unmarked" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"bos_token": None}))
    (home / "bytes").write_bytes(b"\xff\xfe\x00")
    (home / "short.txt").write_text("a star")
    return home


@pytest.mark.parametrize("mistake", REFUSED)
def test_mistakes_are_one_line_and_write_nothing(qlip: Shell, broken, monkeypatch, mistake):
    (src, *options), said = REFUSED[mistake]
    monkeypatch.chdir(broken)
    code, _, err = qlip("import", "llama", src, "out", *options)
    assert (code, err.count("\n")) == (2, 1) and err.startswith("qlip: ") and said in err
    assert not Path("out").exists()


def test_nothing_that_is_read_or_foreign_is_written_over(qlip: Shell, home, tmp_path):
    for out in (home / "llama" / "inside", home / "llama", home, home / "images" / "inside"):
        assert "lie in each other; choose another OUT" in qlip.refused(*llama(home, out))
    assert "--tokenizer is for `qlip import llama`" in qlip.refused(
        "import", "eva", home / "llama", tmp_path / "out", "--tokenizer", home / "images"
    )
    (tmp_path / "dear.jpg").write_bytes(b"dear")
    code, _, err = qlip(*llama(home, tmp_path, *SMALL))
    assert code == 2 and "is no export of ours" in err and (tmp_path / "dear.jpg").read_bytes() == b"dear"
