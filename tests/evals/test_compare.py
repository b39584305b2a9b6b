"""`qlip eval compare`: what blocks, what is only listed, the table, and files that are not ours."""

from __future__ import annotations

import copy
import json

import pytest

from qlip.apps.report_words import FIGURES
from qlip.core.errors import UserError
from qlip.evals.compare import DASH, compare_results, differences, direction, read_results
from qlip.evals.protocols import find_protocol

CARD = {
    "model": "runs/a/export",
    "model_fingerprint": "a" * 64,
    "encoder_fingerprint": "e" * 64,
    "complete": True,
    "data": "imagenet/val",
    "count": 50000,
    "skipped": 0,
    "keys_sha256": "1" * 64,
    "pixels_sha256": "2" * 64,
    "image_size": 256,
    "reference": "the originals, prepared alike",
    "feature_network": "Inception",
    "feature_weights_sha256": "3" * 64,
    "lpips_alex_weights_sha256": "4" * 64,
    "left_out": [],
    "dtype": "float32",
    "device": "cpu",
    "ranks": 1,
    "batch_size": 100,
    "versions": {"torch": "2.9", "pillow": "12"},
    "git_commit": "5" * 40,
    "seconds": 3.0,
}


def result(protocol: str, figures: dict, **card) -> dict:
    """One entry of a results file."""
    found = find_protocol(protocol)
    return {"eval": found.kind, "figures": figures, "details": {}, "card": CARD | found.card() | card}


def write(path, *results) -> object:
    """A results file."""
    path.write_text(json.dumps(list(results)))
    return path


def recon(figures: dict | None = None, *, filter: str = "bicubic", **card) -> dict:
    """Reconstruction of ImageNet."""
    return result(f"imagenet-recon-256-{filter}-v1", figures or {"psnr": 23.0, "rfid": 3.0}, **card)


BLOCKS = {
    "protocol": ("other-v1", "protocol imagenet-recon-256-bicubic-v1 -> other-v1"),
    "preparation": ({"size": 256, "filter": "bilinear", "crop": "centre"}, "preparation.filter bicubic -> bilinear"),
    "protocol_settings": ({"rounding": "round"}, "protocol_settings.mean_picture false -> absent"),
    "count": (2000, "count 50000 -> 2000"),
    "complete": (False, "complete true -> false"),
    "keys_sha256": ("9" * 64, "keys_sha256 11111111 -> 99999999"),
    "pixels_sha256": ("9" * 64, "pixels_sha256 22222222 -> 99999999"),
    "reference": ("imagenet/train", "reference the originals, prepared alike -> imagenet/train"),
    "reference_keys_sha256": ("9" * 64, "reference_keys_sha256 absent -> 99999999"),
    "feature_weights_sha256": ("9" * 64, "feature_weights_sha256 33333333 -> 99999999"),
    "lpips_alex_weights_sha256": ("9" * 64, "lpips_alex_weights_sha256 44444444 -> 99999999"),
    "class_names_sha256": ("9" * 64, "class_names_sha256 absent -> 99999999"),
    "templates_sha256": ("9" * 64, "templates_sha256 absent -> 99999999"),
    "train_keys_sha256": ("9" * 64, "train_keys_sha256 absent -> 99999999"),
    "left_out": (["rfid"], 'left_out [] -> ["rfid"]'),
}
NOTES = {
    "dtype": ("bfloat16", "dtype float32 -> bfloat16"),
    "device": ("cuda", "device cpu -> cuda"),
    "ranks": (2, "ranks 1 -> 2"),
    "batch_size": (7, "batch_size 100 -> 7"),
    "versions": ({"torch": "3.0", "pillow": "12"}, "versions.torch 2.9 -> 3.0"),
    "git_commit": ("6" * 40, "git_commit 55555555 -> 66666666"),
    "encoder_fingerprint": ("7" * 64, "encoder_fingerprint eeeeeeee -> 77777777"),
}


