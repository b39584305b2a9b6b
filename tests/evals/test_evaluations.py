"""Every figure of the evaluations against an explicit loop over the same pictures, and what the cards say."""

from __future__ import annotations

import io
import json
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from qlip.core.errors import UserError
from qlip.data.scene_shards import write_scene_shards
from qlip.data.scenes import COLOUR_NAMES, HELD_OUT_PAIRS, SHAPE_NAMES, SceneConfig
from qlip.evals.card import sha256_of_names
from qlip.evals.code_use import code_use
from qlip.evals.results import print_results, write_results
from qlip.evals.run import EvalRequest, build_evaluator, run_evals
from qlip.evals.scene_zero_shot import COLOUR_TEMPLATES, PAIRS, TEMPLATES
from qlip.evals.zero_shot import class_weights
from qlip.models.measured import MeasuredQLIP
from qlip.models.qlip.fingerprint import encoder_fingerprint, model_fingerprint
from qlip.models.qlip.loading import load_model, save_model
from qlip.models.qlip.modeling import QLIPModel
from qlip.models.qlip.processing import QLIPProcessor
from qlip.quantizers.ids import bits_to_ids
from qlip.recipes.model import ModelConfig, TowerSize

NUM = 70
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def processor() -> QLIPProcessor:
    return QLIPProcessor.for_size(16, context_length=16)


def random_model() -> QLIPModel:
    torch.manual_seed(0)
    tower = TowerSize(hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24)
    sizes = ModelConfig(
        image_size=16,
        patch_size=8,
        encoder=tower,
        decoder=tower,
        text=tower,
        context_length=16,
        projection_dim=16,
        initializer_range=0.3,
    )
    return QLIPModel(sizes.build_config()).eval()


@pytest.fixture(scope="module")
def model() -> QLIPModel:
    return random_model()


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "test"
    write_scene_shards(folder, num=NUM, split="test", config=SceneConfig(image_size=24))
    return folder


@pytest.fixture(scope="module")
def samples(shards, processor) -> list[dict]:
    """Key, json record and processed pixels of every sample, read without any code of ours but the processor's."""
    with tarfile.open(shards / "00000.tar") as tar:
        content = {member.name: tar.extractfile(member).read() for member in tar}
    return [
        {
            "key": key,
            "record": json.loads(content[f"{key}.json"]),
            "pixel_values": processor(images=Image.open(io.BytesIO(content[f"{key}.png"])), return_tensors="pt")[
                "pixel_values"
            ],
        }
        for key in sorted({name.partition(".")[0] for name in content})
    ]


def numpy_frechet(a: np.ndarray, b: np.ndarray) -> float:
    """By the eigenvalues of the plain product of the covariances."""
    roots = np.sqrt(np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T)).real.clip(min=0))
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T)) - 2 * roots.sum())


def embedding_by_hand(model: QLIPModel, processor: QLIPProcessor, name: str, templates: tuple[str, ...]) -> np.ndarray:
    """One class's weights, one text at a time: normalise, mean over templates, normalise."""
    vectors = []
    for template in templates:
        encoded = processor.tokenizer(template.format(name), return_tensors="pt")
        vector = model.get_text_features(encoded["input_ids"]).pooler_output[0].double().numpy()
        vectors.append(vector / np.sqrt((vector**2).sum()))
    mean = np.mean(vectors, axis=0)
    return mean / np.sqrt((mean**2).sum())


@torch.inference_mode()
def test_class_weights_are_the_normalised_mean_of_normalised_prompts(model, processor):
    names = ["red circle", "star", "a shape with a much longer name"]
    weights = class_weights(MeasuredQLIP(model, processor), names, [template.format for template in TEMPLATES])
    expected = np.stack([embedding_by_hand(model, processor, name, TEMPLATES) for name in names])
    np.testing.assert_allclose(weights.numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(weights, axis=1), 1, atol=1e-6)


