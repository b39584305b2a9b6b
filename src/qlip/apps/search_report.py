"""What `qlip search` shows and writes: tables, results.json, and sheet.png with the pictures that were found.

Keys and captions are text from outside: control characters become spaces, and none of it is read as markup.
"""

from __future__ import annotations

import json
import textwrap
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.table import Table
from rich.text import Text

from qlip.core.errors import UserError
from qlip.core.log import console
from qlip.data.token_search import Duplicates, Hit, num_pictures
from qlip.data.token_store import TokenStore
from qlip.models.image_tokenizer import ImageTokenizer

Way = Literal["embedding", "bits"]
"""What is compared."""
SHEET_PICTURES = 60  # decoded for the sheet; results.json has all
TILE_SIDE, TILE_GAP, LINE_HEIGHT = 192, 8, 18  # pixels
CAPTION_LENGTH = 120  # characters in the table; results.json has all
QUERY_LENGTH = 60  # characters


class Tile(NamedTuple):
    """A picture of the sheet and the lines under it."""

    picture: Image.Image
    lines: tuple[str, str]


def print_hits(tokens: TokenStore, hits: list[Hit], *, asked: str, by: Way) -> None:
    """A table of pictures, nearest first."""
    table = _table("rank", "key", "cosine" if by == "embedding" else "bits that differ", "captions")
    for rank, hit in enumerate(hits, start=1):
        table.add_row(str(rank), Text(one_line(hit.key)), _score(tokens, hit.score, by=by), _captions(hit))
    console.print(Text(f"nearest to {one_line(asked)} of {num_pictures(tokens)} pictures"))
    console.print(table)


def print_pairs(tokens: TokenStore, found: Duplicates) -> None:
    """How many pairs and groups there are, and a table of the closest pairs."""
    table = _table("rank", "keys", "bits that differ", "captions")
    for rank, (first, second) in enumerate(found.pairs, start=1):
        keys = Text(f"{one_line(first.key)}\n{one_line(second.key)}")
        texts = Text("\n").join([_captions(first), _captions(second)])
        table.add_row(str(rank), keys, _score(tokens, first.score, by="bits"), texts)
    most = _score(tokens, found.most_bits, by="bits")
    pairs = "1 pair differs" if found.num_pairs == 1 else f"{found.num_pairs} pairs differ"
    groups = "1 group" if len(found.groups) == 1 else f"{len(found.groups)} groups"
    console.print(
        f"{pairs} in at most {most}: {found.num_in_groups} of {found.num_pictures} pictures, in {groups}"
        + (f"; the closest {len(found.pairs)}:" if found.pairs else "")
    )
    if found.pairs:
        console.print(table)


def warn_of_cut_text(text: str, *, num_tokens: int, num_read: int) -> None:
    """Print a line if a text has more tokens than its model reads."""
    if num_tokens > num_read:
        console.print(
            Text(
                f"{shortened(text)!r}: the last {num_tokens - num_read} of its tokens are not read, "
                f"the model takes {num_read}"
            )
        )


def hits_record(tokens: TokenStore, hits: list[Hit], *, by: Way) -> dict[str, Any]:
    """Hits as JSON values."""
    return {
        "hits": [
            {"rank": rank, **_named(hit), **_score_record(tokens, hit.score, by=by)}
            for rank, hit in enumerate(hits, start=1)
        ]
    }


def pairs_record(tokens: TokenStore, found: Duplicates) -> dict[str, Any]:
    """Pairs, all groups, and their counts as JSON values."""
    return {
        "num_pictures": found.num_pictures,
        "num_pairs": found.num_pairs,
        "num_groups": len(found.groups),
        "num_in_groups": found.num_in_groups,
        "most_bits": found.most_bits,
        "pairs": [
            {
                "rank": rank,
                **_score_record(tokens, pair[0].score, by="bits"),
                "pictures": [_named(hit) for hit in pair],
            }
            for rank, pair in enumerate(found.pairs, start=1)
        ],
        "groups": found.groups,
    }


