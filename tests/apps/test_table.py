"""`qlip table`: the paper's rows, ours beside them under their own names, three formats, Figure 1, hostile input."""

from __future__ import annotations

import csv
import io
import itertools
import json
import random
import re
import xml.etree.ElementTree as ET

import pytest
from PIL import Image

from qlip.apps.table import build_table, table_rows
from qlip.apps.table_formats import DASH
from qlip.apps.table_plot import spread
from qlip.apps.table_rows import ABLATIONS, MARKS, PROBES, TOKENIZERS
from qlip.core.errors import UserError
from qlip.evals.protocols import find_protocol

BILINEAR, ZERO_SHOT = "imagenet-recon-256-bilinear-v1", "imagenet-zeroshot-openai80-v1"
LINEAR = "imagenet-linear-table11-v1"
RECON = {"psnr": 23.456, "ssim": 0.62864, "rfid": 3.214, "compression_ratio": 24 / 28 * 256}
HOSTILE = "=a|b_c*`<i>$%&#{}~^\\[x]"


def result(protocol: str, figures: dict, *, model: str = "runs/mine/export", **card) -> dict:
    """One entry of a results file."""
    found = find_protocol(protocol)
    given = {
        "model": model,
        "model_fingerprint": model[::-1].ljust(64, "0"),
        "count": found.count or 2000,
        "complete": True,
        "data": "imagenet/val" if found.count else "data/test",
        "image_size": 256,
        "bits_per_token": 28.0,
        "parameters": {"encoder": 86_900_000, "decoder": 87_100_000, "quantizer": 1_210_000, "text": 5},
    }
    return {"eval": found.kind, "figures": figures, "details": {}, "card": given | found.card() | card}


@pytest.fixture
def write(tmp_path):
    """Writes results files and gives their paths."""
    numbers = itertools.count()

    def write(*results):
        path = tmp_path / f"{next(numbers)}.json"
        path.write_text(json.dumps(list(results)))
        return path

    return write


def ours(table) -> list[dict[str, str]]:
    """Our rows as dictionaries."""
    rows = [dict(zip(table.header, row, strict=True)) for row in table.rows]
    return [row for row in rows if row["source"].startswith("ours")]


def paper_row(table, name: str) -> dict[str, str]:
    """A row of the paper."""
    return next(dict(zip(table.header, row, strict=True)) for row in table.rows if row[0] == name)


def test_table_2_sets_ours_beside_the_papers_rows(write):
    """Two files of one model make one row; digits, units and names are the paper's."""
    zero_shot = write(result(ZERO_SHOT, {"top1": 0.7391, "top5": 0.9}))
    table = table_rows([zero_shot, write(result(BILINEAR, RECON))], shape="2")
    row = {"tokenizer": "mine", "data": DASH, "E + G + Q": "87M+87M+1.2M", "bits": "28", "ratio": "219.4"}
    row |= {"ZS": "73.9 [1]", "rFID": "3.21 [2]", "PSNR": "23.46 [2]", "SSIM": ".6286 [2]", "source": "ours"}
    assert ours(table) == [row]
    assert f"[1] {ZERO_SHOT}, n = 50000 of imagenet/val, 256 pixels" in table.footer
    assert f"[2] {BILINEAR}, n = 50000 of imagenet/val, 256 pixels" in table.footer
    given = {"data": "DC-1B", "E + G + Q": "87M+87M+1M", "bits": "28", "ratio": "219.4", "ZS": "74.3", "rFID": "3.21"}
    assert paper_row(table, "QLIP-B (16)").items() >= (given | {"PSNR": "23.16", "SSIM": ".6286"}).items()
    assert paper_row(table, "BSQ-ViT+")["ZS"] == DASH and paper_row(table, "MoVQGAN")["bits"] == "40&"
    assert paper_row(table, "SDXL-VAE")["bits"] == "64#" and paper_row(table, "DALL-E dVAE")["rFID"] == "32.63"
    assert {row[-1] for row in table.rows} == {"paper", "ours"}
    assert [line for line in table.footer if line[0] in MARKS] == [f"{mark} {said}" for mark, said in MARKS.items()]
    assert len(table_rows([zero_shot], shape="2", paper=False).rows) == 1


