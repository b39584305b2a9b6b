"""Two real processes measure what one measures: rows, reconstruction, zero-shot, retrieval, both probes.

One pair of processes for all, since starting them takes most of the time.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_collect import ranks_say
from test_linear_probe import all_evaluations
from test_protocol_rules import figures_of_all

from qlip.evals import collect as collecting
from ranks import on_ranks


def everything(folder: str) -> dict:
    return {
        "rows": ranks_say(folder + "/rows"),
        "figures": figures_of_all(folder + "/figures"),
        "probes": all_evaluations(folder + "/probes"),
    }


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> tuple[dict, list[dict]]:
    """What one process says, and what both of two say."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    usual = collecting.PART  # the functions cut smaller parts, in this process too
    try:
        alone = everything(str(folder / "one"))
    finally:
        collecting.PART = usual
    return alone, on_ranks(everything, str(folder / "two"), num_ranks=2, folder=folder / "returned")


def test_rows_are_the_same_and_every_picture_is_measured_once(said):
    alone, both = said
    for case, expected in enumerate(alone["rows"]):
        for rank in both:
            found = rank["rows"][case]
            assert found.get("error") == expected.get("error")
            if "error" not in expected:
                assert found["keys"] == expected["keys"]
                torch.testing.assert_close(found["mean"], expected["mean"], rtol=0, atol=0)
    assert [rank["rows"][0]["own"] for rank in both] == [10, 8]  # parts 0, 2, 4 and 1, 3
    assert [rank["rows"][1]["own"] for rank in both] == [3, 0]  # a rank may have nothing
    assert "1 of 6 pictures cannot be used" in both[1]["rows"][2]["error"]


def test_reconstruction_and_zero_shot_are_the_same(said):
    alone, both = said
    assert {"psnr", "psnr_baseline", "bit_entropy", "top1", "mean_class", "fd_encoder"} <= alone["figures"].keys()
    for rank in both:
        assert rank["figures"] == pytest.approx(alone["figures"], rel=1e-9)


def test_probes_and_retrieval_are_the_same_in_memory_and_on_disk(said):
    alone, both = said
    assert [rank["probes"] for rank in both] == [alone["probes"], alone["probes"]]
    assert alone["probes"][:3] == alone["probes"][3:]
