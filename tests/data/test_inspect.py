"""`qlip data inspect`: counts what training would use and skip, and prints foreign text safely."""

import pytest
from shard_files import encoded, pair, picture, write_shards, write_tar

from qlip.core.errors import UserError
from qlip.data.inspect import Spread, format_report, inspect_shards
from qlip.data.sample_parts import ShardConfig

CONFIG = ShardConfig(shards="")


def test_report_of_good_shards(tmp_path):
    keys = write_shards(tmp_path, num_shards=2, per_shard=3)
    report = inspect_shards(str(tmp_path), limit=None, config=CONFIG)
    assert (report.num_shards, report.num_shards_read, report.num_good, report.skipped) == (2, 2, 6, {})
    assert report.width == Spread(min=12, median=12, max=12) and report.height == Spread(min=10, median=10, max=10)
    assert report.caption_words == Spread(min=3, median=3, max=3)
    assert report.formats == {"JPEG": 6}
    assert report.duplicate_caption_share == 0 and report.num_duplicate_keys == 0
    assert report.examples[0] == (keys[0], f"caption of {keys[0]}")
    assert "12 / 12 / 12" in format_report(report)


def test_report_of_mixed_shards(tmp_path):
    large = [("large.png", encoded(picture(40, 30))), ("large.txt", b"caption of a")]
    named_wrong = [("w.jpg", encoded(picture(), "WEBP")), ("w.txt", b"one")]
    write_tar(tmp_path / "0.tar", [*pair("a"), *large, *named_wrong, ("bad.txt", b"x")])
    write_tar(tmp_path / "1.tar", [*pair("a"), ("evil.jpg", b"<html>"), ("evil.txt", b"\x1b[31mred")])
    (tmp_path / "2.tar").write_bytes(b"")
    report = inspect_shards(str(tmp_path), limit=None, config=CONFIG)
    assert report.num_good == 4
    assert report.skipped == {"missing image": 1, "not an image": 1, "not a tar": 1}
    assert report.largest == "large (40 x 30)" and report.width == Spread(min=12, median=12, max=40)
    assert report.formats == {"JPEG": 2, "PNG": 1, "WEBP": 1}
    assert report.num_duplicate_keys == 1 and report.duplicate_caption_share == 0.5
    text = format_report(report)
    assert "3 (42.9%)" in text and "bad  'missing image'" in text and "(shard)  'not a tar: zero bytes'" in text


def test_foreign_text_cannot_command_the_terminal(tmp_path):
    path = write_tar(tmp_path / "0.tar", [*pair("a", caption="\x1b[2J cleared\nnew line " + "x" * 500)])
    text = format_report(inspect_shards(str(path), limit=None, config=CONFIG))
    assert "\x1b" not in text and "x" * 101 not in text


def test_limit_and_nothing_found(tmp_path):
    write_shards(tmp_path, num_shards=3, per_shard=4)
    report = inspect_shards(str(tmp_path), limit=5, config=CONFIG)
    assert report.num_good == 5 and report.num_shards == 3 and report.num_shards_read == 2
    empty = inspect_shards(str(write_tar(tmp_path / "empty.tar", [])), limit=None, config=CONFIG)
    assert empty.num_good == 0 and "empty shard" in format_report(empty)
    with pytest.raises(UserError, match="is not there"):
        inspect_shards(str(tmp_path / "absent.tar"), limit=None, config=CONFIG)
