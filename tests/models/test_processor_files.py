"""Processors in files: our folders, the released layout without any, older tools' files, damage, Auto classes."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, CLIPImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from qlip.core.errors import UserError
from qlip.models.qlip.processing import QLIPProcessor

OFFICIAL_CONFIG = Path(__file__).parents[1] / "data" / "official_layout" / "config.json"
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 23, 3), dtype=np.uint8))
TEXTS = ["a cat", "a very long text about a cat and a dog"]
FILES = {"preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
OLD_SETTINGS = {  # as transformers 4 wrote them
    "crop_size": 16,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.25, 0.25],
    "resample": 3,
    "size": 16,
}


@pytest.fixture(scope="module")
def processor() -> QLIPProcessor:
    return QLIPProcessor.for_size(16, context_length=9)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, processor) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model folder in the released layout: 32 px, texts of 20 tokens, no processor files."""
    shutil.copy(OFFICIAL_CONFIG, tmp_path / "config.json")
    return tmp_path


def assert_equal(ours: QLIPProcessor, theirs: QLIPProcessor) -> None:
    assert type(ours.image_processor) is type(theirs.image_processor) is CLIPImageProcessorPil
    assert ours.tokenizer.model_max_length == theirs.tokenizer.model_max_length
    a, b = (each(images=PICTURE, text=TEXTS, return_tensors="pt") for each in (ours, theirs))
    assert a.keys() == b.keys() == {"pixel_values", "input_ids", "attention_mask"}
    assert all(torch.equal(a[name], b[name]) for name in a)


def write(path: Path, values: object) -> None:
    path.write_text(values if isinstance(values, str) else json.dumps(values))


def test_a_processor_survives_its_files(saved, processor):
    assert {path.name for path in saved.iterdir()} == FILES
    assert_equal(QLIPProcessor.from_pretrained(saved), processor)
    assert_equal(QLIPProcessor.from_pretrained(str(saved)), processor)


def test_auto_classes_read_our_folder(saved, processor):
    images = AutoImageProcessor.from_pretrained(saved, backend="pil")
    assert type(images) is CLIPImageProcessorPil
    expected = processor(images=PICTURE, text=TEXTS[0], return_tensors="pt")
    assert torch.equal(images(PICTURE, return_tensors="pt").pixel_values, expected.pixel_values)
    assert isinstance(AutoImageProcessor.from_pretrained(saved), CLIPImageProcessor)  # torchvision's
    assert torch.equal(
        AutoTokenizer.from_pretrained(saved)(TEXTS[0], return_tensors="pt").input_ids, expected.input_ids
    )


def test_older_tools_find_the_image_processor_on_its_own(saved, tmp_path, processor):
    shutil.copy(saved / "preprocessor_config.json", tmp_path)
    alone = CLIPImageProcessorPil.from_pretrained(tmp_path)
    expected = processor(images=PICTURE, return_tensors="pt").pixel_values
    assert torch.equal(alone(PICTURE, return_tensors="pt").pixel_values, expected)


