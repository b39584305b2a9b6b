"""safetensors files of a model folder or hub id, examined before anything large is allocated.

Headers are read and checked here: a name twice, a short file or a wrong shape is one line that names the tensor.
Pickles (pytorch_model.bin) are never read: they can run code.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from qlip.core.errors import UserError

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
MAX_HEADER_BYTES = 10_000_000  # a hundred times that of the largest model here
ITEM_SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
ITEM_SIZES |= {"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(kw_only=True, slots=True, frozen=True)
class StoredTensor:
    """What a header says of one tensor."""

    file: Path
    name: str
    """In that file; whoever loads a part calls it by a shorter one."""
    dtype: str
    shape: tuple[int, ...]
    end: int
    """Byte of the file behind its last."""


def find_weight_files(source: str | os.PathLike, *, variant: str | None = None, **hub: Any) -> list[Path]:
    """The safetensors files of a folder, or of a hub id after downloading them.

    Raises `UserError` when there are none, naming a pickle if that is all there is.
    """
    refuse_what_is_no_source(source)
    folder = Path(source, hub.get("subfolder") or "")
    distributed = next(folder.glob("shard-*.safetensors"), None) if folder.is_dir() else None
    if distributed is not None:  # transformers would load these instead of the files examined here
        raise UserError(f"{source} holds {distributed.name} of a distributed checkpoint; save the model again without")
    for name in (WEIGHTS, INDEX):
        path = _resolve(source, _with_variant(name, variant), **hub)
        if path is not None:
            return [path] if name == WEIGHTS else _shards(path, source, **hub)
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES) if folder.is_dir() else []
    if pickles:
        raise UserError(
            f"{source} has no {WEIGHTS}, only {pickles[0]}, a pickle, which could run code when it is read; "
            "convert it to safetensors on a machine you trust"
        )
    raise UserError(f"{source} has no file named {WEIGHTS}; give the `export` folder of a run, or download it again")


def refuse_what_is_no_source(source: str | os.PathLike) -> None:
    """Raises `UserError` for what is neither a folder here nor looks like a hub id."""
    if Path(source).is_file():
        raise UserError(f"{source} is a file; give the folder that holds config.json and {WEIGHTS}")
    if not Path(source).exists() and not looks_like_hub_id(source):
        raise UserError(f"{source} is not a model folder: there is nothing at that path; give a folder or a hub id")


def looks_like_hub_id(source: str | os.PathLike) -> bool:
    """`owner/name`, unless there is a folder `owner` here: then it is a path with a slip in it."""
    return bool(HUB_ID.fullmatch(str(source))) and not Path(source).parent.exists()


def _with_variant(name: str, variant: str | None) -> str:
    return name if variant is None else name.replace("model.safetensors", f"model.{variant}.safetensors")


def _resolve(source: str | os.PathLike, name: str, **hub: Any) -> Path | None:
    try:
        found = cached_file(str(source), name, _raise_exceptions_for_missing_entries=False, **hub)
    except (OSError, ValueError) as error:
        raise not_on_hub(source, error) from error
    return None if found is None else Path(found)


def not_on_hub(source: str | os.PathLike, error: Exception) -> UserError:
    """What to say when a hub id could not be had."""
    reason = str(error).strip().splitlines()[0].rstrip(".")
    return UserError(f"{source} is no folder here, and the hub did not give it ({reason}); check name and network")


def _shards(index: Path, source: str | os.PathLike, **hub: Any) -> list[Path]:
    try:
        content = json.loads(index.read_text())
        weight_map = content["weight_map"]
        names = sorted(set(weight_map.values()))
        content["metadata"].get("total_size")  # transformers asks for it
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is damaged ({type(error).__name__}); export or download it again") from None
    files = []
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{index} names {name!r}, which is outside its folder; do not trust it")
        path = _resolve(source, name, **hub)
        if path is None:
            first = min(key for key, value in weight_map.items() if value == name)
            raise UserError(f"{source} lacks {name}, which holds {first}; export or download it again")
        files.append(path)
    return files


def tensor_names(source: str | os.PathLike, **hub: Any) -> set[str]:
    """Names of all stored tensors; empty where there are no weights, as beside a config alone."""
    if not Path(source).is_dir() and not looks_like_hub_id(source):
        return set()
    try:
        return set(read_headers(find_weight_files(source, **hub)))
    except UserError:
        return set()  # whoever loads the weights says what is wrong with them


def read_headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Every tensor of safetensors files by name, from their headers alone.

    Raises `UserError` for damage, naming the first tensor it concerns.
    """
    stored: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in _read_header(file):
            if name in stored:
                raise UserError(f"{file} holds {shown(name)} twice; export or download it again")
            stored[name] = tensor
    return stored