@torch.inference_mode()
def test_zero_shot_figures_equal_brute_force(model, processor, shards, samples):
    evaluator = build_evaluator("scenes-zeroshot-v1", EvalRequest(data=str(shards), batch_size=9).open())
    figures = evaluator.run(MeasuredQLIP(model, processor), CPU)

    single = [sample for sample in samples if len(sample["record"]["scene"]["objects"]) == 1]
    assert 0 < len(single) < NUM
    pairs = np.stack([embedding_by_hand(model, processor, pair, TEMPLATES) for pair in PAIRS])
    colours = np.stack([embedding_by_hand(model, processor, name, COLOUR_TEMPLATES) for name in COLOUR_NAMES])
    shapes = np.stack([embedding_by_hand(model, processor, name, TEMPLATES) for name in SHAPE_NAMES])
    hits: dict[str, list[bool]] = {name.removesuffix("_baseline"): [] for name in figures if name.endswith("_baseline")}
    confusion = np.zeros((10, 10), int)
    for sample in single:
        embedding = model.get_image_features(sample["pixel_values"]).pooler_output[0].double().numpy()
        (truth,) = sample["record"]["scene"]["objects"]
        ranked = [PAIRS[i] for i in np.argsort(-pairs @ embedding)]
        right = ranked[0] == f"{truth['colour']} {truth['shape']}"
        said = COLOUR_NAMES[int(np.argmax(colours @ embedding))]
        hits["top1"].append(right)
        hits["top5"].append(f"{truth['colour']} {truth['shape']}" in ranked[:5])
        unseen = (truth["colour"], truth["shape"]) in HELD_OUT_PAIRS
        hits["top1_unseen_pairs" if unseen else "top1_seen_pairs"].append(right)
        hits["colour_top1"].append(said == truth["colour"])
        hits["shape_top1"].append(SHAPE_NAMES[int(np.argmax(shapes @ embedding))] == truth["shape"])
        confusion[COLOUR_NAMES.index(truth["colour"]), COLOUR_NAMES.index(said)] += 1
    assert len(hits["top1_unseen_pairs"]) > 0
    for name, values in hits.items():
        assert figures[name] == pytest.approx(np.mean(values)), name

    assert evaluator.details["colour_confusion"] == confusion.tolist()
    assert np.sum(evaluator.details["shape_confusion"]) == len(single)
    card = evaluator.card()
    assert card["count"] == len(single)
    assert card["keys_sha256"] == sha256_of_names([sample["key"] for sample in single])
    assert card["count_unseen_pairs"] == len(hits["top1_unseen_pairs"])
    assert len(PAIRS) == len(set(PAIRS)) == 100 and len(HELD_OUT_PAIRS) == 10
    baselines = {name: value for name, value in figures.items() if name.endswith("_baseline")}
    assert baselines == {
        "top1_baseline": 0.01,
        "top5_baseline": 0.05,
        "top1_seen_pairs_baseline": 0.01,
        "top1_unseen_pairs_baseline": 0.01,
        "colour_top1_baseline": 0.1,
        "shape_top1_baseline": 0.1,
    }


def score_by_hand(model: QLIPModel, real: list[np.ndarray], fake: list[np.ndarray]) -> dict[str, float]:
    """PSNR, SSIM, encoder distance and fd of uint8 (h, w, 3) pictures, one pair at a time."""
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    psnr, ssim, distance, pooled = [], [], [], ([], [])
    for x, y in zip(real, fake, strict=True):
        psnr.append(peak_signal_noise_ratio(x, y, data_range=255))
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": 2}
        ssim.append(structural_similarity(x, y, data_range=255, **options))
        layers = []
        for picture, said in zip((x, y), pooled, strict=True):
            pixels = torch.tensor((picture / 255 - mean) / std).float().permute(2, 0, 1)[None]
            output = model.vision_model(pixels, output_hidden_states=True)
            said.append(output.pooler_output[0].double().numpy())
            states = torch.stack(output.hidden_states[1:])[:, 0, 1:].double()  # (layers, n, d), without CLS
            layers.append(states / states.norm(dim=-1, keepdim=True))
        distance.append(float((layers[0] - layers[1]).square().sum(-1).mean()))
    figures = {"psnr": psnr, "ssim": ssim, "encoder_distance": distance}
    fd = numpy_frechet(*(np.stack(said) for said in pooled))
    return {name: float(np.mean(values)) for name, values in figures.items()} | {"fd_encoder": fd}


