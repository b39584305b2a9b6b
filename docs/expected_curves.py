"""Draw docs/expected_curves.svg from the demo's metrics, so that readers know which curves to expect.

.venv/bin/python docs/expected_curves.py runs/demo     # after `make demo`
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.figure import Figure

from qlip.core.log import read_metrics

OUT = Path(__file__).with_suffix(".svg")
PANELS = (
    ("stage1", "contrastive", "stage 1: contrastive"),
    ("stage1", "mse", "stage 1: pixel MSE on [0, 1]"),
    ("stage1", "commitment_loss", "stage 1: commitment (weighted)"),
    ("stage1", "bit_entropy", "stage 1: entropy per bit, nats"),
    ("stage2", "decoder/encoder", "stage 2: encoder distance"),
    ("stage2", "decoder/mse", "stage 2: pixel MSE on [0, 1]"),
    ("stage2", "decoder/generator_loss", "stage 2: generator (weighted)"),
    ("stage2", "discriminator/discriminator_loss", "stage 2: discriminator"),
)


def main(demo: Path) -> None:
    """One panel per term, all from the run's own metrics.jsonl."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplots(2, 4)
    for panel, (stage, name, title) in zip(axes.flat, PANELS, strict=True):
        lines = [line for line in read_metrics(demo / stage / "metrics.jsonl") if line.get(name) is not None]
        panel.plot([line["step"] for line in lines], [line[name] for line in lines], linewidth=1)
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("step", fontsize=8)
        panel.tick_params(labelsize=8)
        if name.endswith("mse"):
            panel.set_yscale("log")
    figure.savefig(OUT, metadata={"Date": None})
    print(f"wrote {OUT}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: expected_curves.py DEMO_FOLDER")
    main(Path(sys.argv[1]))
