"""Model folders for the command line and training: model, processor and card together, whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

from huggingface_hub.utils import logging as hub
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers.utils import logging

from qlip.core.errors import UserError
from qlip.core.log import console
from qlip.models.qlip import graphs
from qlip.models.qlip.card import graphs_card, model_card
from qlip.models.qlip.modeling import QLIPModel
from qlip.models.qlip.official import official_config, official_tensors
from qlip.models.qlip.pretrained import CONFIG_ERRORS, one_line
from qlip.models.qlip.processing import QLIPProcessor
from qlip.models.qlip.weight_files import looks_like_hub_id, refuse_what_is_no_source

EXPORT_MARKER = "trained_steps.txt"
REPLACEABLE = ".qlip-export"  # in every folder that `save_model` wrote, and in no other
LOAD_ERRORS = (*CONFIG_ERRORS, RuntimeError, SafetensorError)
Layout = Literal["qlip", "official", "onnx", "pt2"]
LAYOUTS: tuple[str, ...] = get_args(Layout)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without its progress bars, which take milliseconds here, its tables of tensors and its retries of the network,
    of which `UserError` says what there is to say."""
    shown, verbosity, hub_verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity(), hub.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    hub.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        hub.set_verbosity(hub_verbosity)
        if shown:
            logging.enable_progress_bar()


def load_model(source: str | Path) -> QLIPModel:
    """A QLIP model in evaluation mode from a folder of ours, a released one, or a hub id.

    Raises `UserError` when it is no model, or tensors are missing, left over, misshapen or not finite.
    """
    if looks_like_hub_id(source) and not Path(source).exists():
        console.print(f"{source} is no folder here; looking for it on the Hugging Face hub")
    try:
        with quiet_transformers():
            return QLIPModel.from_pretrained(str(source)).eval()
    except UserError:
        raise
    except LOAD_ERRORS as error:
        raise UserError(f"cannot load {source}: {one_line(error)}; export or download it again") from error


def load_processor(source: str | Path) -> QLIPProcessor:
    """The processor that belongs to a model folder or hub id.

    Raises `UserError` when it is no model or a processor file is broken.
    """
    refuse_what_is_no_source(source)
    try:
        with quiet_transformers():
            return QLIPProcessor.from_pretrained(str(source))
    except UserError:
        raise
    except LOAD_ERRORS as error:
        reason = one_line(error)
        raise UserError(f"cannot load the processor of {source}: {reason}; export or download it again") from error


def save_model(
    model: nn.Module, *, folder: Path, processor: QLIPProcessor, step: int | None, layout: Layout = "qlip"
) -> None:
    """Write model, processor and card; the folder appears whole or not at all.

    `layout`: `qlip`, ours; `official`, that of the released checkpoints; `onnx` or `pt2`, encoder and decoder as
    graphs (`graphs.py`). An earlier export is replaced. Raises `UserError` for a folder that holds anything else or
    cannot be written, and for a model that the layout cannot hold.
    """
    assert isinstance(model, QLIPModel)
    writers: dict[str, Callable[[QLIPModel, Path], None]] = {
        "qlip": _write_ours,
        "official": _write_official,
        "onnx": graphs.write_onnx,
        "pt2": graphs.write_pt2,
    }

    def write(temporary: Path) -> None:
        with quiet_transformers():
            writers[layout](model, temporary)
            processor.save_pretrained(temporary)
        training = f", trained for {step} steps with `qlip train`" if step else ""
        card = graphs_card(model, layout) if layout in ("onnx", "pt2") else model_card(model, training=training)
        (temporary / "README.md").write_text(card)

    write_export(folder, write, step=step if layout == "qlip" else None)


def write_export(
    folder: Path, write: Callable[[Path], None], *, step: int | None, subfolders: tuple[str, ...] = ()
) -> None:
    """`write` fills a folder, with a README.md and `subfolders`; it is marked as an export, and of `step` if given.

    It appears whole or not at all, and replaces an earlier export. Raises `UserError` for a folder that holds anything
    else or cannot be written.
    """

    def write_all(temporary: Path) -> None:
        write(temporary)
        (temporary / REPLACEABLE).touch()
        for file in temporary.iterdir():  # safetensors makes files that nobody else on the machine may read
            if file.is_file():
                file.chmod((temporary / "README.md").stat().st_mode)
        if step is not None:
            (temporary / EXPORT_MARKER).write_text(str(step))

    _replace_folder(folder, write_all, subfolders=subfolders)


def _write_ours(model: QLIPModel, folder: Path) -> None:
    model.save_pretrained(folder)


def _write_official(model: QLIPModel, folder: Path) -> None:
    try:
        config = official_config(model.config)
    except ValueError as error:
        raise UserError(f"{error}; export it in our own layout") from None
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: tensor.cpu() for name, tensor in official_tensors(model).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _replace_folder(folder: Path, write: Callable[[Path], None], *, subfolders: tuple[str, ...]) -> None:
    """`write` fills a temporary folder that then takes this name; an earlier export moves out of the way first."""
    if folder.is_file() or (folder.exists() and any(folder.iterdir()) and not _is_export(folder, subfolders)):
        raise UserError(f"{folder} exists and is no export of ours; choose another folder")
    temporary = folder.with_name(folder.name + ".tmp")
    earlier = folder.with_name(folder.name + ".old")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        if folder.exists():
            folder.rename(earlier)
        temporary.rename(folder)
    except (OSError, SafetensorError, UserError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"cannot write to {folder}: {reason}; free disk space or choose another folder") from None
    shutil.rmtree(earlier, ignore_errors=True)


def _is_export(folder: Path, subfolders: tuple[str, ...]) -> bool:
    """Written by `write_export`, and no folder but those of its kind has been put beside its files since."""
    marked = any((folder / name).is_file() for name in (REPLACEABLE, EXPORT_MARKER))
    return marked and not any(path.is_dir() and path.name not in subfolders for path in folder.iterdir())