def test_paper_rows_are_whole():
    """Counts of PAPER's tables, ratios by the formula where it gives them, and every figure a number."""
    rows = [row for group in TOKENIZERS.values() for row in group]
    assert (len(rows), len(ABLATIONS), len(PROBES)) == (13 + 19, 14, 10)
    assert sum(bool(row.zero_shot) for row in rows) == 13 + 5 and sum(bool(row.rfid) for row in rows) == 19
    for row in rows:
        for text in row[3:9]:
            assert not text or float(text) > 0
        assert row.mark in ("", "+") and row.bits_mark in ("", "#", "&")
    for name, patch in (("QLIP-B (16)", 16), ("QLIP-B (8)", 8), ("QLIP-L (14, 392)", 14), ("BSQ-ViT (8)", 8)):
        row = next(row for row in rows if row.name == name)
        assert float(row.ratio) == pytest.approx(24 / int(row.bits) * patch**2, abs=0.1)


def test_what_is_not_the_full_set_says_n(write):
    """Incomplete results, scenes and others' pictures; and the distance in the own encoder has a column of its own."""
    scenes = {"psnr": 24.1, "fd_encoder": 0.4694, "compression_ratio": 54.86}
    small = result(BILINEAR, RECON, model="small", count=2048, complete=False)
    table = table_rows([write(result("scenes-reconstruction-v1", scenes, model="demo/stage2/export"), small)])
    first, second = ours(table)
    assert first["tokenizer"] == "stage2" and first["source"] == "ours (n = 2000)" and first["rFID"] == DASH
    assert (first["FD (encoder)"], first["ratio"], first["ZS"]) == ("0.4694 [1]", "54.9", DASH)
    assert second["source"] == "ours (n = 2048)" and second["FD (encoder)"] == DASH
    text = "\n".join(table.footer)
    assert "[1] scenes-reconstruction-v1, n = 2000 of data/test" in text and "not the full set" in text
    assert "no rFID" in text


def test_encoder_distance_stays_out_where_there_is_an_rfid(write):
    path = write(result(BILINEAR, RECON | {"fd_encoder": 0.5}))
    for shape in ("2", "3"):
        table = table_rows([path], shape=shape)
        assert "FD (encoder)" not in (*table.header, *(row[0] for row in table.rows))
    with pytest.raises(UserError, match="no result has a figure of Table 2"):
        table_rows([write(result(BILINEAR, {"rfid": None, "lpips_alex": 0.1, "compression_ratio": 9.0}))])


def test_a_column_measured_in_two_ways_is_refused(write):
    """Naming both; one of them can be chosen; the same figure twice is no conflict."""
    other = BILINEAR.replace("bilinear", "bicubic")
    both = write(result(BILINEAR, RECON), result(other, RECON | {"rfid": 4.0}))
    with pytest.raises(UserError) as error:
        table_rows([both])
    message = str(error.value)
    assert f"column rFID was measured by {BILINEAR} on imagenet/val (n = 50000) in {both} and by {other}" in message
    assert message.endswith(f"choose with --protocols {BILINEAR}")
    assert ours(table_rows([both], protocols=(other,)))[0]["rFID"] == "4.00 [1]"
    with pytest.raises(UserError, match="no result is of protocol nothing-v1"):
        table_rows([both], protocols=("nothing-v1",))
    one = write(result(BILINEAR, RECON))
    assert len(ours(table_rows([one, one, write(result(BILINEAR, RECON, device="cuda"))]))) == 1
    for again in (result(BILINEAR, RECON | {"psnr": 23.47}), result(BILINEAR, RECON, count=10)):
        with pytest.raises(UserError, match="give the file of one of them"):
            table_rows([one, write(again)])


def test_models_of_one_name_are_told_apart(write):
    """By the folder above, or by their fingerprints; other weights in one folder are other models."""
    results = [result(ZERO_SHOT, {"top1": 0.5}, model=f"runs/{demo}/stage2/export") for demo in ("a", "b")]
    assert [row["tokenizer"] for row in ours(table_rows([write(*results)]))] == ["a/stage2", "b/stage2"]
    results = [result(ZERO_SHOT, {"top1": 0.5}, model="x/y", model_fingerprint=c * 64) for c in "cd"]
    assert [row["tokenizer"] for row in ours(table_rows([write(*results)]))] == ["x/y (cccccccc)", "x/y (dddddddd)"]
    results = [result(ZERO_SHOT, {"top1": 0.5}, model=model) for model in ("", "/", "export")]
    assert all(row["tokenizer"] for row in ours(table_rows([write(results[0]), write(results[1]), write(results[2])])))


