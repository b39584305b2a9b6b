"""Captioned pictures that a json lists: COCO's captions, and Karpathy's splits of COCO and Flickr30k."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlip.core.errors import UserError
from qlip.data.folders import CaptionedFiles, caption_texts, card_name, relative_name
from qlip.data.items import Item

ZIPS = "http://images.cocodataset.org/zips"
KARPATHY_ZIP = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
FLICKR_FOLDER = "flickr30k-images"
USUAL_PLACES = ("val2014", "train2014", "val2017", "train2017", "images", FLICKR_FOLDER, "images/val2014")


@dataclass(kw_only=True, slots=True, frozen=True)
class _Listed:
    """One picture as the json has it."""

    file: str
    """Its name, checked to be relative."""
    folder: str
    """The folder that the json says it is in; empty where it says none."""
    captions: tuple[str, ...]
    record: dict[str, Any]


def open_captions(path: Path, *, images: str, split: str) -> CaptionedFiles:
    """COCO's `{"images", "annotations"}`, all of it, or of Karpathy's `{"images": [{"sentences", "split"}]}` one split.

    Karpathy's "restval" belongs to train. Pictures are looked for below `images`; without it in the json's folder and
    the two above it, and there in `val2014/`, `train2014/`, `images/`, `flickr30k-images/`. Keys are file names; COCO's
    number is `record["cocoid"]`; captions keep the file's order.

    Raises `UserError` for json that is broken or something else, a split without pictures, and missing pictures.
    """
    content, table = _load(path)
    if "annotations" in table:
        listed, name, chosen = list(_coco(path, table)), card_name(path), ""
    else:
        listed, name, chosen = list(_karpathy(path, table, split)), f"{card_name(path)} {split}", split
    if len({entry.file for entry in listed}) < len(listed):
        raise UserError(f"{path} lists pictures of the same name twice; fetch the file again")
    items = [
        Item(key=entry.file, image=place, captions=entry.captions, record=entry.record)
        for entry, place in zip(listed, _find(path, listed, images), strict=True)
    ]
    digest = hashlib.sha256(content + b"\0" + chosen.encode())
    return CaptionedFiles(name=name, listed=items, table_sha256=digest.hexdigest())


def _load(path: Path) -> tuple[bytes, dict[str, Any]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; mend its permissions") from None
    try:
        table = json.loads(content)
    except (ValueError, RecursionError) as error:
        start = content.lstrip()[:1]
        what = "empty" if not start else "a web page" if start == b"<" else f"not json ({error})"
        raise UserError(f"{path} is {what}; fetch it again") from None
    if not isinstance(table, dict) or not isinstance(table.get("images"), list) or not table["images"]:
        raise UserError(
            f"{path} has no list of images; give COCO's captions_val2014.json or Karpathy's dataset_coco.json, or "
            "questions as one object with question_id a line"
        )
    return content, table


def _coco(path: Path, table: dict[str, Any]) -> Iterator[_Listed]:
    texts: dict[int | str, list[str]] = {}
    for number, image in enumerate(table["images"]):
        texts[_value(image, "id", (int, str), where=f"{path} images[{number}]")] = []
    annotations = table["annotations"] if isinstance(table["annotations"], list) else []
    for number, annotation in enumerate(annotations):
        where = f"{path} annotations[{number}]"
        if isinstance(annotation, dict) and "caption" not in annotation:
            raise UserError(f"{where} is no caption: give captions_val2014.json instead of boxes or key points")
        image_id = _value(annotation, "image_id", (int, str), where=where)
        if image_id not in texts:
            raise UserError(f"{where} belongs to image {image_id}, which is not listed; fetch the file again")
        texts[image_id].append(_value(annotation, "caption", (str,), where=where))
    for number, image in enumerate(table["images"]):
        where = f"{path} images[{number}]"
        file = relative_name(_value(image, "file_name", (str,), where=where), where=where)
        captions = caption_texts(texts[image["id"]])
        assert captions is not None, "all of them are texts"
        yield _Listed(file=file, folder="", captions=captions, record={"cocoid": image["id"]})


def _karpathy(path: Path, table: dict[str, Any], split: str) -> Iterator[_Listed]:
    wanted = {"train", "restval"} if split == "train" else {split}
    splits = set()
    for number, image in enumerate(table["images"]):
        where = f"{path} images[{number}]"
        of_image = _value(image, "split", (str,), where=where)
        splits.add(of_image)
        if of_image not in wanted:
            continue
        file = relative_name(_value(image, "filename", (str,), where=where), where=where)
        sentences = _value(image, "sentences", (list,), where=where)
        captions = caption_texts([_value(sentence, "raw", (str,), where=where) for sentence in sentences])
        assert captions is not None, "all of them are texts"
        folder = relative_name(image["filepath"], where=where) if isinstance(image.get("filepath"), str) else ""
        record = {"cocoid": image["cocoid"]} if "cocoid" in image else {}
        yield _Listed(file=file, folder=folder, captions=captions, record=record)
    if not splits & wanted:
        raise UserError(f"{path} has no split {split!r}: give --split {' or '.join(sorted(splits))}")


def _value(entry: Any, name: str, kinds: tuple[type, ...], *, where: str) -> Any:
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise UserError(f"{where} has no {name} ({' or '.join(kind.__name__ for kind in kinds)}); fetch the file again")
    return value


def _find(path: Path, listed: list[_Listed], images: str) -> list[Path]:
    """The file of every picture. Raises `UserError` that says where they are to be had."""
    roots = [Path(images).expanduser()] if images else list(path.absolute().parents[:3])
    if images and not roots[0].is_dir():
        raise UserError(f"--images {images} is no folder; give the one that holds the pictures of {path.name}")
    places = [place for root in roots for place in (root, *(root / usual for usual in USUAL_PLACES)) if place.is_dir()]
    last = places[0]  # nearly always the place of the next one too
    found, missing = list[Path](), list[_Listed]()
    for entry in listed:
        names = [f"{entry.folder}/{entry.file}", entry.file] if entry.folder else [entry.file]
        tries = ((place, place / name) for place in (last, *places) for name in names)
        hit = next(((place, file) for place, file in tries if file.is_file()), None)
        if hit is None:
            missing.append(entry)
        else:
            last = hit[0]
            found.append(hit[1])
    if missing:
        what = f"{len(missing)} of {len(listed)} pictures missing, first {missing[0].file}"
        root = roots[1] if not images and roots[0].name == "annotations" else roots[0]
        raise UserError(f"{path}: {what} (looked below {root}); {_remedy(path, missing, root)}")
    return found


def _remedy(path: Path, missing: list[_Listed], root: Path) -> str:
    example = {year: entry for entry in reversed(missing) if (year := _year(entry, path))}
    if example:
        zips = " and ".join(f"{ZIPS}/{year}.zip" for year in sorted(example))
        year, entry = min(example.items())
        return f"unpack {zips} so that {root / year / Path(entry.file).name} is there"
    if "flickr" in path.name.lower():
        file = root / FLICKR_FOLDER / missing[0].file
        return f"get Flickr30k's pictures (docs/data.md) and unpack them so that {file} is there"
    return "give the folder that holds them with --images FOLDER"


def _year(entry: _Listed, path: Path) -> str:
    """`val2014`: which of COCO's zips the picture is in, as its folder, its name or the table's name say."""
    found = (re.search(r"(train|val|test)20\d\d", text) for text in (entry.folder, entry.file, path.name))
    return next((year[0] for year in found if year), "")
