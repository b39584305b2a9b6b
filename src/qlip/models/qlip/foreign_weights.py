"""Read a weight file that others made: tensors come in as float32, code never runs, damage is one line."""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qlip.core.errors import UserError
from qlip.models.qlip.weight_files import read_headers, shown

PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
WRAPPERS = ("model", "module", "state_dict")
MAX_WRAPPERS = 4  # a crafted pickle can hold itself, so unwrapping has to end
PICKLE_STARTS = (b"PK\x03\x04", b"\x80")  # torch's zip archives, and its files of before 2020
# What torch.load says of a file that holds more than tensors and plain containers.
CODE = re.compile(r"GLOBAL|TorchScript|Trying to (call|instantiate)|Can only (create|build)")
CUT_SHORT = re.compile(r"truncated|unexpected EOF")
DOWNLOAD_AGAIN = "download it again"
CONVERT = "convert it to .safetensors on a machine you trust"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Key -> tensor of a `.safetensors` file or of a torch pickle (`.pt`, `.pth`, `.bin`); floats become float32.

    A pickle's `model`, `module` and `state_dict` wrappers and a `module.` before every key are taken off, and what
    is no tensor is left out. Raises `UserError` naming the file: not there, another format, damaged, carrying more
    than plain data (nothing of it is executed), without tensors, or holding a tensor that is not finite.
    """
    if not path.is_file():
        raise UserError(f"no file at {path}; give the path of a weight file")
    if path.suffix not in (".safetensors", *PICKLE_SUFFIXES):
        raise UserError(f"{path} has another ending than weight files; give a .safetensors, .pt, .pth or .bin file")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    tensors = {str(key): value for key, value in _unwrap(content).items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no tensors; give a file that holds a model's state dict")
    while all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
    return {key: checked_tensor(tensor.detach(), key=key, path=path) for key, tensor in tensors.items()}


def _unwrap(content: Any) -> dict:
    for _ in range(MAX_WRAPPERS):
        if not isinstance(content, dict):
            break
        inner = [content[name] for name in WRAPPERS if isinstance(content.get(name), dict)]
        if not inner:
            return content
        content = inner[0]
    return content if isinstance(content, dict) else {}


def checked_tensor(tensor: Tensor, *, key: str, path: Path) -> Tensor:
    """The tensor in float32 if it holds floats, unchanged otherwise."""
    plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.is_quantized or tensor.is_complex():
        raise UserError(f"{path}: {shown(key)} is no plain dense tensor; {CONVERT}")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():  # a repeated view: huge from little
        raise UserError(f"{path}: {shown(key)} claims more numbers than the file holds; {DOWNLOAD_AGAIN}")
    if not tensor.is_floating_point():
        return tensor
    tensor = tensor.float()
    if not torch.isfinite(tensor).all():
        raise UserError(f"{path}: {shown(key)} holds NaN or infinite values; {DOWNLOAD_AGAIN}, or use another file")
    return tensor


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    read_headers([path])  # refuses damage, and a name that stands twice, which the library accepts in silence
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {path}: {_first_line(error)}; {DOWNLOAD_AGAIN}") from None


def read_pickle(path: Path) -> Any:
    """What torch.load makes of the file with nothing but tensors and plain containers allowed."""
    with path.open("rb") as file:
        start = file.read(24)
    if not start.startswith(PICKLE_STARTS):
        begins = f"it begins with {start.decode('ascii', 'replace')!r}" if start else "it is empty"
        raise UserError(f"{path} is no torch file ({begins}); {DOWNLOAD_AGAIN}")
    is_zip = zipfile.is_zipfile(path)  # false for one cut short: its table of contents is at the end
    try:
        with warnings.catch_warnings(action="ignore"):  # its remarks on formats are part of the error below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # a crafted file can make an unpickler fail in any way
        message = str(error)
        if CODE.search(message):
            raise UserError(f"{path} carries code or objects besides tensors, which is not run; {CONVERT}") from None
        if isinstance(error, EOFError) or CUT_SHORT.search(message) or (start.startswith(b"PK") and not is_zip):
            raise UserError(f"{path} is damaged or cut short; {DOWNLOAD_AGAIN}") from None
        raise UserError(f"{path} is damaged or no plain state dict; {DOWNLOAD_AGAIN}, or {CONVERT}") from None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