@pytest.mark.parametrize("key", BLOCKS)
def test_what_moves_a_figure_blocks(key):
    """Whichever side has it, and whether the other has it at all."""
    value, said = BLOCKS[key]
    a, b = recon()["card"], recon()["card"] | {key: value}
    assert said in differences(a, b).blocking
    assert differences(b, a).blocking and not differences(a, b).notes
    del b[key]
    assert bool(differences(a, b).blocking) == (key in a)


@pytest.mark.parametrize("key", NOTES)
def test_what_moves_last_digits_is_noted(key):
    value, said = NOTES[key]
    found = differences(recon()["card"], recon()["card"] | {key: value})
    assert (found.blocking, found.notes) == ([], [said])


def test_other_models_and_times_are_no_difference():
    card = recon()["card"]
    other = {
        "model": "b",
        "model_fingerprint": "b" * 64,
        "seconds": 9.0,
        "date": "now",
        "command": "qlip",
        "x": {"y": 1},
    }
    found = differences(card, card | other)
    assert (found.blocking, found.notes) == ([], [])


def test_a_models_own_side_blocks_pixels_but_not_classes():
    """Zero-shot at 224 and 256 pixels is one protocol; a PSNR at two sides is not one figure."""
    for name, blocks in (("imagenet-zeroshot-openai80-v1", False), ("images-recon-bicubic-v1", True)):
        card = result(name, {})["card"]
        found = differences(card, card | {"image_size": 224, "pixels_sha256": "9" * 64})
        assert bool(found.blocking) == blocks
        assert ("image_size 256 -> 224" in found.notes) != blocks
    card = result("imagenet-zeroshot-openai80-v1", {})["card"]
    assert differences(card, card | {"pixels_sha256": "9" * 64}).blocking  # the same side, so other pictures


def test_alike_is_compared(tmp_path, capsys):
    """Difference is B minus A, better follows the direction, baselines are left out, encoders of two models differ."""
    figures = {"psnr": 23.0, "rfid": 3.0, "ssim": 0.6, "bits_per_pixel": 0.4, "fd_encoder": 1.0, "psnr_baseline": 9.0}
    other = {"psnr": 24.5, "rfid": 3.25, "ssim": None, "bits_per_pixel": 0.3, "fd_encoder": 0.5, "lpips_alex": 0.1}
    a = write(tmp_path / "a.json", recon(figures), result("images-knn20-v1", {"knn_cls": 0.5}))
    (tmp_path / "b").mkdir()
    write(tmp_path / "b" / "results.json", recon(other, encoder_fingerprint="7" * 64, dtype="[red]half"))
    compare_results(a, tmp_path / "b")
    text = capsys.readouterr().out
    lines = {line.split()[1]: line for line in text.splitlines() if line.startswith("│")}
    assert "baseline" not in text and "imagenet-recon-256-bicubic-v1" in text
    for name, cells in {
        "psnr": ["23.0000", "24.5000", "+1.5000", "B"],
        "rfid": ["3.0000", "3.2500", "+0.2500", "A"],
        "ssim": ["0.6000", DASH, DASH],
        "bits_per_pixel": ["0.4000", "0.3000", "-0.1000"],
        "fd_encoder": ["1.0000", "0.5000", "-0.5000", "other", "encoder"],
        "lpips_alex": [DASH, "0.1000", DASH],
    }.items():
        assert lines[name].replace("│", " ").split()[1:] == cells
    assert "dtype float32 -> [red]half" in text
    assert f"only in {a}: images-knn20-v1" in text.replace("\n", "")


def test_unlike_is_refused_in_one_line_and_forced_with_a_warning(tmp_path, capsys):
    a, b = write(tmp_path / "a.json", recon()), write(tmp_path / "b.json", recon(filter="bilinear", count=2000))
    with pytest.raises(UserError) as error:
        compare_results(a, b)
    assert str(error.value) == (
        f"{a} and {b} cannot be compared: protocol imagenet-recon-256-bicubic-v1 -> imagenet-recon-256-bilinear-v1, "
        "preparation.filter bicubic -> bilinear, count 50000 -> 2000; evaluate both alike, or give --force"
    )
    assert not capsys.readouterr().out
    compare_results(a, b, force=True)
    text = capsys.readouterr().out.replace("\n", " ")
    assert text.index("not measured alike") < text.index("psnr") and "count 50000 -> 2000" in text