def _read_header(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    again = "export or download it again"
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
            raise UserError(f"{file} is no safetensors file, or cut off in its header ({size} bytes); {again}")
        try:
            pairs = json.loads(stream.read(length), object_pairs_hook=list)
            entries = [(name, dict(entry)) for name, entry in pairs if name != "__metadata__"]
        except (ValueError, TypeError, RecursionError):
            raise UserError(f"{file} has a damaged header; {again}") from None
    position = 8 + length
    for name, entry in sorted(entries, key=_first_byte):
        tensor = _stored_tensor(name, entry, file, data_start=8 + length, expected_start=position)
        if tensor is None:
            raise UserError(f"{file}: the header's entry of {shown(name)} makes no sense; {again}")
        if tensor.end > size:
            raise UserError(f"{file} is cut off: {shown(name)} ends at byte {tensor.end}, the file at {size}; {again}")
        position = tensor.end
        yield name, tensor
    if position != size:
        raise UserError(f"{file} has {size - position} bytes behind its last tensor; {again}")


def shown(name: str) -> str:
    """A tensor's name as it may stand in an error of one line, whatever it holds."""
    return name if name.isprintable() and 0 < len(name) <= 100 else f"{name[:100]!r}"


def _first_byte(item: tuple[str, dict[str, Any]]) -> tuple[int, int]:
    match item[1].get("data_offsets"):
        case [int(start), int(end)]:
            return start, end
    return -1, -1  # comes first and is refused


def _stored_tensor(
    name: str, entry: dict[str, Any], file: Path, *, data_start: int, expected_start: int
) -> StoredTensor | None:
    """None unless dtype, shape and offsets are possible, agree, and follow the tensor before."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(end)]}:
            pass
        case _:
            return None
    if dtype not in ITEM_SIZES or not all(type(side) is int and side >= 0 for side in shape):
        return None
    if data_start + start != expected_start or end - start != math.prod(shape) * ITEM_SIZES[dtype]:
        return None
    return StoredTensor(file=file, name=name, dtype=dtype, shape=tuple(shape), end=data_start + end)


def refuse_unfit(
    stored: Mapping[str, StoredTensor],
    needed: Mapping[str, torch.Tensor],
    *,
    source: str | os.PathLike,
    may_be_fresh: tuple[str, ...] = (),
    any_shape: bool = False,
) -> None:
    """Raises `UserError` naming the first tensor that is missing, left over, or of another shape or kind.

    `needed` may be on the meta device. Names that start with one of `may_be_fresh` may be missing.
    """
    missing = sorted(name for name in needed if name not in stored and not name.startswith(may_be_fresh or ("\n",)))
    unexpected = sorted(name for name in stored if name not in needed)
    for kind, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            raise UserError(
                f"{source}: {len(names)} {kind} keys, first {shown(names[0])}; "
                "weights and config.json do not belong together: export or download them again"
            )
    mismatched = [] if any_shape else sorted(n for n in stored if stored[n].shape != tuple(needed[n].shape))
    if mismatched:
        first = mismatched[0]
        raise UserError(
            f"{source}: {len(mismatched)} mismatched keys, first {first}: shape {stored[first].shape} in the file, "
            f"{tuple(needed[first].shape)} by config.json; export or download them again"
        )
    for name in sorted(stored):
        if needed[name].is_floating_point() and stored[name].dtype not in FLOATS:
            raise UserError(f"{source}: {name} has dtype {stored[name].dtype}, no float; export or download it again")


def refuse_non_finite(stored: Mapping[str, StoredTensor], *, source: str | os.PathLike) -> None:
    """Read the tensors one at a time. Raises `UserError` naming the first with a NaN or an infinity."""
    by_file: dict[Path, list[str]] = {}
    for tensor in stored.values():
        if tensor.dtype in FLOATS:
            by_file.setdefault(tensor.file, []).append(tensor.name)
    for file, names in by_file.items():
        try:
            with safe_open(file, framework="pt") as reader:
                bad = next((name for name in sorted(names) if not reader.get_tensor(name).isfinite().all()), None)
        except SafetensorError as error:
            raise UserError(f"{file} is damaged: {error}; export or download it again") from None
        if bad is not None:
            raise UserError(f"{source}: {bad} holds NaN or infinite values; this model is broken, take another")
