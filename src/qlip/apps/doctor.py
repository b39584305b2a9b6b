"""`qlip doctor`: what this machine has, and what does not fit together."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.table import Table

from qlip.core.log import console

PACKAGES = ("qlip", "torch", "torchvision", "transformers", "safetensors", "timm", "pillow", "pyarrow", "torchdata")
EXTRAS = {
    "eval": ("torch_fidelity", "lpips", "lm_eval"),
    "captions": ("pycocoevalcap",),
    "baselines": ("diffusers", "sentencepiece"),
    "lora": ("peft",),
    "app": ("gradio",),
    "ray": ("ray",),
    "trackers": ("trackio", "wandb"),
}


def print_diagnosis() -> None:
    """Print a table of facts, then each problem with its remedy; never raises for a broken installation."""
    table = Table(title="qlip doctor", title_justify="left", show_header=False)
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    for name in PACKAGES:
        table.add_row(name, _version(name))
    problems = _add_compute_rows(table)
    table.add_row("cores", f"{os.cpu_count()}")
    table.add_row("free disk here", f"{shutil.disk_usage(Path.cwd()).free / 1e9:.1f} GB")
    for extra, modules in EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        table.add_row(f"extra {extra}", f"not installed: pip install 'qlip[{extra}]'" if missing else "installed")
    console.print(table)
    for problem in problems:
        console.print(f"problem: {problem}")
    if not problems:
        console.print("no problems found; `qlip demo` runs the whole system here")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _add_compute_rows(table: Table) -> list[str]:
    problems = []
    try:
        import torch

        from qlip.engine.parallel import has_fast_bf16

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        name = torch.cuda.get_device_name() if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
        table.add_row("device", f"{device.type} ({name}), {torch.get_num_threads()} CPU threads")
        table.add_row("precision auto", "bf16 autocast" if has_fast_bf16(device) else "float32")
    except (ImportError, RuntimeError, OSError) as error:
        return [f"torch does not load ({error}): pip install --force-reinstall torch torchvision"]
    try:
        import torchvision  # noqa: F401 - importing it is the test
    except (ImportError, RuntimeError, OSError) as error:
        problems.append(
            f"torchvision does not load ({error}): torch and torchvision must come from the same kind of build, "
            "pip install --force-reinstall torch torchvision"
        )
    return problems
