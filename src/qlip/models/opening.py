"""A path or hub id -> a model that can be measured: ours, the released QLIP, or one of others."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from qlip.core.errors import UserError
from qlip.models.autoencoders import AUTOENCODERS, open_autoencoder
from qlip.models.baselines import read_config
from qlip.models.llamagen import SUFFIXES, open_llamagen
from qlip.models.measured import MeasuredModel, MeasuredQLIP
from qlip.models.qlip.loading import load_model, load_processor
from qlip.models.qlip.official import is_official
from qlip.models.qlip.weight_files import looks_like_hub_id, shown
from qlip.models.two_towers import open_two_towers

OPENABLE = (
    "give a QLIP folder (ours or the released layout), a CLIP or SigLIP folder of transformers, a "
    f"{' or '.join(AUTOENCODERS)} folder of diffusers, or a VQGAN file of LlamaGen"
)


def open_measured(source: str | Path) -> MeasuredModel:
    """The model in a folder, in LlamaGen's file or in the hub's cache, on the CPU, in evaluation mode.

    A hub id that is not in the cache is taken for a QLIP model, which `load_model` looks for on the hub, saying so.
    Raises `UserError` for anything else, and for a model that is damaged or not whole.
    """
    path = Path(source)
    if not path.exists() and looks_like_hub_id(source):
        cached = try_to_load_from_cache(str(source), "config.json")
        if not isinstance(cached, str) or _is_qlip(Path(cached).parent):
            return _open_qlip(source)
        path = Path(cached).parent
    if path.is_file() and path.suffix in SUFFIXES:
        return open_llamagen(path)
    if not path.is_dir():
        raise UserError(f"{source} is {'no model file' if path.exists() else 'not there'}: {OPENABLE}")
    if not (path / "config.json").exists():
        return open_llamagen(_only_weights(path))
    if _is_qlip(path):
        return _open_qlip(path)
    config = read_config(path)
    if config.get("_class_name") in AUTOENCODERS:
        return open_autoencoder(path)
    if config.get("model_type") in ("clip", "siglip"):
        return open_two_towers(path)
    kind = config.get("_class_name") or config.get("model_type") or "no known kind"
    raise UserError(f"{source} holds a model of {shown(str(kind))}, which cannot be measured: {OPENABLE}")


def _is_qlip(folder: Path) -> bool:
    config = read_config(folder)
    return is_official(config) or config.get("model_type") == "qlip"


def _open_qlip(source: str | Path) -> MeasuredQLIP:
    return MeasuredQLIP(load_model(source), load_processor(source))


def _only_weights(folder: Path) -> Path:
    """The one torch file of a folder without config.json."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".pt", ".pth"))
    if (folder / "model_index.json").is_file():
        raise UserError(f"{folder} is a whole pipeline of diffusers: give the folder of its autoencoder ({folder}/vae)")
    if len(files) != 1:
        what = f"{len(files)} weight files, no config.json: give one of them" if files else f"no model: {OPENABLE}"
        raise UserError(f"{folder} holds {what}")
    return files[0]
