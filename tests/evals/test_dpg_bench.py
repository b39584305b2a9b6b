"""DPG-Bench's files as its scorer reads them: prompts in, squares of four out, results in; hostile files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_geneval import Painter, painted

from qlip.core.errors import UserError
from qlip.evals.benchmark_files import picture_seed
from qlip.evals.dpg_bench import QUIRKS, read_prompts, read_results, record_of, write_dpg

PROMPTS = {"COCOval2014000000000001": "A red truck on a beach.", "12": "Zwölf Boxkämpfer", "posescript,3": "赤い猫"}


@pytest.fixture
def prompts(tmp_path) -> Path:
    folder = tmp_path / "prompts"
    folder.mkdir()
    for item, prompt in PROMPTS.items():
        (folder / f"{item}.txt").write_text(f"{prompt}\n", encoding="utf-8")
    return folder


def tile_of(picture: Image.Image, number: int, side: int) -> torch.Tensor:
    """As the scorer is documented to cut: top left, top right, bottom left, bottom right."""
    left, top = ((0, 0), (side, 0), (0, side), (side, side))[number]
    return torch.from_numpy(np.array(picture.crop((left, top, left + side, top + side)))).permute(2, 0, 1)


def test_prompts_are_sorted_by_item_and_other_files_are_named(prompts, capsys):
    (prompts / "README.md").write_text("")
    assert read_prompts(prompts) == dict(sorted(PROMPTS.items()))
    assert "1 other files left out, first README.md" in capsys.readouterr().out


def test_a_png_per_prompt_with_four_tiles_and_nothing_else(prompts, tmp_path):
    out = tmp_path / "out"
    painter = Painter()
    written = write_dpg(painter, prompts, out, seed=3, batch_size=5, settings={"guidance": 2.0})
    assert [len(call) for call in painter.calls] == [5, 5, 2]
    assert (written.num_prompts, written.resolution, written.num_tiles) == (3, 6, 4)
    assert {file.name for file in out.iterdir()} == {f"{item}.png" for item in PROMPTS}
    for place, (item, prompt) in enumerate(sorted(PROMPTS.items())):
        with Image.open(out / f"{item}.png") as picture:
            assert picture.size == (12, 12)
            for number in range(4):
                seed = picture_seed(3, prompt_index=place, sample_index=number)
                assert torch.equal(tile_of(picture, number, 6), painted(prompt, seed))
    record = json.loads((tmp_path / "out.generation.json").read_text(encoding="utf-8"))
    assert (record["seed"], record["guidance"], record["num_prompts"]) == (3, 2.0, 3)


def test_a_stopped_run_goes_on(prompts, tmp_path):
    write_dpg(Painter(), prompts, tmp_path / "whole")
    out = tmp_path / "out"
    with pytest.raises(UserError, match="stopped"):
        write_dpg(Painter(fail_after=2), prompts, out, batch_size=3)  # one prompt is finished
    (out / ".12.part").write_bytes(b"half")  # as a kill leaves it
    again = Painter()
    write_dpg(again, prompts, out, batch_size=3)
    assert sum(map(len, again.calls)) == 8
    for item in PROMPTS:
        assert (out / f"{item}.png").read_bytes() == (tmp_path / "whole" / f"{item}.png").read_bytes()
    assert len(list(out.iterdir())) == 3
    with pytest.raises(UserError, match=r"other settings \(seed 0 -> 1\); choose another --out"):
        write_dpg(Painter(), prompts, out, seed=1)


@pytest.mark.parametrize("name", ["dpg-bench_20250101_results.txt", "13.png", "12.jpg", ".DS_Store"])
def test_what_the_scorer_would_meet_besides_is_refused(prompts, tmp_path, name):
    painter = Painter()
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh" / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"fresh holds other files .'{name}'.*choose another --out"):
        write_dpg(painter, prompts, tmp_path / "fresh")
    assert not painter.calls
    write_dpg(Painter(), prompts, tmp_path / "out")
    (tmp_path / "out" / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"{name} is no picture of this run.*move it away"):
        write_dpg(painter, prompts, tmp_path / "out")
    assert not painter.calls


def test_pictures_of_two_sizes_are_refused(prompts, tmp_path):
    write_dpg(Painter(), prompts, tmp_path / "out")
    Image.new("RGB", (10, 10)).save(tmp_path / "out/12.png")
    with pytest.raises(UserError, match=r"several sizes .*12[.]png 10 x 10"):
        write_dpg(Painter(), prompts, tmp_path / "out")


def test_malformed_prompts_are_named(prompts, tmp_path):
    (tmp_path / "none").mkdir()
    for folder, said in (("gone", "is no folder"), ("none", "holds no .txt files")):
        with pytest.raises(UserError, match=rf"{said}; give DPG-Bench's folder of prompts"):
            read_prompts(tmp_path / folder)
    for name, content, said in (
        ("a.b.txt", b"x", r"a\.b\.txt: DPG-Bench takes 'a' for its item; rename"),
        ("blank.txt", b" \n", r"blank\.txt is empty"),
        ("latin.txt", b"\xe9t\xe9", r"latin\.txt is not UTF-8"),
    ):
        (prompts / name).write_bytes(content)
        with pytest.raises(UserError, match=said):
            write_dpg(Painter(), prompts, tmp_path / "out")
        (prompts / name).unlink()
    (prompts / "folder.txt").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*folder\.txt"):
        read_prompts(prompts)
    with pytest.raises(UserError, match="batch size is 0"):
        write_dpg(Painter(), prompts, tmp_path / "out", batch_size=0)
    assert not (tmp_path / "out").exists()


def test_the_record_lies_beside_the_folder_however_it_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert record_of(Path()) == tmp_path.with_name(f"{tmp_path.name}.generation.json")
    assert record_of(Path("a/")) == record_of(tmp_path / "a") == tmp_path / "a.generation.json"


SCORES = [(1.0, 0.5, 0.25, 1.0), (0.0, 1 / 3, 1.0, 0.7), (1.0, 1.0, 1.0, 0.0)]


def results_text(scores=SCORES, *, score: float | None = None, categories: str = "") -> str:
    """What the scorer is documented to write."""
    lines = [
        f"/runs/a, b/{number}.png, {', '.join(map(str, tiles))}, {sum(tiles) / len(tiles)}"
        for number, tiles in enumerate(scores)
    ]
    mean = np.mean([np.mean(tiles) for tiles in scores]) if score is None else score
    categories = categories or (
        "L1 category scores:\n\tglobal: 80.5\n\tentity: 100.0\n\trelation: nan\n"
        "L2 category scores:\n\tentity - whole: 97.25\n\tglobal: 80.5\n"
    )
    end = f"Image path: /runs/a, b\nSave results to: /runs/a, b/r.txt\nDPG-Bench score: {mean * 100}\n"
    return "\n".join(lines) + f"\nModel: b\n{categories}{end}"


def test_scores_are_those_of_the_lines(tmp_path):
    (tmp_path / "r.txt").write_text(results_text())
    found = read_results(tmp_path / "r.txt")
    assert found.overall == pytest.approx(np.mean(SCORES)) and found.num_pictures == 3
    assert found.tiles == pytest.approx(np.mean(SCORES, axis=0))
    assert found.categories.pop("relation") != found.categories  # NaN: no question
    assert found.categories == {"global": 0.805, "entity": 1.0}
    assert found.detailed == {"entity - whole": 0.9725, "global": 0.805}
    (tmp_path / "r.txt").write_text(results_text([(0.5,), (0.25,)]))
    assert read_results(tmp_path / "r.txt").overall == 0.375
    assert len(QUIRKS) == 5


GOOD = results_text()
BAD_RESULTS = {
    "stopped": (GOOD.split("Model: ")[0], "line 3: the file ends without `DPG-Bench score`: the scorer was stopped"),
    "stopped in its summary": (GOOD.split("DPG-")[0], "line 13: the file ends without"),
    "no pictures": ("Model: b\nDPG-Bench score: nan\n", "line 1: no scores of pictures"),
    "another mean": (results_text(score=0.5), "line 14: DPG-Bench score is 50.0000, but the pictures give 64.8611"),
    "no number": (GOOD.replace("0.7, ", "yes, "), "line 2: 1 scores after the path"),
    "above one": (GOOD.replace("1.0, 0.5", "1.5, 0.5"), "line 1: score 1 is '1.5', no number from 0 to 1"),
    "nan": (GOOD.replace("1.0, 0.5", "nan, 0.5"), "line 1: score 1 is 'nan', no number from 0 to 1"),
    "other mean of tiles": (GOOD.replace("1.0, 0.5", "0.9, 0.5"), "line 1: the mean is 0.6875, but the tiles give"),
    "picture twice": (GOOD.replace("b/1.png", "b/0.png"), "line 2: '/runs/a, b/0.png' stands in line 1 too"),
    "tiles differ": (GOOD.replace("1.0, 1.0, 1.0, 0.0, 0.75", "0.75, 0.75"), "line 3: 1 tiles, 4 in the lines before"),
    "no path": (GOOD.replace("/runs/a, b/1.png, ", ""), "line 2: no path of a picture"),
    "five tiles": (GOOD.replace("1.0, 0.5", "1.0, 1.0, 0.5"), "line 1: 6 scores after the path"),
    "torn line": ("/runs/a\n" + GOOD, "line 1: 0 scores after the path"),
    "category of words": (GOOD.replace("80.5", "high", 1), "line 6: global is 'high', no number from 0 to 100"),
    "category above 100": (GOOD.replace("80.5", "180", 1), "line 6: global is '180', no number from 0 to 100"),
    "category twice": (GOOD.replace("entity: ", "global: "), "line 7: category 'global' stands there twice"),
    "category without table": (GOOD.replace("L1 cat", "X1 cat"), "line 5: 'X1 category scores:' is none"),
    "category without name": (GOOD.replace("\tglobal: 80.5", "\t80.5", 1), "line 6: no `category: score`"),
    "score of words": (GOOD.replace("score: 6", "score: x6"), "line 14: DPG-Bench score is 'x6"),
    "strange line": (GOOD.replace("Image path", "Failed"), "line 12: 'Failed: /runs/a, b' is none of the scorer's"),
    "empty": ("", "is empty"),
}


@pytest.mark.parametrize(("text", "said"), BAD_RESULTS.values(), ids=BAD_RESULTS)
def test_malformed_results_are_named_by_line_and_field(tmp_path, text, said):
    (tmp_path / "r.txt").write_text(text)
    with pytest.raises(UserError) as caught:
        read_results(tmp_path / "r.txt")
    assert said in str(caught.value) and str(caught.value).endswith("compute_dpg_bench.py wrote at its end")
    assert "\n" not in str(caught.value)
