"""The commands that measure: eval and its relatives, table. As `commands.py`: signature and docstring are the help.

Nothing heavy is imported before a command is called.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tyro.conf import Positional


def evaluate(
    model: Positional[str],
    *,
    data: str,
    evals: tuple[str, ...] = (),
    images: str = "",
    split: str = "test",
    labels: Path | None = None,
    train_data: str = "",
    reference: str = "",
    max_samples: int = 0,
    leave_out: tuple[str, ...] = (),
    networks: Path | None = None,
    clip: Path | None = None,
    caption_encoder: str = "",
    out: Path | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    json: Path | None = None,
) -> None:
    """Measure a model under named protocols; every figure is printed beside its baseline and carries its card.

    `qlip eval protocols` lists them, `qlip eval compare A B` compares two results, `qlip eval explain` shows what a
    protocol is worth. A stopped evaluation goes on when started again; torchrun shares the pictures.

    Example: qlip eval runs/demo/stage2/export --data runs/demo/data/test

    Args:
        model: Model folder or hub id: QLIP, or of others CLIP, SigLIP, diffusers' VQ or KL, LlamaGen's VQGAN; or a
            text-to-image model, an assistant or a UM3 of ours.
        data: Pictures: class folders, a flat folder, tar shards, a COCO or Karpathy json, parquet; question files.
        evals: Protocols by name; those of scenes if not given.
        images: Folder of the pictures that a COCO or Karpathy json or question files name, if not beside it.
        split: Which split of a Karpathy json.
        labels: File of class names, one a line, in place of the data's own.
        train_data: What linear probe and k-NN learn from.
        reference: Other pictures to take Frechet distances against than the originals.
        max_samples: Score the first so many pictures; 0 scores all.
        leave_out: Metrics not to measure: rfid, gfid, lpips_alex, lpips_vgg, fd_clip, clip_cosine, clipscore.
        networks: Folder with the weights of Inception and LPIPS; torch's hub cache if not given.
        clip: CLIP folder that scores generated pictures against captions.
        caption_encoder: Folder of a text-to-image model's T5, if it lies elsewhere than in training.
        out: Folder for results, a row per picture, the worst pictures; runs/eval/NAME if not given.
        batch_size: Pictures per forward pass, 100 if not given; questions answered together, 8 if not given.
        device: auto, cpu, cuda, ...
        json: Also write the results to this file.
    """
    from qlip.core.distributed import stop
    from qlip.core.log import FIRST_PROCESS, console
    from qlip.evals.results import print_results, write_results
    from qlip.evals.run import EvalRequest, default_batch_size, default_evals, result_folder, run_evals

    request = EvalRequest(
        data=data,
        evals=evals or default_evals(model),
        images=images,
        split=split,
        labels=labels,
        train_data=train_data,
        reference=reference,
        max_samples=max_samples,
        batch_size=default_batch_size(model) if batch_size is None else batch_size,
        leave_out=leave_out,
        networks=networks,
        clip=clip,
        caption_encoder=caption_encoder,
        folder=out or result_folder(model),
    )
    results = run_evals(model, request, device=device)
    print_results(results)
    console.print(f"results, rows per picture and cards: {request.folder}")
    if json is not None and FIRST_PROCESS:
        write_results(json, results)
    stop()


def eval_protocols() -> None:
    """List the protocols that `qlip eval` knows, with what each measures.

    Example: qlip eval protocols
    """
    from qlip.evals.protocols import print_protocols

    print_protocols()


def eval_compare(a: Positional[Path], b: Positional[Path], *, force: bool = False) -> None:
    """Compare two results of `qlip eval`; refused, saying what differs, unless they were measured alike.

    Example: qlip eval compare runs/eval/a/results.json runs/eval/b/results.json

    Args:
        a: results.json of one model.
        b: results.json of the other.
        force: Compare all the same; the differences are printed above the table.
    """
    from qlip.evals.compare import compare_results

    compare_results(a, b, force=force)


def eval_explain(
    model: Positional[str],
    *,
    data: str,
    max_samples: int = 0,
    networks: Path | None = None,
    reference: str = "",
    out: Path | None = None,
    batch_size: int = 100,
    device: str = "auto",
) -> None:
    """Score the same pictures under protocols that differ in one thing each: where a gap between two papers comes from.

    Example: qlip eval explain runs/demo/stage2/export --data photos

    Args:
        model: Model folder or hub id.
        data: Pictures, as for `qlip eval`.
        max_samples: Score the first so many pictures; 0 scores all.
        networks: Folder with the weights of Inception and LPIPS; without them in it rFID and LPIPS are left out.
        reference: Other pictures to take Frechet distances against, as one more protocol.
        out: Folder for results.json; runs/explain/NAME if not given.
        batch_size: Pictures per forward pass.
        device: auto, cpu, cuda, ...
    """
    from qlip.apps.explain import explain
    from qlip.core.distributed import stop

    explain(
        model,
        data=data,
        max_samples=max_samples,
        networks=networks,
        reference=reference,
        out=out,
        batch_size=batch_size,
        device=device,
    )
    stop()


def eval_results(benchmark: Positional[Literal["geneval", "dpg"]], results: Positional[Path]) -> None:
    """Read what the scorer of GenEval or DPG-Bench wrote about pictures of `qlip generate`, beside the paper's rows.

    Example: qlip eval results geneval results.jsonl

    Args:
        benchmark: geneval or dpg.
        results: GenEval's results.jsonl, or DPG-Bench's result file.
    """
    from qlip.apps.benchmark_scores import print_scores

    print_scores(benchmark, results)


def table(
    results: Positional[tuple[Path, ...]],
    *,
    shape: Literal["2", "3", "10"] = "2",
    format: Literal["markdown", "latex", "csv"] = "markdown",
    paper: bool = True,
    protocols: tuple[str, ...] = (),
    out: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Print results of `qlip eval` as the paper's Table 2, 3 or 10, its rows beside yours, and draw its Figure 1.

    Example: qlip table runs/eval/demo-stage2/results.json

    Args:
        results: Files that `qlip eval` wrote; several of one model share a row.
        shape: 2, tokenizers; 3, ablations as columns; 10, linear probes by position.
        format: markdown, latex or csv.
        paper: Also show the paper's rows; --no-paper leaves them out.
        protocols: Take the results of these protocols alone, where a file holds several for one column.
        out: Write the table to this file instead of printing it.
        plot: Also draw zero-shot accuracy against rFID to this .svg or .png.
    """
    from qlip.apps.table import build_table

    build_table(list(results), shape=shape, format=format, paper=paper, protocols=protocols, out=out, plot=plot)