def test_nothing_in_common_is_said(tmp_path):
    a = write(tmp_path / "a.json", recon())
    b = write(tmp_path / "b.json", result("imagenet-zeroshot-openai80-v1", {"top1": 0.7}))
    for force in (False, True):
        with pytest.raises(
            UserError, match=r"no evaluation in common.*imagenet-recon.*imagenet-zeroshot.*one protocol"
        ):
            compare_results(a, b, force=force)


def test_one_protocol_twice_is_refused(tmp_path):
    a = write(tmp_path / "a.json", recon(), recon())
    with pytest.raises(UserError, match="twice"):
        compare_results(a, a)


def test_directions_are_those_of_the_report():
    assert {name: direction(name) for name in FIGURES} == {name: words.better for name, words in FIGURES.items()}
    assert direction("image_to_text_r5") == "higher" and direction("compression_ratio") == ""


def test_not_measured_is_none(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([recon({"a": float("nan"), "b": float("inf"), "c": None, "d": 1})]))
    assert read_results(path)[0]["figures"] == {"a": None, "b": None, "c": None, "d": 1}


GOOD = recon()
HOSTILE = {
    "no JSON": ("{", "is not JSON"),
    "too deep": ("[" * 100_000, "is not JSON"),
    "no list": ('{"a": 1}', "no list of results"),
    "empty": ("[]", "no list of results"),
    "no object": ("[1]", "result 1 is no object"),
    "no figures": (json.dumps([GOOD, {k: v for k, v in GOOD.items() if k != "figures"}]), "result 2 has no figures"),
    "text for a figure": (json.dumps([GOOD | {"figures": {"psnr": "23"}}]), "psnr that is no number"),
    "truth for a figure": (json.dumps([GOOD | {"figures": {"psnr": True}}]), "psnr that is no number"),
    "too long a number": (json.dumps([GOOD]).replace("23.0", "9" * 5000), "is not JSON"),
    "long a number": (json.dumps([GOOD]).replace("23.0", "9" * 400), "psnr that is no number"),
    "no protocol": (json.dumps([GOOD | {"card": {"count": 1}}]), "without protocol"),
    "count as text": (json.dumps([GOOD | {"card": CARD | {"protocol": "x", "count": "1"}}]), "without count"),
    "model as list": (json.dumps([GOOD | {"card": GOOD["card"] | {"model": []}}]), "model is no str"),
    "preparation as text": (json.dumps([GOOD | {"card": GOOD["card"] | {"preparation": "x"}}]), "preparation is no"),
    "surrogate": (json.dumps([GOOD | {"figures": {"\ud800\x1b[2J": "x"}}]), "that is no number"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_files_that_are_not_ours_are_one_line(tmp_path, name):
    text, said = HOSTILE[name]
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError) as error:
        read_results(tmp_path / "a.json")
    message = str(error.value)
    assert said in message and message.endswith("give a results.json written by `qlip eval`")
    assert message.isprintable()


def test_missing_files_are_one_line(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UserError, match=r"cannot read .*json: No such file.*qlip eval"):
            read_results(path)
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not JSON"):
        read_results(tmp_path / "b.json")


def test_odd_values_in_cards_do_not_stop_the_comparison(tmp_path):
    """Unknown keys, other types and long texts are shown shortened, on one line."""
    a, b = recon(), copy.deepcopy(recon())
    b["card"] |= {"left_out": {"a": 1}, "complete": None, "reference": "x\n" * 500, "templates": [1] * 500}
    found = differences(a["card"], b["card"])
    assert any(line.startswith("left_out.a absent -> 1") for line in found.blocking)
    assert all(line.isprintable() and len(line) < 120 for line in found.blocking)