def test_a_fresh_process_that_has_imported_the_models_reads_it_with_auto_processor(saved):
    program = f"""
import qlip.models
from qlip.models.qlip import QLIPConfig, QLIPProcessor
from transformers import AutoProcessor
AutoProcessor.register(QLIPConfig, QLIPProcessor, exist_ok=True)
processor = AutoProcessor.from_pretrained({str(saved)!r})
print(type(processor).__name__, type(processor.image_processor).__name__, processor.tokenizer.model_max_length)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["QLIPProcessor", "CLIPImageProcessorPil", "9"]
    assert done.stderr == ""


def test_the_released_layout_without_processor_files_gets_clips_preprocessing(folder, caplog, capfd, recwarn):
    logging.getLogger("transformers").propagate, before = True, logging.getLogger("transformers").propagate
    try:
        ours = QLIPProcessor.from_pretrained(folder)
    finally:
        logging.getLogger("transformers").propagate = before
    assert_equal(ours, QLIPProcessor.for_size(32, context_length=20))
    assert caplog.records == [] and list(recwarn) == [] and capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("model_type", "image_size"), [("clip", 224), ("qlip", 256)])
def test_sizes_that_a_config_leaves_out_are_its_layouts_defaults(tmp_path, model_type, image_size):
    write(tmp_path / "config.json", {"model_type": model_type, "vision_config": {}, "decoder_config": {}})
    ours = QLIPProcessor.from_pretrained(tmp_path)
    assert ours.image_processor.crop_size["height"] == ours.image_processor.size["shortest_edge"] == image_size
    assert ours.tokenizer.model_max_length == 77


def test_a_preprocessor_config_alone_is_enough(tmp_path):
    write(tmp_path / "preprocessor_config.json", OLD_SETTINGS)
    ours = QLIPProcessor.from_pretrained(tmp_path)
    black = ours(images=Image.new("RGB", (20, 30)), return_tensors="pt").pixel_values
    assert torch.equal(black, torch.full((1, 3, 16, 16), -2.0))
    assert ours.tokenizer.model_max_length == 77
    assert ours.postprocess(black)[0].getpixel((3, 3)) == (0, 0, 0)


def test_files_win_over_the_config_and_options_over_the_files(folder):
    write(folder / "processor_config.json", {"processor_class": "CLIPProcessor"})  # of transformers 4: no images in it
    write(folder / "preprocessor_config.json", OLD_SETTINGS)
    assert QLIPProcessor.from_pretrained(folder).image_processor.crop_size["width"] == 16
    write(folder / "processor_config.json", {"image_processor": {"size": {"shortest_edge": 24}, "do_rescale": False}})
    assert QLIPProcessor.from_pretrained(folder).image_processor.do_rescale is False
    changed = QLIPProcessor.from_pretrained(folder, size={"shortest_edge": 48}, do_center_crop=False)
    assert (changed.image_processor.size["shortest_edge"], changed.image_processor.do_center_crop) == (48, False)
    own = QLIPProcessor.for_size(8)
    assert QLIPProcessor.from_pretrained(folder, image_processor=own.image_processor).image_processor.size == (
        own.image_processor.size
    )
    with pytest.warns(UserWarning, match="image_size has no effect"):
        QLIPProcessor.from_pretrained(folder, image_size=3)


def test_tokenizer_json_alone_is_enough(folder, saved):
    shutil.copy(saved / "tokenizer.json", folder)
    assert_equal(QLIPProcessor.from_pretrained(folder), QLIPProcessor.for_size(32, context_length=20))


def test_vocabulary_and_merges_are_enough(folder, saved):
    model = json.loads((saved / "tokenizer.json").read_text())["model"]
    write(folder / "vocab.json", model["vocab"])
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(merge) for merge in model["merges"])]))
    assert_equal(QLIPProcessor.from_pretrained(folder), QLIPProcessor.for_size(32, context_length=20))
    (folder / "merges.txt").unlink()
    with pytest.raises(ValueError, match=r"without merges\.txt; add what is missing"):
        QLIPProcessor.from_pretrained(folder)


def test_a_subfolder_is_read_instead(folder, saved, processor):
    shutil.copytree(saved, folder / "processor")
    assert_equal(QLIPProcessor.from_pretrained(folder, subfolder="processor"), processor)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", "{", "config.json is not JSON"),
        ("config.json", [], "config.json must hold an object, got list"),
        ("config.json", {"model_type": "bert"}, "no processor files, no config.json of a QLIP model"),
        (
            "config.json",
            {"decoder_config": {}, "vision_config": {"image_size": "32"}},
            "vision_config.image_size must be from 1 to 65536, got '32'",
        ),
        ("processor_config.json", "", "processor_config.json is not JSON"),
        ("processor_config.json", {"image_processor": 3}, "image_processor in processor_config.json must be an object"),
        ("preprocessor_config.json", "{]", "preprocessor_config.json is not JSON"),
        ("preprocessor_config.json", {"size": {"edge": 3}}, "broken settings for pictures"),
        ("preprocessor_config.json", {"image_mean": [0.5]}, r"image_mean must be three numbers, got \[0.5\]"),
        ("preprocessor_config.json", {"image_std": "a"}, "image_std must be three numbers"),
        (
            "preprocessor_config.json",
            {"image_processor_type": "SiglipImageProcessor"},
            "SiglipImageProcessor is another preprocessing than CLIP's",
        ),
        ("tokenizer.json", "{", "broken tokenizer files"),
        ("tokenizer.json", {}, "broken tokenizer files"),
        ("tokenizer_config.json", {"model_max_length": 3}, "tokenizer files without vocab.json and merges.txt"),
    ],
)
def test_what_is_there_but_broken_is_refused_in_one_line(folder, name, content, reason):
    write(folder / name, content)
    with pytest.raises(ValueError, match=reason) as caught:
        QLIPProcessor.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_a_place_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="no processor files, no config"):
        QLIPProcessor.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="not a model folder"):
        QLIPProcessor.from_pretrained(tmp_path / "nothing")
