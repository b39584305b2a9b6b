"""GenEval's files as its scorer reads them: prompts in, pictures out and resumed, results in; hostile files named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qlip.core.errors import UserError
from qlip.evals import geneval
from qlip.evals.benchmark_files import picture_seed, pictures_of, tiled, want
from qlip.evals.geneval import TAGS, count_layout, read_prompts, read_results, write_geneval

PROMPTS = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "tv", "count": 2}],
        "exclude": [{"class": "tv", "count": 3}],
        "prompt": "a photo of two tvs\u2028",
    },
    {
        "tag": "position",
        "include": [{"class": "dog", "count": 1}, {"class": "tie", "count": 1, "position": ["right of", 0]}],
        "prompt": "a photo of a tie right of a dog",
    },
    {
        "tag": "color_attr",
        "include": [{"class": "cup", "count": 1, "color": "red"}, {"class": "cat", "count": 1, "color": "blue"}],
        "prompt": "eine Tasse, 赤, und eine Katze",
    },
]


class Painter:
    """A flat picture whose colour is its seed and whose first pixel is its prompt's length; counts its calls."""

    def __init__(self, *, fail_after: int = 10**9) -> None:
        self.calls: list[list[int]] = []
        self.fail_after = fail_after

    def __call__(self, prompts: list[str], seeds: list[int]) -> torch.Tensor:
        if len(self.calls) == self.fail_after:
            raise UserError("stopped; start again")
        self.calls.append(seeds)
        return torch.stack([painted(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)])


def painted(prompt: str, seed: int) -> torch.Tensor:
    picture = torch.tensor([seed % 256, seed // 256 % 256, seed // 65536 % 256], dtype=torch.uint8)
    picture = picture[:, None, None].repeat(1, 6, 6)
    picture[:, 0, 0] = len(prompt)
    return picture


def pixels(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)


@pytest.fixture
def prompts_file(tmp_path) -> Path:
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in PROMPTS), encoding="utf-8")
    return path


def as_the_scorer_walks(root: Path) -> list[tuple[dict, Path]]:
    """Every picture with its metadata, found as evaluate_images.py of GenEval is documented to find them."""
    found = []
    for name in sorted(entry.name for entry in root.iterdir()):
        folder = root / name
        if folder.is_dir() and name.isdigit():
            metadata = json.loads((folder / "metadata.jsonl").read_text(encoding="utf-8"))
            for picture in sorted(entry.name for entry in (folder / "samples").iterdir()):
                if re.match(r"\d+\.png", picture):
                    found.append((metadata, folder / "samples" / picture))
    return found


def test_prompts_keep_their_order_and_their_lines(prompts_file):
    prompts = read_prompts(prompts_file)
    assert [prompt.content for prompt in prompts] == PROMPTS
    assert [prompt.line for prompt in prompts] == prompts_file.read_text(encoding="utf-8").split("\n")[:-1]
    prompts_file.write_bytes(b"\xef\xbb\xbf" + prompts_file.read_bytes().replace(b"\n", b"\r\n"))
    assert read_prompts(prompts_file) == prompts


