"""`qlip verify` measures what a brute-force comparison finds, names what it leaves out, and leaves no trace."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from qlip.apps import verify_settings
from qlip.apps.verify import THRESHOLDS, find_pictures, load_pictures, margin_figures, measure
from qlip.apps.verify_report import conclusion, print_report
from qlip.apps.verify_settings import settings_for
from qlip.core.errors import UserError
from qlip.models.qlip.configuration import QLIPConfig
from qlip.models.qlip.modeling import QLIPModel
from qlip.models.qlip.processing import QLIPProcessor

CPU = torch.device("cpu")
TOWER = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 2, "num_hidden_layers": 2}
GRID = {"image_size": 32, "patch_size": 8, "initializer_range": 0.2}


def tiny_model(**vision: object) -> QLIPModel:
    """32 px, 16 tokens of 28 bits."""
    config = QLIPConfig(
        text_config=TOWER | {"max_position_embeddings": 16},
        vision_config=GRID | TOWER | {"hidden_size_post_q": 32} | vision,
        decoder_config=GRID | TOWER,
        projection_dim=16,
    )
    return QLIPModel(config).eval()


def measured(model: QLIPModel, pixels: torch.Tensor, *, batch_sizes=(2,), compile: bool = False) -> tuple[dict, dict]:
    """Details, and the rows by name."""
    details = measure(model, pixels, place=CPU, batch_sizes=batch_sizes, compile=compile)
    return details, {row["name"]: row for row in details["settings"]}


def save_picture(path: Path, *, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


# --- flips -------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_bf16_flips_are_those_of_a_brute_force_comparison():
    model, pixels = tiny_model(), torch.randn(12, 3, 32, 32)
    details, rows = measured(model, pixels)
    half = copy.deepcopy(model.vision_model).bfloat16()
    flips, tokens, pictures, margins = 0, set(), set(), []
    for b, picture in enumerate(pixels):
        latents = model.vision_model(picture[None]).latents[0]
        others = half(picture[None]).quantized.bits[0]
        for n, latent in enumerate(latents):
            u = latent / latent.norm()
            for i in range(28):
                if bool(u[i] > 0) != bool(others[n, i]):
                    flips += 1
                    tokens.add((b, n))
                    pictures.add(b)
                    margins.append(abs(float(u[i])))
    row = rows["bf16 weights"]
    assert flips > 5 and details["bits"] == 12 * 16 * 28 and details["tokens"] == 12 * 16
    assert (row["bits_flipped"], row["tokens_changed"], row["pictures_changed"]) == (flips, len(tokens), len(pictures))
    assert row["bits_share"] == pytest.approx(flips / (12 * 16 * 28))
    assert row["tokens_share"] == pytest.approx(len(tokens) / (12 * 16))
    assert row["largest_margin"] == pytest.approx(max(margins), rel=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        others = torch.cat([model.encode(picture[None]) for picture in pixels])
    assert rows["bf16 autocast"]["bits_flipped"] == int((others != model.encode(pixels, batch_invariant=True)).sum())


@torch.inference_mode()
def test_the_reference_repeats_itself():
    _, rows = measured(tiny_model(), torch.randn(5, 3, 32, 32), batch_sizes=(3, 2, 2, 9))
    for name in ("again", "again in one batch"):
        assert (rows[name]["bits_flipped"], rows[name]["tokens_changed"], rows[name]["pictures_changed"]) == (0, 0, 0)
        assert rows[name]["largest_margin"] is None
    assert [name for name in rows if name.startswith("batches")] == ["batches of 2", "batches of 3", "batches of 9"]
    assert rows["batches of 9"] == {"name": "batches of 9", "left_out": "only 5 pictures given"}


@torch.inference_mode()
def test_threads_attention_and_precision_are_as_before():
    model, pixels = tiny_model(), torch.randn(2, 3, 32, 32)
    state = copy.deepcopy(model.state_dict())
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.set_float32_matmul_precision("high")
    try:
        _, rows = measured(model, pixels)
        assert torch.get_num_threads() == 2 and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_num_threads(before)
        torch.set_float32_matmul_precision("highest")
    assert rows["one CPU thread"]["left_out"] == "" and rows["one CPU thread"]["seconds"] >= 0
    assert rows["eager attention"]["left_out"] == ""
    assert model.vision_model.config._attn_implementation == "sdpa"
    assert not model.vision_model.quantizer._forward_pre_hooks
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert measured(model, pixels)[1]["one CPU thread"]["left_out"] == "there is only one anyway"


@pytest.mark.parametrize(
    ("quantizer", "has_margins"),
    [
        pytest.param({"quantizer_l2_norm": False}, True, id="bsq without norm"),
        pytest.param({"quantizer": "lfq"}, True, id="lfq"),
        pytest.param({"quantizer": "vq", "quantizer_group_size": 7}, False, id="vq"),
        pytest.param({"quantizer": "fsq", "fsq_levels": [16] * 7}, False, id="fsq"),
    ],
)
@torch.inference_mode()
def test_other_quantizers(quantizer, has_margins, capsys):
    model, pixels = tiny_model(**quantizer), torch.randn(4, 3, 32, 32)
    details, rows = measured(model, pixels)
    half = copy.deepcopy(model.vision_model).bfloat16()
    others = torch.cat([half.quantize(picture[None]).bits for picture in pixels])
    assert rows["bf16 weights"]["bits_flipped"] == int((others != model.encode(pixels, batch_invariant=True)).sum())
    print_report({"card": {"device": "cpu", "device_name": "x", **quantizer}, "details": details | {"unusable": {}}})
    said = capsys.readouterr().out
    if not has_margins:
        assert details["margins"] is None and rows["bf16 weights"]["largest_margin"] is None
        assert "no margins" in said
        return
    latents = torch.cat([model.vision_model(picture[None]).latents for picture in pixels]).abs().flatten().double()
    assert details["margins"]["quantiles"]["0.5"] == pytest.approx(np.quantile(latents.numpy(), 0.5))
    assert "random" not in details["margins"]["below"][0] and "random directions" not in said


# --- what a machine has not --------------------------------------------------------------------------------------


def names_left_out(place: torch.device, **options: object) -> dict[str, str]:
    settings = settings_for(tiny_model(), place, num_pictures=8, **({"batch_sizes": (2,), "compile": False} | options))
    return {setting.name: setting.left_out for setting in settings if setting.left_out}


def test_a_cpu_has_no_gpu_settings_and_a_gpu_has_all_but_threads(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    on_cpu = names_left_out(CPU)
    for name in ("TF32 convolutions", "TF32 everywhere", "fp16 weights"):
        assert on_cpu[name] == "needs a CUDA device"
    assert on_cpu["another device"] == "this machine has only its cpu"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert set(names_left_out(torch.device("cuda"))) == {"one CPU thread", "torch.compile", "torch.compile in bf16"}
    settings = settings_for(tiny_model(), torch.device("cuda"), num_pictures=8, batch_sizes=(), compile=False)
    assert settings[-1].name == "on cpu"


def test_no_compiler_is_said_and_a_failing_one_too(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert names_left_out(CPU, compile=True)["torch.compile"] == "no C++ compiler: no-such-compiler is not installed"
    assert names_left_out(CPU)["torch.compile"] == "not asked for (--no-compile)"
    monkeypatch.setattr(verify_settings, "_missing_compiler", lambda _place: "")

    def failing(function, **_options):
        def call(_pixels):
            raise RuntimeError("cannot compile this\nat great length")

        return call

    monkeypatch.setattr(torch, "compile", failing)
    _, rows = measured(tiny_model(), torch.randn(1, 3, 32, 32), compile=True)
    assert rows["torch.compile"] == {"name": "torch.compile", "left_out": "failed: cannot compile this"}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@torch.inference_mode()
def test_compiled_bits_are_compared():
    model, pixels = tiny_model(num_hidden_layers=1), torch.randn(2, 3, 32, 32)
    _, rows = measured(model, pixels, batch_sizes=(), compile=True)
    row = rows["torch.compile"]
    assert row["left_out"] == ""
    assert row["bits_flipped"] == 0 or row["largest_margin"] < 1e-5


# --- margins -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_histogram_and_shares_are_numpys():
    model, pixels = tiny_model(), torch.randn(4, 3, 32, 32)
    figures = measured(model, pixels)[0]["margins"]
    latents = torch.cat([model.vision_model(picture[None]).latents for picture in pixels])
    values = F.normalize(latents, dim=-1).abs().double().flatten().numpy()
    assert sum(figures["counts"]) == values.size == 4 * 16 * 28
    np.testing.assert_array_equal(figures["counts"], np.histogram(values, figures["edges"])[0])
    assert [entry["share"] for entry in figures["below"]] == [float((values < t).mean()) for t in THRESHOLDS]
    assert figures["quantiles"] == {f"{q:g}": np.quantile(values, q) for q in (0.001, 0.01, 0.1, 0.5, 0.9)}
    large = margin_figures(torch.tensor([[[0.0, 1e-9, 1.0, 2345.0]]]), on_sphere=False)
    assert sum(large["counts"]) == 4 and large["counts"][0] == 2 and large["edges"][-1] == 10_000


@pytest.mark.parametrize("num_bits", [2, 3, 28])
def test_the_share_for_random_directions_is_what_random_directions_give(num_bits):
    directions = F.normalize(torch.randn(400_000, 1, num_bits, dtype=torch.float64), dim=-1)
    entry = margin_figures(directions.abs(), on_sphere=True)["below"][-1]
    assert entry["threshold"] == 1e-2
    assert entry["share"] == pytest.approx(entry["random"], rel=0.03)


# --- pictures ----------------------------------------------------------------------------------------------------


def test_folders_are_searched_and_files_taken_as_they_are(tmp_path):
    folder = tmp_path / "schöne Bilder"
    second, first = save_picture(folder / "b" / "2.JPG"), save_picture(folder / "a ü" / "1.png")
    (folder / "notes.txt").write_text("no picture")
    odd = save_picture(tmp_path / "odd.png").rename(tmp_path / "picture.dat")
    assert find_pictures([folder]) == [first, second]
    assert find_pictures([odd, second, folder]) == [odd, second, first]
    for images, said in [([], "no pictures given"), ([tmp_path / "x"], "no picture or folder at")]:
        with pytest.raises(UserError, match=said):
            find_pictures(images)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no pictures under .*empty; looked for \.jpg"):
        find_pictures([tmp_path / "empty"])


def test_broken_pictures_are_named_and_a_few_are_spread_over_all(tmp_path):
    processor = QLIPProcessor.for_size(32)
    files = [save_picture(tmp_path / f"{i}.png", seed=i) for i in range(6)]
    files[2].write_text("no picture at all")
    pictures = load_pictures(files, processor, max_images=100)
    assert len(pictures.pixel_values) == 5 and pictures.num_found == 6
    assert list(pictures.unusable) == [str(files[2])] and "not an image" in pictures.unusable[str(files[2])]
    spread = load_pictures(files, processor, max_images=3)
    assert list(spread.unusable) == [str(files[2])]
    expected = processor(images=[files[0], files[4]], return_tensors="pt")["pixel_values"]
    assert torch.equal(spread.pixel_values, expected)
    with pytest.raises(UserError, match=r"none of the 1 files is a usable picture: .*2\.png: not an image"):
        load_pictures(files[2:3], processor, max_images=5)
    with pytest.raises(UserError, match="max_images is 0"):
        load_pictures(files, processor, max_images=0)


# --- the report --------------------------------------------------------------------------------------------------


def details_of(*flips: tuple[str, int, float | None]) -> dict:
    rows = [{"name": n, "left_out": "", "bits_flipped": k, "largest_margin": m} for n, k, m in flips]
    return {"bits": 7168, "settings": [*rows, {"name": "fp16 weights", "left_out": "needs a CUDA device"}]}


def test_one_sentence_says_what_to_remember():
    same = [("again", 0, None), ("again in one batch", 0, None)]
    exact = "batch-invariant encoding is exact here"
    flips = details_of(*same, ("batches of 2", 1, 1e-7), ("bf16 weights", 3, 0.00123))
    assert conclusion(flips) == (
        f"at most 3 of 7,168 bits differ (bf16 weights), none further than 1.2e-03 from zero; {exact}"
    )
    assert (
        conclusion(details_of(*same, ("bf16 weights", 0, None)))
        == f"none of 7,168 bits differs in any setting; {exact}"
    )
    assert "bits differ (bf16 weights); batch" in conclusion(details_of(*same, ("bf16 weights", 3, None)))
    broken = conclusion(details_of(("again", 0, None), ("again in one batch", 2, 1e-8)))
    assert broken.endswith("batch-invariant encoding is not exact here: bits differ in 'again in one batch'")


@torch.inference_mode()
def test_the_table_fits_a_terminal_of_80_columns_and_shows_every_number(capsys):
    details, rows = measured(tiny_model(), torch.randn(12, 3, 32, 32))
    card = {"device": "cpu", "device_name": "x86_64 [AVX2]", "quantizer": "bsq"}
    unusable = {f"/data/[odd] {i}.png": "not an image: zero bytes" for i in range(7)}
    print_report({"card": card, "details": json.loads(json.dumps(details | {"unusable": unusable}))})
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("bf16 weights")]
    row = rows["bf16 weights"]
    assert line.split()[2] == str(row["bits_flipped"]) and f"{row['largest_margin']:.1e}" in line
    assert all(len(line) <= 80 for line in lines if line.startswith(("again", "bf16", "eager", "setting", "1.0e-")))
    assert "…" not in "".join(lines)
    assert any("not used: /data/[odd] 4.png" in line for line in lines)
    assert "not used: 2 more; --json FILE names all" in lines
    counts = np.trim_zeros(details["margins"]["counts"], "f")
    chart = [line.split()[-3].replace(",", "") for line in lines if "\N{EN DASH}" in line or line.startswith("below")]
    assert chart == [str(count) for count in counts]
