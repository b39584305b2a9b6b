"""The report: one self-contained, well-formed page that shows every figure, escapes foreign text and survives gaps."""

import io
import json
import math
import re
import shlex
import shutil
import tarfile
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from qlip.apps.report import write_report
from qlip.apps.report_words import FIGURES, TERMS, format_duration, format_figure
from qlip.core.errors import UserError
from qlip.data.scene_shards import write_scene_shards
from qlip.data.scenes import COLOUR_NAMES, SHAPE_NAMES, SceneConfig
from qlip.models.qlip.loading import save_model
from qlip.models.qlip.modeling import QLIPModel
from qlip.models.qlip.processing import QLIPProcessor
from qlip.recipes.model import ModelConfig, TowerSize

SIZE = 16
HOSTILE = "<script>alert(1)</script> & \"quoted\" 'too'"
VOID = {"meta", "img", "br", "hr", "link", "input"}
FORMATTED = {  # written out by hand for a few figures: the page must not agree with a broken formatter
    "psnr": (23.456, "23.46 dB"),
    "encoder_distance": (0.123456, "0.1235"),
    "bit_entropy": (0.65432, "0.6543 nats"),
    "top1": (0.4321, "43.2 %"),
    "top5": (0.8768, "87.7 %"),
}


class Page(HTMLParser):
    """Checks that tags close in order and collects text, addresses and tag names."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def make_shards(folder: Path, *, num: int, size: int) -> None:
    """Scene shards whose first caption is hostile."""
    (path,) = write_scene_shards(folder, num=num, split="test", config=SceneConfig(image_size=size))
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            data = HOSTILE.encode() if name == "000000000.txt" else data
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def make_results(shift: float) -> list[dict]:
    """Results as `evals/run.py` writes them; `shift` makes the figures of the stages differ."""
    reconstruction = {"psnr": 20.125, "ssim": 0.7125, "encoder_distance": 0.8, "fd_encoder": 3.25}
    baseline = {f"{name}_baseline": value / 2 + shift / 100 for name, value in reconstruction.items()}
    code = {
        "bit_entropy": 0.61234,
        "bit_entropy_max": math.log(2),
        "balanced_bits": 0.75,
        "distinct_token_share": 0.875,
    }
    code |= {"bits_per_pixel": 0.4375, "compression_ratio": 54.857}
    names = ("top1", "top5", "top1_seen_pairs", "top1_unseen_pairs", "colour_top1", "shape_top1")
    zero_shot = {name: 0.3125 + 0.0625 * i for i, name in enumerate(names)}
    zero_shot |= {f"{name}_baseline": 0.01 * (i + 1) for i, name in enumerate(names)}
    details = {"colours": list(COLOUR_NAMES), "shapes": list(SHAPE_NAMES)}
    for kind, classes in (("colour", COLOUR_NAMES), ("shape", SHAPE_NAMES)):
        n = len(classes)
        details[f"{kind}_confusion"] = [[17 if i == j else (i + 2 * j) % 5 for j in range(n)] for i in range(n)]
    card = {"count": 40, "data": "test", "versions": {"torch": "2.x"}}
    return [
        {
            "eval": "reconstruction",
            "figures": {name: value + shift for name, value in (reconstruction | code).items()} | baseline,
            "details": {"bit_share": [0.3 + 0.015 * i for i in range(28)]},
            "card": card | {"protocol": "scenes-reconstruction-v1", "baseline": "the mean picture"},
        },
        {
            "eval": "zero_shot",
            "figures": zero_shot,
            "details": details,
            "card": card | {"protocol": "scenes-zeroshot-v1", "baseline": "chance"},
        },
    ]


def make_lines(terms: tuple[str, ...], *, num: int) -> list[dict]:
    """Training lines with falling terms, one of them missing now and then, and an evaluation line."""
    lines: list[dict] = []
    for i in range(num):
        values = {term: (3 + k) * math.exp(-4 * i / num * (k % 2)) for k, term in enumerate(terms)}
        if i % 2:
            values[terms[0]] = None  # NaN in the log
            del values[terms[1]]  # a lazy term
        lines.append({"step": 25 * (i + 1), **values, "images_per_second": 310.0 + i})
    return [*lines, {"step": 25 * num, "eval": "reconstruction", "psnr": 1.0, "card": {}}]


def make_demo(folder: Path, *, size: int = SIZE, num: int = 40, lines: int = 6) -> Path:
    """A demo folder with both stages, as `qlip demo` leaves it, from random models."""
    make_shards(folder / "data" / "test", num=num, size=size)
    tower = TowerSize(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32)
    config = ModelConfig(
        image_size=size, patch_size=8, encoder=tower, decoder=tower, text=tower, context_length=16, projection_dim=16
    )
    terms = {
        "stage1": ("commitment_loss", "contrastive_loss", "loss", "mse", "logit_scale"),
        "stage2": ("discriminator/r1_loss", "decoder/generator_loss", "decoder/loss", "decoder/encoder"),
    }
    (folder / "results").mkdir()
    for shift, name in enumerate(terms):
        run = folder / name
        model, processor = QLIPModel(config.build_config()), QLIPProcessor.for_size(size, context_length=16)
        save_model(model, folder=run / "export", processor=processor, step=150)
        recipe = {"recipe": "scenes_tiny" if name == "stage1" else "scenes_tiny_stage2"}
        run_config = recipe | {"model": {"image_size": size}, "data": {"batch_size": 64}}
        content = {"config": run_config, "git_commit": None, "versions": {"torch": "2.x"}}
        (run / "config.json").write_text(json.dumps(content))
        text = "\n".join(json.dumps(line) for line in make_lines(terms[name], num=lines))
        (run / "metrics.jsonl").write_text(text + '\n{"step": 17')  # the last line was cut off by a kill
        (folder / "results" / f"{name}.json").write_text(json.dumps(make_results(-0.125 * shift)))
    machine = {"cpu": "Two <Cores> CPU", "cores": 2, "python": "3.11.0", "torch": "2.11.0"}
    timings = {"scenes": 9.5, "stage1 training": 305.2, "peak_memory_gb": 1.75, "machine": machine}
    (folder / "results" / "timings.json").write_text(json.dumps(timings))
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_demo(tmp_path_factory.mktemp("a demo") / "my run")
    assert write_report(folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def html(demo: Path) -> str:
    return (demo / "report.html").read_text()


def test_page_is_well_formed_and_needs_nothing_from_outside(html: str) -> None:
    page = Page(html)
    assert page.open == []
    assert "http://" not in html and "https://" not in html and "@import" not in html
    assert "script" not in page.tags and "link" not in page.tags
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)
    assert re.findall(r"url\((?!#)", html) == []
    assert len(page.ids) == len(set(page.ids))
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= set(page.ids)
    assert page.tags.count("svg") == 6 + 5 + 1 + 2 + 2  # a plot per term of each stage, accuracies, confusions, bits


def test_every_figure_stands_on_the_page_formatted(demo: Path, html: str) -> None:
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", html)
    for name in ("stage1", "stage2"):
        for result in json.loads((demo / "results" / f"{name}.json").read_text()):
            for figure, value in result["figures"].items():
                assert format_figure(figure.removesuffix("_baseline"), value) in cells, (name, figure)
    text = Page(html).text
    for headline in ("20.12 dB", "31.2 %", "15.6 %", "stage 1: 0.8, stage 2: 0.675"):
        assert headline in text
    for fact in ("5 min 05 s", "5 min 15 s", "1.75 GB", "Two <Cores> CPU", "scenes_tiny_stage2", "312"):
        assert fact in text


def test_foreign_text_is_escaped(html: str) -> None:
    assert "<script>alert(1)" not in html and "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert HOSTILE in Page(html).text


def test_pictures_and_grid(demo: Path, html: str) -> None:
    assert Page(html).tags.count("img") == 12 * 3 + 4
    with Image.open(demo / "samples" / "reconstructions.png") as grid:
        assert grid.width > 6 * 3 * SIZE and grid.height > 2 * 3 * 3 * SIZE


def test_commands_name_the_real_folders(demo: Path, html: str) -> None:
    text = Page(html).text
    assert f"qlip reconstruct {shlex.quote(str(demo.resolve() / 'stage2' / 'export'))} picture.jpg" in text
    assert f"--data {shlex.quote(str(demo.resolve() / 'data' / 'test'))}" in text


@pytest.mark.parametrize(
    "missing",
    [
        ["stage2", "stage1/export"],
        ["stage1", "results/stage1.json", "data"],
        ["results", "stage1/metrics.jsonl", "stage2/config.json"],
    ],
)
def test_missing_parts_are_left_out_with_a_sentence(demo: Path, tmp_path: Path, missing: list[str]) -> None:
    folder = tmp_path / "demo"
    shutil.copytree(demo, folder)
    for name in missing:
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    html = write_report(folder).read_text()
    assert Page(html).open == []
    assert 'class="absent"' in html


def test_other_folders_and_broken_results_are_refused(demo: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no demo folder.*give the --out folder"):
        write_report(tmp_path)
    shutil.copytree(demo / "stage1", tmp_path / "stage1")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "stage1.json").write_text("[{")
    with pytest.raises(UserError, match=r"stage1\.json.*delete it"):
        write_report(tmp_path)


def test_formats() -> None:
    for name, (value, text) in FORMATTED.items():
        assert format_figure(name, value) == text
    assert format_figure("top1_unseen_pairs", math.nan) == "\N{EN DASH}" == format_figure("psnr", None)
    assert format_figure("a_figure_of_tomorrow", 12.34567) == "12.35"
    assert [format_duration(s) for s in (4.24, 59.94, 59.96, 60, 125.6)] == [
        "4.2 s",
        "59.9 s",
        "1 min 00 s",
        "1 min 00 s",
        "2 min 06 s",
    ]
    assert all(words.meaning for words in (*FIGURES.values(), *TERMS.values()))