GOOD = PROMPTS[2]
BAD_PROMPTS = {
    "no json": ('{"tag": ', "not json"),
    "too deep": ("[" * 100_000, "not json"),
    "long number": ('{"tag": ' + "9" * 5000 + "}", "not json"),
    "empty line": ("", "empty"),
    "no object": ("[1]", "no json object"),
    "no tag": ({**GOOD, "tag": ...}, "no field tag"),
    "tag of another kind": ({**GOOD, "tag": 3}, "tag is 3, no text"),
    "unknown tag": ({**GOOD, "tag": "colour"}, "tag 'colour' is none of GenEval's: did you mean 'colors'"),
    "no prompt": ({**GOOD, "prompt": ...}, "no field prompt"),
    "blank prompt": ({**GOOD, "prompt": " \t"}, "prompt is empty"),
    "no include": ({**GOOD, "include": ...}, "no field include"),
    "include is an object": ({**GOOD, "include": {}}, "include is {}, no list"),
    "include is empty": ({**GOOD, "include": []}, "include is empty"),
    "clause is a text": ({**GOOD, "include": ["dog"]}, r"include\[0\] is no object"),
    "no class": ({**GOOD, "include": [{"count": 1}]}, r"no field include\[0\].class"),
    "no count": ({**GOOD, "include": [{"class": "dog"}]}, r"no field include\[0\].count"),
    "count is zero": ({**GOOD, "include": [{"class": "dog", "count": 0}]}, r"include\[0\].count is 0, give at least 1"),
    "count is true": ({**GOOD, "include": [{"class": "dog", "count": True}]}, "count is true, no whole number"),
    "count is half": ({**GOOD, "include": [{"class": "dog", "count": 0.5}]}, "count is 0.5, no whole number"),
    "colour": ({**GOOD, "include": [{"class": "d", "count": 1, "colour": "red"}]}, "colour is unknown.*'color'"),
    "colour is a number": ({**GOOD, "include": [{"class": "d", "count": 1, "color": 3}]}, "color is 3, no text"),
    "excluded position": ({**GOOD, "exclude": [{"class": "d", "count": 1, "position": []}]}, "position is unknown"),
    "exclude without count": ({**GOOD, "exclude": [{"class": "d"}]}, r"no field exclude\[0\].count"),
    "first one's position": (
        {**GOOD, "include": [{"class": "d", "count": 1, "position": ["above", 0]}]},
        r"include\[0\].position\[1\] is 0, give the place of an earlier include",
    ),
}
BAD_POSITIONS = {
    "of itself": (["above", 1], r"include\[1\].position\[1\] is 1"),
    "from the end": (["above", -1], r"position\[1\] is -1"),
    "true": (["above", False], r"position\[1\] is false"),
    "unknown": (["over", 0], "position is no pair of one of left of"),
    "alone": (["above"], "position is no pair"),
    "a text": ("above", 'position is "above", no list'),
}
for name, (position, words) in BAD_POSITIONS.items():
    include = [GOOD["include"][0], {"class": "tie", "count": 1, "position": position}]
    BAD_PROMPTS[f"position {name}"] = ({**GOOD, "include": include}, words)


def as_line(line) -> str:
    return line if isinstance(line, str) else json.dumps({k: v for k, v in line.items() if v is not ...})