def hit_tiles(
    tokens: TokenStore, tokenizer: ImageTokenizer, hits: list[Hit], *, ranks: Sequence[int], by: Way
) -> list[Tile]:
    """Pictures as the tokenizer decodes their bits, at most `SHEET_PICTURES`, with rank, score and key."""
    tiles = []
    for rank, hit in zip(ranks, hits[:SHEET_PICTURES], strict=False):
        picture = tokenizer.decode(tokens.unpack(hit.packed[None]).to(tokenizer.device))[0]
        tiles.append(Tile(enlarged(picture), (f"#{rank}: {_score(tokens, hit.score, by=by)}", hit.key)))
    return tiles


def text_tile(text: str, *, size: int) -> Tile:
    """A text in place of a picture of side `size`."""
    side = size * _scale(size)
    picture, font = Image.new("RGB", (side, side), "white"), ImageFont.load_default(size=16)
    lines = textwrap.wrap(one_line(text), width=max(8, side // 10))[: side // 20]
    draw = ImageDraw.Draw(picture)
    draw.multiline_text((side / 2, side / 2), "\n".join(lines), "black", font, "mm", align="center")
    return Tile(picture, ("query", ""))


def enlarged(pixels: torch.Tensor) -> Image.Image:
    """(3, S, S) uint8 -> a picture; small ones are enlarged in whole steps."""
    picture = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy()))
    side = picture.width * _scale(picture.width)
    return picture.resize((side, side), Image.Resampling.NEAREST)


def write_results(out: Path, record: dict[str, Any], tiles: list[Tile], *, columns: int) -> None:
    """Write results.json, and sheet.png if there are tiles. Raises `UserError` when they cannot be written."""
    try:
        (out / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if tiles:
            _sheet(tiles, columns=min(columns, len(tiles))).save(out / "sheet.png")
        else:
            (out / "sheet.png").unlink(missing_ok=True)  # an earlier search's is none of these results
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; free disk space or choose another --out") from None
    console.print(Text(f"results.json{' and sheet.png' if tiles else ''} in {out}"))


def one_line(text: str) -> str:
    """Without control and format characters, which could move the cursor or turn the line around."""
    return " ".join("".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in text).split())


def shortened(text: str) -> str:
    """A query for one line, at most `QUERY_LENGTH` characters of it."""
    text = one_line(text)
    return text if len(text) <= QUERY_LENGTH else text[: QUERY_LENGTH - 1] + "…"


def _table(*columns: str) -> Table:
    table = Table()
    for column in columns:
        table.add_column(column, justify="left" if column in ("key", "keys", "captions") else "right", overflow="fold")
    return table


def _captions(hit: Hit) -> Text:
    text = one_line(" / ".join(hit.captions))
    return Text(text if len(text) <= CAPTION_LENGTH else text[: CAPTION_LENGTH - 1] + "…")


def _named(hit: Hit) -> dict[str, Any]:
    return {"index": hit.index, "key": hit.key, "captions": list(hit.captions)}


def _score_record(tokens: TokenStore, score: float, *, by: Way) -> dict[str, Any]:
    if by == "embedding":
        return {"cosine": score}
    total = tokens.info.num_tokens * tokens.info.num_bits
    return {"bits_differing": int(score), "bits": total, "share": score / total}


def _score(tokens: TokenStore, score: float, *, by: Way) -> str:
    if by == "embedding":
        return f"{score:.3f}"
    values = _score_record(tokens, score, by=by)
    return f"{values['bits_differing']} of {values['bits']} ({100 * values['share']:.1f} %)"


def _scale(size: int) -> int:
    return max(1, TILE_SIDE // size)


def _sheet(tiles: list[Tile], *, columns: int) -> Image.Image:
    """Tiles row by row, two lines of text under each."""
    side, font = tiles[0].picture.width, ImageFont.load_default(size=14)
    width, height = side + TILE_GAP, side + 2 * LINE_HEIGHT + TILE_GAP
    sheet = Image.new("RGB", (columns * width + TILE_GAP, -(-len(tiles) // columns) * height + TILE_GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for number, tile in enumerate(tiles):
        left, top = TILE_GAP + number % columns * width, TILE_GAP + number // columns * height
        draw.rectangle((left - 1, top - 1, left + side, top + side), outline="lightgrey")
        sheet.paste(tile.picture, (left, top))
        for line, text in enumerate(tile.lines):
            text = one_line(text)[:200]
            while font.getlength(text) > side:
                text = text[:-2] + "…"
            draw.text((left, top + side + 2 + line * LINE_HEIGHT), text, fill="black", font=font)
    return sheet
