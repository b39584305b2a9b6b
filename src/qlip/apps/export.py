"""`qlip export`: a run's checkpoint or any model folder -> a folder in the layout that is asked for."""

from __future__ import annotations

from pathlib import Path

from qlip.core.errors import UserError
from qlip.core.log import console
from qlip.models.qlip.loading import Layout, load_model, load_processor, save_model
from qlip.recipes.run import load_run


def export_model(src: Path, out: Path, *, layout: Layout, step: int | None) -> None:
    """Raises `UserError` for what is neither a run nor a model, and for what the layout cannot hold."""
    if src.exists() and out.resolve() in (src.resolve(), *src.resolve().parents):
        raise UserError(f"{src} lies in {out}, which would be replaced; choose another OUT")
    if (src / "checkpoints").is_dir():
        model, processor, found_step = load_run(src, step=step)
        named = f"step {found_step} of {src}"
        save_model(model, folder=out, processor=processor, step=found_step, layout=layout)
    else:
        if step is not None:
            raise UserError(f"{src} is no run folder, so it has no step {step}; leave --step out")
        named = str(src)
        save_model(load_model(src), folder=out, processor=load_processor(src), step=None, layout=layout)
    console.print(f"wrote {named} to {out} ({layout} layout)")