@pytest.mark.parametrize(("line", "said"), BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_malformed_prompts_are_named_by_line_and_field(tmp_path, line, said):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{as_line(line)}\n{json.dumps(GOOD)}\n")
    with pytest.raises(UserError, match=f"prompts.jsonl line 2: .*{said}.*; fetch") as caught:
        read_prompts(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_missing_empty_and_binary_files(tmp_path):
    for content, said in ((b"", "is empty"), (b" \n\n", "is empty"), (b'{}\n"\xff"\n', "line 2: not UTF-8")):
        (tmp_path / "p").write_bytes(content)
        with pytest.raises(UserError, match=said):
            read_prompts(tmp_path / "p")
    for path in (tmp_path, tmp_path / "gone"):
        with pytest.raises(UserError, match=r"cannot read.*; fetch evaluation_metadata"):
            read_prompts(path)


def test_the_scorer_sees_every_picture_with_its_line(prompts_file, tmp_path):
    painter = Painter()
    found = write_geneval(painter, prompts_file, tmp_path / "out", num_samples=3, seed=5, batch_size=4)
    assert [len(call) for call in painter.calls] == [4, 4, 4]
    seen = as_the_scorer_walks(tmp_path / "out")
    assert found.num_pictures == len(seen) == 12 and not found.stops
    for number, (metadata, picture) in enumerate(seen):
        prompt, sample = divmod(number, 3)
        assert metadata == PROMPTS[prompt] and picture.name == f"{sample:04d}.png"
        seed = picture_seed(5, prompt_index=prompt, sample_index=sample)
        assert torch.equal(pixels(picture), painted(metadata["prompt"], seed))
    line = (tmp_path / "out/00003/metadata.jsonl").read_bytes()
    assert line == prompts_file.read_bytes().split(b"\n")[3] + b"\n"
    assert found.left_out == ["generation.json: no folder"]
    assert json.loads((tmp_path / "out/generation.json").read_text())["seed"] == 5
    assert pixels(tmp_path / "out/00000/grid.png").shape == (3, 12, 12)  # 3 of 4 places, the last one white
    assert (pixels(tmp_path / "out/00000/grid.png")[:, 6:, 6:] == 255).all()


def test_a_stopped_run_goes_on_and_a_finished_one_does_nothing(prompts_file, tmp_path):
    whole = tmp_path / "whole"
    write_geneval(Painter(), prompts_file, whole)
    with pytest.raises(UserError, match="stopped"):
        write_geneval(Painter(fail_after=2), prompts_file, tmp_path / "out", batch_size=5)  # 2 prompts are finished
    again = Painter()
    write_geneval(again, prompts_file, tmp_path / "out", batch_size=5)
    assert sum(map(len, again.calls)) == 8
    for (_, a), (_, b) in zip(as_the_scorer_walks(whole), as_the_scorer_walks(tmp_path / "out"), strict=True):
        assert a.read_bytes() == b.read_bytes()
    half = tmp_path / "out/00002/samples/0001.png"
    half.write_bytes(half.read_bytes()[:-5])  # as a crash of the machine leaves it
    (tmp_path / "out/00001/samples/.0000.part").write_bytes(b"")  # and as a kill does
    mended = Painter()
    found = write_geneval(mended, prompts_file, tmp_path / "out")
    assert sum(map(len, mended.calls)) == 4 and Image.open(half).size == (6, 6)
    assert "00001/samples/.0000.part: no picture by its name" in found.left_out
    idle = Painter()
    write_geneval(idle, prompts_file, tmp_path / "out")
    assert not idle.calls


def test_ranks_share_the_prompts(prompts_file, tmp_path, monkeypatch):
    write_geneval(Painter(), prompts_file, tmp_path / "alone")
    prompts, calls = read_prompts(prompts_file), []
    for rank in range(3):
        monkeypatch.setattr(geneval.distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(geneval.distributed, "world_size", lambda: 3)
        painter = Painter()
        geneval._write_own(painter, prompts, tmp_path / "shared", num_samples=4, seed=0, batch_size=3)
        calls.append(sum(map(len, painter.calls)))
    assert calls == [8, 4, 4]
    pairs = zip(as_the_scorer_walks(tmp_path / "alone"), as_the_scorer_walks(tmp_path / "shared"), strict=True)
    assert all(a.read_bytes() == b.read_bytes() for (_, a), (_, b) in pairs)


def test_pictures_of_other_settings_are_not_mixed(prompts_file, tmp_path):
    out = tmp_path / "out"
    write_geneval(Painter(), prompts_file, out, settings={"guidance": 2.0})
    for change, said in (
        ({"seed": 1}, "seed 0 -> 1"),
        ({"num_samples": 5}, "num_samples 4 -> 5"),
        ({"settings": {"guidance": 3.0}}, "guidance 2.0 -> 3.0"),
        ({"settings": {"guidance": 2.0, "top_k": 5}}, "top_k None -> 5"),
    ):
        with pytest.raises(UserError, match=rf"pictures of other settings \({said}\); choose another --out"):
            write_geneval(Painter(), prompts_file, out, **{"settings": {"guidance": 2.0}, **change})
    (out / "generation.json").write_text("[")
    with pytest.raises(UserError, match="is broken"):
        write_geneval(Painter(), prompts_file, out)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("00004/metadata.jsonl", "00004 is of no prompt"),
        ("00001/samples/0004.png", "0004.png is not of this run"),
        ("00001/samples/0000.png.tmp", "0000.png.tmp is not of this run"),
    ],
)
def test_what_the_scorer_would_count_besides_is_refused(prompts_file, tmp_path, file, said):
    out = tmp_path / "out"
    write_geneval(Painter(), prompts_file, out)
    (out / file).parent.mkdir(exist_ok=True)
    (out / file).write_text("{}")
    painter = Painter()
    with pytest.raises(UserError, match=said):
        write_geneval(painter, prompts_file, out)
    assert not painter.calls


def test_impossible_requests_are_refused_before_any_picture(prompts_file, tmp_path):
    painter = Painter()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    (tmp_path / "file").write_text("")
    for out, options, said in (
        ("out", {"num_samples": 0}, "number of pictures is 0"),
        ("out", {"batch_size": 0}, "batch size is 0"),
        ("full", {}, "holds other files .'notes.txt'.*choose another --out"),
        ("file", {}, "cannot write to .*file"),
    ):
        with pytest.raises(UserError, match=said):
            write_geneval(painter, prompts_file, tmp_path / out, **options)
    assert not painter.calls and not (tmp_path / "out").exists()


def test_what_the_scorer_would_leave_out_or_stop_at_is_said(tmp_path):
    for name in ("00000/samples", "00001", "extra", "00002/samples"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "00000/metadata.jsonl").write_text(json.dumps(GOOD))
    (tmp_path / "00002/metadata.jsonl").write_text("{}\n{}\n")  # two objects
    for name in ("0000.png", "1.png", "0002.png.tmp", "a.png", "0003.jpg"):
        (tmp_path / "00000/samples" / name).write_bytes(b"")
    found = count_layout(tmp_path)
    assert found.pictures == {"00000": 3, "00002": 0}  # names are matched from their start
    assert found.left_out == [
        "00000/samples/0003.jpg: no picture by its name",
        "00000/samples/a.png: no picture by its name",
        "extra: name is not all digits",
    ]
    assert [stop.split(":")[0] for stop in found.stops] == ["00001/metadata.jsonl", "00001", "00002/metadata.jsonl"]
    with pytest.raises(UserError, match="is no folder"):
        count_layout(tmp_path / "gone")


def test_seeds_are_pure_far_apart_and_fit_every_generator():
    seeds = {picture_seed(s, prompt_index=p, sample_index=i) for s in range(3) for p in range(300) for i in range(4)}
    assert len(seeds) == 3600 and len({seed % 2**32 for seed in seeds}) == 3600
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert picture_seed(0, prompt_index=0, sample_index=0) == 3051931488724851722  # fixed: old folders go on


def test_batches_change_nothing():
    wanted = want(["a", "bb", "ccc"], seed=1, num_samples=2)
    by_size = [
        [(entry.index, pictures) for entry, pictures in pictures_of(Painter(), wanted, batch_size=size)]
        for size in (1, 4, 100)
    ]
    for found in by_size[1:]:
        assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in zip(by_size[0], found, strict=True))
    assert torch.equal(tiled(torch.arange(4).view(4, 1, 1, 1), columns=2)[0], torch.tensor([[0, 1], [2, 3]]))