@torch.inference_mode()
@pytest.mark.parametrize(("batch_size", "max_samples"), [(17, 40), (100, 40), (20, 2000)])
def test_reconstruction_figures_equal_an_explicit_loop(model, processor, shards, samples, batch_size, max_samples):
    data = EvalRequest(data=str(shards), batch_size=batch_size, max_samples=max_samples).open()
    evaluator = build_evaluator("scenes-reconstruction-v1", data)
    figures = evaluator.run(MeasuredQLIP(model, processor), CPU)
    used = samples[:max_samples]
    real, fake, bits = [], [], []
    for sample in used:
        bits.append(model.encode(sample["pixel_values"])[0])
        real.append(np.asarray(processor.postprocess(sample["pixel_values"])[0]))
        fake.append(np.asarray(processor.postprocess(model.decode(bits[-1][None]))[0]))
    mean_picture = np.rint(np.mean(real, axis=0)).astype(np.uint8)
    for name, value in score_by_hand(model, real, fake).items():
        assert figures[name] == pytest.approx(value, rel=1e-3), name
    for name, value in score_by_hand(model, real, [mean_picture] * len(real)).items():
        assert figures[f"{name}_baseline"] == pytest.approx(value, rel=1e-3), name
    share = torch.stack(bits).double().numpy().mean((0, 1))
    np.testing.assert_allclose(evaluator.details["bit_share"], share, atol=1e-6)
    assert figures["bits_per_pixel"] == 28 / 64 and figures["compression_ratio"] == pytest.approx(24 * 64 / 28)
    assert evaluator.card()["count"] == len(used) == min(max_samples, NUM)
    assert evaluator.card()["keys_sha256"] == sha256_of_names([sample["key"] for sample in used])


def test_code_use_equals_numpy():
    bits = torch.rand(6, 4, 28) < torch.linspace(0, 1, 28)
    bits[3] = bits[0]
    tokens = bits.numpy().reshape(-1, 28)
    share = tokens.mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = np.nan_to_num(-share * np.log(share)) + np.nan_to_num(-(1 - share) * np.log(1 - share))
    used = code_use(bits_to_ids(bits), num_bits=28)
    figures = used.figures
    np.testing.assert_allclose(used.bit_share, share, atol=1e-12)
    np.testing.assert_allclose(used.bit_entropies, entropy, atol=1e-7)
    assert figures["bit_entropy"] == pytest.approx(entropy.mean())
    assert figures["bit_entropy_max"] == pytest.approx(math.log(2))
    assert figures["balanced_bits"] == pytest.approx((entropy / math.log(2) > 0.9).mean())
    assert figures["distinct_token_share"] == len({tuple(token) for token in tokens.tolist()}) / len(tokens) < 1


@pytest.fixture(scope="module")
def export(tmp_path_factory, model, processor) -> Path:
    folder = tmp_path_factory.mktemp("model") / "export"
    save_model(model, folder=folder, processor=processor, step=7)
    return folder