def test_table_3_has_variants_as_columns(write, capsys):
    path = write(result(ZERO_SHOT, {"top1": 0.5}), result(BILINEAR, RECON))
    build_table([path], shape="3")
    text = capsys.readouterr().out
    assert text.count("| ZS |") == 3 and text.count("| mine |") == 3
    assert "| rFID | 367.8 | 162.6 | 41.7 | 35.3 | 35.6 | 35.7 | 3.21 [2] |" in text
    assert "| ZS | 26.4 | 74.3 | 74.7 | 50.0 [1] |" in text
    assert "| PSNR | 24.49 | 23.16 | 23.33 | 26.72 | 23.34 | 23.46 [2] |" in text
    table = table_rows([path], shape="3")
    assert len(table.header) == 1 + 14 + 1 and [row[0] for row in table.rows] == ["ZS", "rFID", "PSNR", "source"]
    assert table_rows([path], shape="3", paper=False).header == ["", "mine"]


def test_table_10_has_a_row_per_position(write):
    figures = {"linear_cls": 0.818, "linear_cls+mean": 0.821, "linear_mean": None, "knn_mean": 0.7}
    knn = result("imagenet-knn20-v1", {"knn_cls": 0.7, "linear_mean": 0.9}, model="other")
    table = table_rows([write(result(LINEAR, figures), knn)], shape="10")
    assert [row[:3] for row in table.rows if row[3] == "ours"] == [
        ["mine", "cls", "81.8 [1]"],
        ["mine", "cls+mean", "82.1 [1]"],
    ]
    assert ["BSQ-ViT+", "mean", "25.4", "paper"] in table.rows and ["VQ-VAE", DASH, "18.4", "paper"] in table.rows
    assert "Without a figure of this table: other." in table.footer
    with pytest.raises(UserError, match="imagenet-linear-table11-v1"):
        table_rows([write(knn)], shape="10")


def test_markdown_is_one_rectangle_whatever_the_name(write, capsys):
    build_table([write(result(ZERO_SHOT, {"top1": 0.5}, model=f"{HOSTILE}\n\x1b[2J"))])
    text = capsys.readouterr().out
    rows = [re.split(r"(?<!\\)\|", line) for line in text.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1 and "\x1b" not in text
    assert r"=a\|b_c\*\`\<i>$%&#{}~^\\[x]" in rows[-1][1]


def test_latex_escapes_and_balances(write, capsys):
    build_table([write(result(ZERO_SHOT, {"top1": 0.5}, model=HOSTILE))], format="latex")
    text = capsys.readouterr().out
    escaped = (
        r"=a\textbar{}b\_c*`\textless{}i\textgreater{}\$\%\&\#\{\}\textasciitilde{}\textasciicircum{}"
        r"\textbackslash{}{[}x{]}"
    )
    assert escaped in text
    body = re.search(r"\\begin\{tabular\}\{(\w+)\}(.*)\\end\{tabular\}", text, re.DOTALL)
    assert body is not None
    rows = [line for line in body[2].splitlines() if line.endswith(r"\\")]
    assert {len(re.split(r"(?<!\\)&", row)) for row in rows} == {len(body[1])} == {10}
    plain = re.sub(r"\\[{}]", "", text)
    assert plain.count("{") == plain.count("}") and text.count(r"\midrule") == 1 + 4
    assert r"40\textsuperscript{\&}" in text and " -- " in text and r"50.0\textsuperscript{1}" in text


def test_csv_reads_back(write, tmp_path, capsys):
    """Numbers are bare, what is missing is empty, remarks say how; nothing begins as a formula."""
    model = '=cmd|x "quoted", too'
    path = write(result(ZERO_SHOT, {"top1": 0.5}, model=model), result(BILINEAR, RECON, model=model))
    build_table([path], format="csv", out=tmp_path / "new" / "t.csv")
    assert not capsys.readouterr().out
    rows = list(csv.DictReader(io.StringIO((tmp_path / "new" / "t.csv").read_text())))
    last, qlip = rows[-1], next(row for row in rows if row["tokenizer"] == "QLIP-L (14, 392)")
    assert last["tokenizer"] == f"'{model}" and (last["ZS"], last["rFID"], last["data"]) == ("50.0", "3.21", "")
    assert f"ZS: {ZERO_SHOT}, n = 50000" in last["remarks"]
    assert (qlip["ratio"], qlip["remarks"]) == ("168", "") and None not in last
    assert [row["bits"] for row in rows if "residual" in row["remarks"]] == ["40", "112", "56", "224"]
    build_table([path], shape="3", format="csv")
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert len({len(row) for row in rows}) == 1 and [row[0] for row in rows[1:]] == ["ZS", "rFID", "PSNR", "source"]


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"encoder": 87_000_000}, "87M"),
        ({"encoder": 28_400, "decoder": 999, "quantizer": 0}, "28k+999+0"),
        ({"encoder": 1_000_000, "quantizer": 5}, f"1M+{DASH}+5"),
        ({"encoder": "x", "decoder": -1}, DASH),
        (["encoder"], DASH),
        (None, DASH),
    ],
)
def test_parameters_are_short(write, parameters, said):
    path = write(result(ZERO_SHOT, {"top1": 0.5}, parameters=parameters, bits_per_token="many"))
    assert ours(table_rows([path]))[0] | {"E + G + Q": said, "bits": DASH} == ours(table_rows([path]))[0]