def result(tag: str, number: int, sample: int, right: bool, **changes) -> dict:
    return {
        "filename": f"out/{number:05d}/samples/{sample:04d}.png",
        "tag": tag,
        "prompt": f"prompt {number}",
        "correct": right,
        "reason": "" if right else "expected dog>=1, found 0",
        "metadata": json.dumps({"tag": tag, "prompt": f"prompt {number}"}),
        "details": "{}",
    } | changes


def write_results(path: Path, lines: list) -> Path:
    path.write_text("".join(as_line(line) + "\n" for line in lines))
    return path


def test_scores_are_means_over_tags_of_picture_accuracies(tmp_path):
    rng = np.random.default_rng(0)
    lines, truth = [], {}
    for prompt in range(23):  # so many that categories differ in size
        tag = TAGS[prompt % 6]
        for sample in range(4):
            correct = bool(rng.random() < 0.6)
            lines.append(result(tag, prompt, sample, correct))
            truth[prompt, sample] = correct
    found = read_results(write_results(tmp_path / "results.jsonl", lines))
    expected = {
        tag: np.mean([right for (prompt, _), right in truth.items() if TAGS[prompt % 6] == tag]) for tag in TAGS
    }
    assert found.tags == pytest.approx(expected) and found.overall == pytest.approx(np.mean(list(expected.values())))
    assert found.overall != pytest.approx(np.mean(list(truth.values())))  # not the mean over pictures
    rows = [[truth[prompt, sample] for sample in range(4)] for prompt in range(23)]
    assert found.all_right == pytest.approx(np.mean([all(row) for row in rows]))
    assert found.any_right == pytest.approx(np.mean([any(row) for row in rows]))
    assert found.num_prompts == 23 and sum(found.pictures.values()) == 92 and not found.missing_tags


def test_missing_categories_are_said(tmp_path):
    found = read_results(write_results(tmp_path / "r", [result("colors", 0, 0, True), result("counting", 1, 0, False)]))
    assert found.overall == 0.5 and found.missing_tags == ("single_object", "two_object", "position", "color_attr")


BAD_RESULTS = {
    "no json": ("{", "not json"),
    "no object": ("3", "no json object"),
    "no filename": (result("colors", 1, 0, True, filename=...), "no field filename"),
    "twice": (result("colors", 0, 0, True), "filename 'out/00000/samples/0000.png' stands in line 1 too"),
    "unknown tag": (result("shape", 1, 0, True), "tag 'shape' is none"),
    "correct is a number": (result("colors", 1, 0, True, correct=1), "correct is 1, no true or false"),
    "correct is null": (result("colors", 1, 0, True, correct=None), "correct is null, no true or false"),
    "no prompt": (result("colors", 1, 0, True, prompt=...), "no field prompt"),
    "metadata is an object": (result("colors", 1, 0, True, metadata={}), "metadata is {}, no text"),
}


@pytest.mark.parametrize(("line", "said"), BAD_RESULTS.values(), ids=BAD_RESULTS)
def test_malformed_results_are_named_by_line_and_field(tmp_path, line, said):
    path = write_results(tmp_path / "results.jsonl", [result("colors", 0, 0, True), line])
    with pytest.raises(UserError, match=f"results.jsonl line 2: {said}.*; give the results.jsonl"):
        read_results(path)
