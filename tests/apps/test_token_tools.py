"""`qlip tokens verify` and `export`: what they say against counting by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qlip.apps.token_tools import export_store, merge_stores, verify_store
from qlip.core.errors import UserError
from qlip.data.token_files import TokenStoreInfo
from qlip.models import opening
from qlip.models.opening import open_measured
from small_token_stores import INFO, make_store
from tiny_tokenizer import save_tiny_tokenizer


def refused(*words: str):
    return pytest.raises(UserError, match=".*".join(words))


def test_verify_counts_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info = replace(INFO, class_names=("cat", "dog", "owl"), decoder={"name": "QLIPModel", "path": "runs/[x]/export"})
    make_store(tmp_path / "store", info=info, labels=True)
    skips = [("a", "cut short"), ("b", "cut short"), ("c", "too many pixels: 9 x 9")]
    lines = [json.dumps({"key": key, "reason": why, "shard": "", "count": 1}) for key, why in skips]
    (tmp_path / "store/00000.skipped.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "store/00001.attempts.jsonl").write_text("{}\n{}\n")
    (tmp_path / "store/00002.tmp").touch()
    facts = verify_store(tmp_path / "store", json=tmp_path / "facts.json")
    assert json.loads((tmp_path / "facts.json").read_text()) == facts
    assert (facts["pictures"], facts["rows"], facts["files"]) == (17, 17, 2)
    assert (facts["num_tokens"], facts["num_bits"], facts["packed_bytes_per_row"]) == (6, 28, 21)
    assert (facts["rows_with_caption"], facts["captions"]) == (16, 16 + 7)  # 7 odd places besides 1 have two
    assert (facts["rows_with_label"], facts["labels"], facts["class_names"]) == (17, 3, 3)
    size = sum(file.stat().st_size for file in (tmp_path / "store").glob("*.parquet"))
    assert facts["file_bytes_per_row"] == size / 17 and 21 <= facts["bits_bytes_per_row"] < facts["file_bytes_per_row"]
    assert facts["packed_bits_per_pixel"] == 21 * 8 / 48**2 and facts["bits_are"] == "packed"
    assert facts["skipped"] == {"cut short": 2, "too many pixels": 1} and facts["attempts"] == {"00001": 2}
    assert facts["unfinished"] == ["00002.tmp"]
    printed = capsys.readouterr().out
    for words in ("17 pictures in 2 files", "6 (2 x 3) of 28 bits", "runs/[x]/export", "aaaaaaaaaaaa", "94.1 %"):
        assert words in printed
    for words in ("of all rows, 3 classes of 3", "cut short (2)", "00001 2", "00002.tmp: a run was stopped"):
        assert words in printed


def test_verify_says_bits_a_pixel_of_compressed_and_pictures_of_views(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = replace(INFO, views=("centre", "mirrored"), embedding_width=4)
    make_store(tmp_path / "store", info=info, rows=(10, 6), compress=True)
    facts = verify_store(tmp_path / "store")
    assert (facts["pictures"], facts["rows"], facts["bits_are"]) == (8, 16, "compressed")
    assert facts["bits_per_pixel"] == pytest.approx(8 * facts["bits_bytes_per_row"] / 48**2)
    printed = capsys.readouterr().out
    assert "2 rows a picture: centre; mirrored" in printed and "4 numbers of 16 bits" in printed
    assert f"{facts['bits_per_pixel']:.4f}, packed {facts['packed_bits_per_pixel']:.4f}" in printed
    facts = verify_store(tmp_path / "store/00001.parquet")  # one file; neighbours are not its own
    assert facts["rows"] == 6


def test_verify_compares_with_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny_tokenizer(tmp_path / "model")
    measured = open_measured(model)
    monkeypatch.setattr(opening, "open_measured", lambda source: measured)  # once is slow enough
    fingerprint = measured.identity()["encoder_fingerprint"]
    make_store(tmp_path / "its", info=replace(INFO, encoder_fingerprint=fingerprint))
    make_store(tmp_path / "other")
    assert verify_store(tmp_path / "its", model=str(model))["model"] == str(model)
    with refused("other was made by encoder " + "a" * 64, fingerprint):
        verify_store(tmp_path / "other", model=str(model))


def test_verify_refuses_damage_and_writes_nothing(tmp_path: Path) -> None:
    make_store(tmp_path / "store", keys=["same"] * 17)
    with refused("00000.parquet row group 0: key same came before, in 00000.parquet"):
        verify_store(tmp_path / "store", json=tmp_path / "facts.json")
    assert not (tmp_path / "facts.json").exists()
    make_store(tmp_path / "store")
    (tmp_path / "store/00000.skipped.jsonl").write_text("[1]\n")
    with refused("00000.skipped.jsonl is no list of skipped pictures"):
        verify_store(tmp_path / "store")


def test_verify_ends_with_the_parts_that_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for parts, name in ((40, "store"), (2, "whole")):
        make_store(tmp_path / name, info=replace(INFO, source={"name": "pictures", "parts": parts}))
    assert verify_store(tmp_path / "whole")["missing_parts"] == 0
    capsys.readouterr()
    with refused("store: 2 of 40 parts are there: start the same qlip tokenize again"):
        verify_store(tmp_path / "store", json=tmp_path / "facts.json")
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert (facts["missing_parts"], facts["rows"]) == (38, 17)
    printed = capsys.readouterr().out
    assert "17 pictures in 2 files" in printed and "0 pictures" in printed.splitlines()[-1], "all facts come first"
    assert verify_store(tmp_path / "store/00001.parquet")["missing_parts"] == 0  # one file is taken as it is


@pytest.mark.parametrize("tool", ["merge", "export"])
def test_other_tools_warn_of_missing_parts_and_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tool: str
) -> None:
    make_store(tmp_path / "store", info=replace(INFO, source={"name": "pictures", "parts": 40}))
    if tool == "merge":
        merge_stores((tmp_path / "store",), out=tmp_path / "out")
    else:
        export_store(tmp_path / "store", tmp_path / "out", format="npy")
    warning, *_, said = capsys.readouterr().out.splitlines()
    assert warning.startswith("warning: ") and "store has 2 of 40 parts" in warning
    assert warning.endswith("start the same qlip tokenize again") and said.startswith("17 rows")


def test_verify_lists_what_differs_between_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def info(pillow: str, device: str) -> TokenStoreInfo:
        reader = {"library": "pillow", "version": pillow}
        versions = {"pillow": pillow, "torch": "2.12"} | ({"extra": "1"} if device == "cpu" else {})
        return replace(INFO, versions=versions, picture_decoder=reader, encoding={"device": device, "dtype": "float32"})

    make_store(tmp_path / "store", info=info("12.3.0", "cuda"), rows=(4, 4, 4))
    make_store(tmp_path / "other", info=info("13.0.0", "cpu"), rows=(4,), prefix="m")
    (tmp_path / "other/00000.parquet").rename(tmp_path / "store/00003.parquet")
    facts = verify_store(tmp_path / "store")
    assert facts["differing"] == {
        "versions": {"pillow": {"12.3.0": 3, "13.0.0": 1}, "extra": {"unknown": 3, "1": 1}},
        "picture_decoder": {"version": {"12.3.0": 3, "13.0.0": 1}},
        "encoding": {"device": {"cuda": 3, "cpu": 1}},
    }
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "versions pillow 12.3.0 in 3 files, 13.0.0 in 1; extra unknown in 3 files, 1 in 1" in printed
    assert "read by version 12.3.0 in 3 files, 13.0.0 in 1" in printed and "device cuda in 3 files, cpu in 1" in printed
    (tmp_path / "store/00003.parquet").unlink()
    assert verify_store(tmp_path / "store")["differing"] == {} and "versions" not in capsys.readouterr().out


def test_export_says_what_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_store(tmp_path / "store")
    assert export_store(tmp_path / "store", tmp_path / "out", format="llamagen") == tmp_path / "out"
    assert "16 rows as llamagen in" in (printed := capsys.readouterr().out) and "1 left out" in printed
    export_store(tmp_path / "store", tmp_path / "tars", format="webdataset")
    assert "17 rows as webdataset in" in (printed := capsys.readouterr().out) and "left out" not in printed