def test_results_carry_their_protocol_and_survive_json(export, shards, tmp_path, capsys):
    request = EvalRequest(data=str(shards), max_samples=5, folder=tmp_path / "out")
    results = run_evals(export, request, device="cpu")
    assert json.loads((tmp_path / "out" / "results.json").read_text())[0] == results[0]
    assert not (tmp_path / "out" / ".parts").exists()
    needed = {"protocol", "preparation", "protocol_settings", "complete", "baseline", "data", "count", "skipped"}
    needed |= {"keys_sha256", "pixels_sha256", "image_size", "antialias", "ranks", "batch_size", "command"}
    needed |= {"model", "model_name", "model_fingerprint", "encoder_fingerprint", "dtype", "device", "versions"}
    needed |= {"git_commit", "date", "seconds"}
    for result in results:
        assert result["card"].keys() >= needed
        assert result["card"]["versions"].keys() >= {"qlip", "torch", "torchvision", "transformers", "pillow"}
        assert (result["card"]["count"], result["card"]["skipped"]) == (5, 0)
        assert result["card"]["model_fingerprint"] == model_fingerprint(load_model(export))
    assert [result["eval"] for result in results] == ["reconstruction", "zero_shot"]
    figures = results[1]["figures"]
    figures["top1_unseen_pairs"] = math.nan  # five scenes need not hold an unseen pair
    path = tmp_path / "new" / "result.json"
    write_results(path, results)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    read = json.loads(path.read_text(), parse_constant=refuse)
    assert read[1]["figures"] == figures | {"top1_unseen_pairs": None}
    assert read[0] == results[0]
    for shown in (results, read):
        print_results(shown)
        text = capsys.readouterr().out
        assert (
            f"scenes-zeroshot-v1  (5 samples of {shards.parent.name}/test, not the full set)" in text
            and "top1_unseen_pairs" in text
        )
        assert f"{figures['colour_top1']:.4f}" in text
    assert list(path.parent.iterdir()) == [path]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*; choose another file"):
        write_results(tmp_path / "file" / "result.json", results)


def test_skipped_samples_are_on_the_card(model, processor, shards, tmp_path):
    with tarfile.open(shards / "00000.tar") as tar, tarfile.open(tmp_path / "00000.tar", "w") as broken:
        for member in tar:
            data = tar.extractfile(member).read()
            if member.name == "000000003.png":
                data = data[: len(data) // 2]
                member.size = len(data)
            broken.addfile(member, io.BytesIO(data))
    evaluator = build_evaluator("scenes-reconstruction-v1", EvalRequest(data=str(tmp_path)).open())
    evaluator.run(MeasuredQLIP(model, processor), CPU)
    assert (evaluator.card()["count"], evaluator.card()["skipped"]) == (NUM - 1, 1)


def test_mistakes_are_one_line(export, shards, tmp_path):
    def refused(model: Path = export, **changes) -> str:
        options = {"data": str(shards), "evals": ("scenes-reconstruction-v1",), "max_samples": 10}
        with pytest.raises(UserError) as error:
            run_evals(model, EvalRequest(**(options | changes)), device="cpu")
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "did you mean 'scenes-zeroshot-v1'?" in refused(evals=("scenes-zero-shot-v1",))
    refused(tmp_path)
    assert "nowhere" in refused(data=str(tmp_path / "nowhere"))
    refused(data=str(tmp_path))
    assert "max_samples is -1: give at least 0" in refused(max_samples=-1)
    assert "at least 2" in refused(max_samples=1)
    folder = tmp_path / "own"
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as tar:
        picture = io.BytesIO()
        Image.new("RGB", (16, 16)).save(picture, "PNG")
        for name, data in (("a.png", picture.getvalue()), ("a.txt", b"a photo")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert "this protocol needs scene shards" in refused(data=str(folder), evals=("scenes-zeroshot-v1",))


def test_encoder_fingerprint_follows_every_tensor_that_makes_bits_and_no_other():
    model = random_model()
    before, whole = encoder_fingerprint(model), model_fingerprint(model)
    assert before == encoder_fingerprint(random_model())
    for name, tensor in model.state_dict().items():
        value = tensor.view(-1)[-1].clone()
        tensor.view(-1)[-1] = torch.nextafter(value, torch.tensor(math.inf))
        makes_bits = name.startswith(("vision_model.embeddings.", "vision_model.encoder.", "vision_model.quant_embed."))
        assert (encoder_fingerprint(model) != before) == makes_bits, name
        assert model_fingerprint(model) != whole, name
        tensor.view(-1)[-1] = value
    assert (encoder_fingerprint(model), model_fingerprint(model)) == (before, whole)