def test_continuous_latents_say_so(write):
    table = table_rows([write(result(BILINEAR, RECON, bits_per_token=64.0, latent_bits=16))])
    assert ours(table)[0]["bits"] == "64 [1]" and "[1] a continuous latent, 16 bits a number" in table.footer


def test_figure_1_draws_ours_among_the_papers(write, tmp_path, capsys):
    """Every name is text of the picture; equal calls give equal bytes; PNG by its suffix."""
    path = write(
        result(ZERO_SHOT, {"top1": 0.7}, model="$ours & <mine"), result(BILINEAR, RECON, model="$ours & <mine")
    )
    for name in ("a.svg", "b.svg", "c.png"):
        build_table([path], plot=tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    texts = ["".join(e.itertext()).strip() for e in ET.parse(tmp_path / "a.svg").iter() if e.tag.endswith("}text")]
    names = [row.name for group in TOKENIZERS.values() for row in group]
    assert set(names) <= set(texts) and "$ours & <mine" in texts
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.size[0] > 1000
    assert capsys.readouterr().out.count("Table 2") == 3


def test_figure_1_needs_both_figures_of_imagenet(write, tmp_path):
    scenes = [result("scenes-zeroshot-v1", {"top1": 0.7}), result(BILINEAR, RECON)]
    for results in (scenes, [result(ZERO_SHOT, {"top1": 0.7})], [result("images-recon-bicubic-v1", RECON)]):
        with pytest.raises(UserError, match=f"{ZERO_SHOT} {BILINEAR}"):
            build_table([write(*results)], plot=tmp_path / "a.svg")
    both = write(result(ZERO_SHOT, {"top1": 0.7}), result(BILINEAR, RECON))
    with pytest.raises(UserError, match=r"name a \.svg or \.png"):
        build_table([both], plot=tmp_path / "a.pdf")
    (tmp_path / "file").touch()
    for given in ({"plot": tmp_path / "file" / "a.svg"}, {"out": tmp_path / "file" / "a.md"}):
        with pytest.raises(UserError, match=r"cannot write .*choose another file"):
            build_table([both], **given)


def test_no_results_and_no_files_are_one_line(write, tmp_path):
    with pytest.raises(UserError, match=r"give at least one results\.json"):
        table_rows([])
    with pytest.raises(UserError, match="cannot read"):
        table_rows([tmp_path / "none.json"])


def test_spread_keeps_order_and_gap_and_moves_least():
    """Against a search over a grid."""
    rng = random.Random(0)
    grid = [i / 20 for i in range(21)]
    for _ in range(5):
        values = [rng.choice(grid) for _ in range(4)]
        places = spread(values, gap=0.1, low=0.0, high=1.0)
        cost = sum((p - v) ** 2 for p, v in zip(places, values, strict=True))
        order = sorted(range(4), key=lambda i: values[i])
        ranked = [places[i] for i in order]
        assert all(b - a >= 0.1 - 1e-9 for a, b in itertools.pairwise(ranked)) and ranked[0] >= -1e-9
        assert ranked[-1] <= 1 + 1e-9
        known = [values[i] for i in order]
        best = min(
            sum((p - v) ** 2 for p, v in zip(chosen, known, strict=True))
            for chosen in itertools.combinations(grid, 4)
            if all(b - a >= 0.1 - 1e-9 for a, b in itertools.pairwise(chosen))
        )
        assert cost <= best + 1e-9
