"""What a user's words for the data of an evaluation mean: the door to shards, folders, COCO's json and tables.

Nothing is ever downloaded; docs/data.md says where data sets come from and how they must lie.
"""

from __future__ import annotations

import re
from pathlib import Path

from qlip.core.errors import UserError
from qlip.data.arrow_folder import is_saved_dataset, open_saved_dataset
from qlip.data.coco import KARPATHY_ZIP, open_captions
from qlip.data.folders import (
    METADATA_FILES,
    PICTURE_ENDINGS,
    CaptionedFiles,
    PictureFolder,
    card_name,
    open_metadata,
    open_picture_folder,
)
from qlip.data.items import Source
from qlip.data.parquet import open_parquet, open_parquet_folder
from qlip.data.question_files import QuestionFiles, is_question_file, open_questions
from qlip.data.remote import RemoteShard
from qlip.data.shard_list import expand_shards, split_sources
from qlip.data.shard_source import ShardSource, open_shards, read_names
from qlip.data.table_rows import TableSource

WHAT = (
    "a folder of pictures or class folders, tar shards, a COCO or Karpathy json, parquet, a folder of save_to_disk, "
    "questions (docs/data.md)"
)
ARCHIVES = (".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
SPLIT_FOLDERS = frozenset(("train", "val", "valid", "validation", "test"))
COCO_FOLDERS = frozenset(f"{split}{year}" for split in ("train", "val", "test") for year in (2014, 2015, 2017))
KARPATHY_FILES = ("dataset_coco.json", "dataset_flickr30k.json", "dataset_flickr8k.json")
WNID = re.compile(r"n\d{8}")
NUM_IMAGENET_CLASSES = 1000
AnySource = ShardSource | PictureFolder | CaptionedFiles | TableSource | QuestionFiles


def open_source(spec: str, *, images: str = "", split: str = "test", labels: Path | None = None) -> Source:
    """Shards, a folder of pictures (class folders, flat, with metadata), COCO's or Karpathy's json, parquet, a data set
    of Hugging Face's `save_to_disk`, questions.

    `images` is where the pictures of a json or of question files are; `split` chooses of Karpathy's json, of parquet
    folders and of saved data sets. `labels` is a text file of class names that replaces those of the data: one a line
    in the order of the labels, or `folder<TAB>name` lines for the data's own names in any order.

    Raises `UserError`, which says what was found and what to give, for anything else, and as the readers do.
    """
    source = _open(spec.strip(), images, split)
    if images and not isinstance(source, CaptionedFiles | QuestionFiles):
        raise UserError(
            f"--images {images} has no use with {source.name}: it is for COCO's json and question files; leave it out"
        )
    if labels is not None:
        source.class_names = _given_names(labels, source)
    return source


def require_classes(source: Source, num_classes: int) -> None:
    """Raise `UserError` unless the data have so many classes (0: any), in ImageNet's order where it is its thousand."""
    found = len(source.class_names)
    folders = source.folders if isinstance(source, PictureFolder) else ()
    if found and num_classes in (0, found):
        strange = [name for name in folders if not WNID.fullmatch(name)]
        if num_classes == NUM_IMAGENET_CLASSES and strange:
            raise UserError(
                f"{source.name}: class folder {strange[0]} is no wnid such as n01440764 ({len(strange)} of {found}), "
                "so their order need not be ImageNet's; rename the folders to wnids"
            )
        return
    needed = f"{num_classes} needed" if num_classes else "some needed"
    raise UserError(f"{source.name}: {found} classes found, {needed}; {_class_remedy(source, num_classes)}")


def _class_remedy(source: Source, num_classes: int) -> str:
    if isinstance(source, ShardSource):
        if any(key.name.startswith("ILSVRC2012_img_val") for key in source.shards):
            return _sort_val(source.shards[0].name)
        return "put the names into classnames.txt beside the shards, one a line, or give --labels FILE"
    if isinstance(source, TableSource):
        return "give a file whose column label has class names in Hugging Face's metadata, or --labels FILE"
    if isinstance(source, PictureFolder) and not source.folders:
        if source.keys[0].startswith("ILSVRC2012_val_"):
            return _sort_val("ILSVRC2012_img_val.tar")
        loose = next(key for key in source.keys if "/" not in key)
        return f"sort the pictures into one folder per class ({loose} lies in none)"
    if num_classes == NUM_IMAGENET_CLASSES:
        return "give ImageNet's 1000 wnid folders (docs/data.md), or --evals images-... for data of your own classes"
    return "give a folder with one folder of pictures per class"


def _sort_val(archive: str) -> str:
    return (
        f"put {archive} and ILSVRC2012_devkit_t12.tar.gz into an empty FOLDER and sort them into 1000 wnid folders: "
        "pip install scipy; python -c \"from torchvision.datasets import ImageNet; ImageNet('FOLDER', split='val')\", "
        "then give FOLDER/val"
    )


def _open(spec: str, images: str, split: str) -> AnySource:
    spec = spec.removeprefix("file://")
    if not spec:
        raise UserError(f"no data given: give {WHAT}")
    path = Path(spec).expanduser()
    try:
        is_there, is_folder = path.exists(), path.is_dir()
    except OSError as error:
        raise UserError(f"{spec[:200]} cannot be looked at: {error.strerror}; give {WHAT}") from None
    if is_there:
        return _open_folder(path, split) if is_folder else _open_file(path, images, split)
    if "://" in spec:
        names = [RemoteShard(part).name for part in split_sources(spec)]
        other = next((name for name in names if Path(name).suffix in (".parquet", ".json", *ARCHIVES)), None)
        if other is not None:
            raise UserError(f"{other}: only tar shards are read from afar; copy it here and give its path")
        return open_shards(spec)
    if "::" in spec or re.search(r"[*?\[{]", spec):
        return _open_pattern(spec, images, split)
    if path.suffix == ".json":
        raise UserError(
            f"{path} is not there; mend the path. Of COCO's, dataset_coco.json and dataset_flickr30k.json come in "
            f"{KARPATHY_ZIP}, captions_val2014.json in "
            "http://images.cocodataset.org/annotations/annotations_trainval2014.zip: unpack it there"
        )
    raise UserError(f"{path} is not there; give {WHAT}")


def _open_pattern(spec: str, images: str, split: str) -> AnySource:
    files = expand_shards(spec)
    local = [file for file in files if isinstance(file, Path)]
    tables = [file for file in local if file.suffix == ".parquet"]
    if tables and len(tables) == len(files):
        return open_parquet(tables, name=card_name(Path(spec).expanduser()), split=split)
    if local and len(local) == len(files) and all(is_question_file(file) for file in local):
        return open_questions(local, images=images, name=card_name(Path(spec).expanduser()))
    other = next((file for file in local if file.suffix != ".tar"), None)
    if other is not None:
        kinds = ".tar, for .parquet or for question files"
        raise UserError(f"{spec}: {other.name} is no tar shard; a pattern stands for {kinds} alone")
    return open_shards(spec)


def _open_file(path: Path, images: str, split: str) -> AnySource:
    ending = path.suffix.lower()
    if ending == ".tar":
        return open_shards(str(path))
    if ending == ".parquet":
        return open_parquet([path], name=card_name(path), split=split)
    if is_question_file(path):
        return open_questions([path], images=images, name=card_name(path))
    if ending == ".json":
        return open_captions(path, images=images, split=split)
    if path.name in METADATA_FILES:
        return open_metadata(path)
    if ending in ARCHIVES:
        raise UserError(f"{path} is an archive; unpack it and give the folder")
    if ending in PICTURE_ENDINGS:
        raise UserError(f"{path} is one picture; give the folder that holds it")
    if ending in (".jsonl", ".csv"):
        raise UserError(
            f"{path}: its first line is no question (json with question_id), and a table of pictures must be called "
            f"{' or '.join(METADATA_FILES)}; rename it"
        )
    raise UserError(f"{path} is a file of an unknown kind; give {WHAT}")


def _open_folder(path: Path, split: str) -> AnySource:
    try:
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; mend its permissions") from None
    names = [entry.name for entry in entries]
    tars = [entry for entry in entries if entry.suffix == ".tar"]
    if tars:
        if len(tars) > 1 and all(WNID.fullmatch(tar.stem) for tar in tars):
            raise UserError(
                f"{path} holds ImageNet's train set as one tar per class: unpack each into a folder of its name: "
                'for f in *.tar; do mkdir "${f%.tar}" && tar xf "$f" -C "${f%.tar}"; done'
            )
        _refuse_splits(path, entries)
        return open_shards(str(path))
    if is_saved_dataset(path):
        return open_saved_dataset(path, split=split)
    tables = [path / name for name in METADATA_FILES if name in names]
    if len(tables) > 1:
        raise UserError(f"{path} holds {' and '.join(METADATA_FILES)}; give the one that counts")
    if tables:
        return open_metadata(tables[0])
    parquet = open_parquet_folder(path, split=split)
    if parquet is not None:
        return parquet
    _refuse_containers(path, entries)
    pictures = open_picture_folder(path)
    if pictures is None:
        what = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        archive = next((name for name in names if Path(name).suffix in ARCHIVES), None)
        remedy = f"unpack {archive} and give the folder" if archive else f"give {WHAT}"
        raise UserError(f"{path} holds no pictures, .tar or .parquet files (found: {what or 'nothing'}); {remedy}")
    return pictures


def _refuse_containers(path: Path, entries: list[Path]) -> None:
    """Folders whose subfolders would pass for classes: COCO's, and splits side by side."""
    names = {entry.name for entry in entries}
    listed = next((name for name in KARPATHY_FILES if name in names), None)
    if listed is not None:
        raise UserError(f"{path} holds {listed}; give that file: --data {path / listed}")
    if any(entry.name in COCO_FOLDERS and entry.is_dir() for entry in entries):
        raise UserError(f"{path} looks like COCO: give its dataset_coco.json or annotations/captions_val2014.json")
    _refuse_splits(path, entries)


def _refuse_splits(path: Path, entries: list[Path]) -> None:
    folders = [entry.name for entry in entries if entry.is_dir()]
    if folders and SPLIT_FOLDERS.issuperset(folders):
        raise UserError(f"{path} holds {' and '.join(folders)}; give one of them: --data {path / folders[-1]}")


def _given_names(labels: Path, source: AnySource) -> tuple[str, ...]:
    if not source.has_labels:
        raise UserError(f"--labels {labels} has no use: {source.name} has no classes; leave it out")
    lines = read_names(labels.expanduser())
    own = source.class_names
    if not any("\t" in line for line in lines):
        if own and len(lines) != len(own):
            raise UserError(f"{labels} has {len(lines)} names, {source.name} {len(own)} classes; give one name a class")
        return lines
    names: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        folder, tab, name = line.partition("\t")
        if not tab or not name.strip() or folder in names:
            raise UserError(f"{labels} line {number} is not a new `folder<TAB>name`; mend it")
        names[folder] = name.strip()
    if not own:
        raise UserError(f"{labels} names folders, {source.name} has none; give one name a line in the labels' order")
    missing = [folder for folder in own if folder not in names]
    if missing:
        raise UserError(
            f"{labels} has no name for {missing[0]} ({len(missing)} of {len(own)} classes); add `{missing[0]}<TAB>name`"
        )
    return tuple(names[folder] for folder in own)
