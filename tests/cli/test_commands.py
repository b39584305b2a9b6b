"""Every small command on real files: what it writes, what it says, and how it refuses what it cannot use."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from tiny_runs import write_tar

from qlip.models.qlip.loading import load_model, load_processor

PHOTOS = Path(skimage.data.__file__).parent


def test_data_scenes_then_inspect(qlip, tmp_path):
    out = tmp_path / "my scenes"
    said = qlip.works("data", "scenes", out, "--num", "12", "--image-size", "16", "--split", "test")
    assert "12 scenes in 1 shards under" in said
    assert (out / "00000.tar").is_file() and (out / "00000.parquet").is_file()
    report = qlip.works("data", "inspect", out)
    assert "samples good      12" in report and "16 / 16 / 16" in report and "PNG 12" in report
    assert "samples good      5" in qlip.works("data", "inspect", out / "00000.tar", "--limit", "5")
    assert "choose another folder" in qlip.refused("data", "scenes", out, "--num", "12", "--image-size", "16")
    assert "not all zero" in qlip.refused("data", "scenes", out, "--num", "1", "--object-counts", "0", "0", "0", "0")
    assert "nowhere" in qlip.refused("data", "inspect", tmp_path / "nowhere")


def test_reconstruct_photographs(qlip, model_folder, tmp_path):
    renamed = tmp_path / "a gif, renamed.jpg"
    renamed.write_bytes((PHOTOS / "no_time_for_that_tiny.gif").read_bytes())
    pictures = [PHOTOS / "astronaut.png", PHOTOS / "rocket.jpg", PHOTOS / "camera.png", renamed]
    out = tmp_path / "looks ü"
    assert "4 pictures, 112 bits each" in qlip.works("reconstruct", model_folder, *pictures, "--out", out)
    names = {"astronaut.png", "rocket.png", "camera.png", "a gif, renamed.png", "sheet.png"}
    assert {path.name for path in out.iterdir()} == names
    model, processor = load_model(model_folder), load_processor(model_folder)
    pixel_values = processor(images=Image.open(pictures[0]), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        (expected,) = processor.postprocess(model.decode(model.encode(pixel_values)))
    (seen,) = processor.postprocess(pixel_values)
    np.testing.assert_array_equal(np.asarray(Image.open(out / "astronaut.png")), np.asarray(expected))
    sheet = Image.open(out / "sheet.png")
    assert sheet.size == (2 * 256, 4 * 256)
    rows = np.asarray(sheet)[8:256:16]  # the sheet shows every pixel sixteen times
    np.testing.assert_array_equal(rows[:, 8::16], np.concatenate([np.asarray(seen), np.asarray(expected)], axis=1))
    qlip.works("reconstruct", model_folder, PHOTOS / "astronaut.png", "--out", out)
    assert (out / "astronaut_2.png").is_file()


def test_reconstruct_refuses_what_is_no_picture(qlip, model_folder, tmp_path):
    text, out = tmp_path / "text.jpg", tmp_path / "looks"
    text.write_text("no picture at all")
    good = PHOTOS / "coffee.png"
    assert "text.jpg: not an image" in qlip.refused("reconstruct", model_folder, good, text, "--out", out)
    missing = tmp_path / "missing.jpg"
    assert f"no picture at {missing}" in qlip.refused("reconstruct", model_folder, good, missing, "--out", out)
    assert f"no picture at {tmp_path}" in qlip.refused("reconstruct", model_folder, tmp_path, "--out", out)
    assert not out.exists()
    assert "is not a model folder" in qlip.refused("reconstruct", tmp_path, good, "--out", out)
    assert "choose another --out" in qlip.refused("reconstruct", model_folder, good, "--out", text)
    assert "missing" in qlip.refused("reconstruct", model_folder, good)


def test_classify_prints_probabilities_in_order(qlip, model_folder, tmp_path):
    said = qlip.works("classify", model_folder, PHOTOS / "chelsea.png", "--labels", "a cat, a rocket ,,ein Kaffee")
    shares = {}
    for line in said.splitlines():
        cells = [cell.strip() for cell in line.strip("│┃ ").replace("┃", "│").split("│")]
        if len(cells) == 3 and cells[0] != "label":
            shares[cells[0]] = float(cells[1])
    assert set(shares) == {"a cat", "a rocket", "ein Kaffee"}
    assert sum(shares.values()) == pytest.approx(1, abs=2e-3)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    refused = qlip.refused("classify", model_folder, PHOTOS / "chelsea.png", "--labels", " , ")
    assert "no labels given" in refused


def test_eval_writes_its_results(qlip, model_folder, tmp_path):
    qlip.works("data", "scenes", tmp_path / "test", "--num", "30", "--image-size", "16", "--split", "test")
    file = tmp_path / "result.json"
    options = ["--data", tmp_path / "test", "--max-samples", "10", "--device", "cpu", "--out", tmp_path / "out"]
    said = qlip.works("eval", model_folder, *options, "--json", file)
    assert f"scenes-reconstruction-v1  (10 samples of {tmp_path.name}/test, not the full set)" in said
    assert "psnr" in said and "chance" in said
    assert [result["card"]["count"] for result in json.loads(file.read_text())] == [10, 10]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(file.read_text())
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"results.json", "scenes-reconstruction-v1.csv", "scenes-reconstruction-v1_worst.png"}
    refused = qlip.refused("eval", model_folder, *options, "--evals", "scenes-zeroshots-v1")
    assert "did you mean 'scenes-zeroshot-v1'" in refused
    refused = qlip.refused("eval", model_folder, "--data", tmp_path / "test", "--max-samples", "-1")
    assert "max_samples is -1" in refused
    assert "choose another file" in qlip.refused("eval", model_folder, *options, "--json", file / "x.json")


def test_results_are_compared_and_become_a_table(qlip, model_folder, tmp_path):
    qlip.works("data", "scenes", tmp_path / "test", "--num", "12", "--image-size", "16", "--split", "test")
    options = ["--data", tmp_path / "test", "--evals", "scenes-reconstruction-v1", "--device", "cpu"]
    for name, more in (("a", []), ("b", []), ("c", ["--max-samples", "5"])):
        qlip.works("eval", model_folder, *options, *more, "--out", tmp_path / name)
    a, b, c = (tmp_path / name / "results.json" for name in "abc")
    assert "psnr" in qlip.works("eval", "compare", a, b)
    assert "cannot be compared: count 12 -> 5" in qlip.refused("eval", "compare", a, c)
    assert "count 12 -> 5" in qlip.works("eval", "compare", a, c, "--force")
    table = qlip.works("table", a)
    assert "| QLIP-B (16) |" in table and "ours (n = 12)" in table
    assert "imagenet-recon-256-bilinear-v1" in qlip.works("eval", "protocols")


def test_doctor_names_versions_and_finds_no_problem(qlip):
    said = qlip.works("doctor")
    assert f"{torch.__version__.split('+')[0]}" in said and "no problems found" in said
    assert "extra eval" in said and "free disk here" in said


def test_inspect_names_faults(qlip, tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (20, 10)).save(picture, "PNG")
    files = {"a.png": picture.getvalue(), "a.txt": b"fine", "b.png": b"broken", "b.txt": b"not", "../c.png": b""}
    write_tar(tmp_path / "00000.tar", files)
    said = qlip.works("data", "inspect", tmp_path)
    assert "samples good      1" in said and "samples skipped   2" in said
    assert "unsafe name" in said and "not an image" in said
