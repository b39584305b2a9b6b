"""`qlip import llama SRC OUT --tokenizer QLIP`: a language model widened by visual ids, ready to be trained as a UM3.

OUT is a UM3 folder; OUT/import_report.json keeps what became of the vocabulary, of QK-norm and of the parameters.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlip.apps.import_weights import REPORT_NAME, say
from qlip.core.errors import UserError
from qlip.models.image_tokenizer import ImageTokenizer, open_image_tokenizer
from qlip.models.language_model import open_language_model
from qlip.models.unified import UM3ForCausalLM
from qlip.models.unified_model import save_unified
from qlip.models.unified_processor import UM3Processor
from qlip.models.widening import WideningConfig, match_qk_norm, widen

PROBE_TOKENS, LEAST_PROBE = 4096, 64  # of the text on which QK-norm is matched
MEASURED_TOKENS = 1024  # of it whose likelihood is told: the logits of more would fill the memory
PROBE_CHARACTERS = 200_000


@dataclass(kw_only=True, slots=True)
class LlamaImportConfig:
    """What the command line says of an import."""

    tokenizer: str
    """Folder or file of the image tokenizer."""
    image_size: int = 0
    """Side of its pictures in pixels, for VQ tokenizers, which take many."""
    widening: WideningConfig
    """Sub-codes and softmax."""
    probe: Path | None = None
    """Text on which the weights of QK-norm are matched; without it they are one."""


def import_llama(src: Path, out: Path, config: LlamaImportConfig) -> None:
    """Import, write OUT whole or not at all, print what became of things and keep it in OUT/import_report.json.

    Raises `UserError` for anything but a Llama or Qwen3 with its tokenizer, an image tokenizer that makes no tokens or
    other bits than the division, an unfit probe, and an OUT that is not ours or lies in what is read.
    """
    _refuse_overlap(out, [src, Path(config.tokenizer)])
    probe = None if config.probe is None else _probe_text(config.probe)
    images = open_image_tokenizer(config.tokenizer, image_size=config.image_size)
    say(f"reading {src}")
    language_model, tokenizer = open_language_model(src)
    _refuse_unmarked(tokenizer, src)
    model = widen(language_model, tokenizer, images, config.widening)
    if probe is not None and language_model.config.model_type == "qwen3":
        raise UserError(f"{src} has a QK-norm of its own, which is taken as it is: leave --probe out")
    processor = UM3Processor(tokenizer, images, model.config)
    ids = None if probe is None else _probe_ids(probe, processor, path=config.probe)
    report = _report(model, language_model, tokenizer, images)
    if ids is not None:
        report["qk_norm"] |= _matched(model, language_model, ids, path=config.probe)
    del language_model
    say(f"writing {out} (float32, {4 * report['parameters']['after'] / 1e6:,.1f} MB)")
    save_unified(model, folder=out, tokenizer=tokenizer, image_tokenizer=config.tokenizer, step=None)
    record = {"kind": "llama", "source": src.name, "options": asdict(config), **report}
    (out / REPORT_NAME).write_text(
        json.dumps(record, indent=1, default=str, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    for line in report_lines(report):
        say(line)
    say(
        f"all of it is in {out / REPORT_NAME}; {out} has seen no image yet: qlip train um3_1_5b --init {out} "
        "--data.text DOCUMENTS --data.tokens STORE"
    )


def _refuse_overlap(out: Path, sources: list[Path]) -> None:
    for path in sources:
        if not path.exists():
            raise UserError(f"there is nothing at {path}: give a folder on this machine, with all its files")
        inner, outer = out.resolve(), path.resolve()
        if inner == outer or inner in outer.parents or outer in inner.parents:
            raise UserError(f"{out} and {path} lie in each other; choose another OUT")


def _refuse_unmarked(tokenizer: PreTrainedTokenizerBase, src: Path) -> None:
    for name in ("bos_token", "eos_token"):
        if getattr(tokenizer, name) is None:
            raise UserError(
                f"the tokenizer of {src} has no {name}, which begins or ends a sequence: name one of its markers in "
                "tokenizer_config.json (of Qwen3 <|endoftext|> for both)"
            )


def _probe_text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(PROBE_CHARACTERS)
    except UnicodeDecodeError:
        raise UserError(f"--probe {path} is no text in UTF-8: give a plain text file") from None
    except OSError as error:
        raise UserError(f"cannot read --probe {path}: {error.strerror}; give a plain text file") from None


def _probe_ids(text: str, processor: UM3Processor, *, path: Path | None) -> Tensor:
    """(1, s) int64: BOS and the beginning of the text."""
    ids = processor.encode([text])[:PROBE_TOKENS]
    if len(ids) < LEAST_PROBE:
        raise UserError(f"--probe {path} has {len(ids)} tokens: give a text of at least {LEAST_PROBE}")
    return torch.tensor([ids])


def _matched(
    model: UM3ForCausalLM, language_model: PreTrainedModel, ids: Tensor, *, path: Path | None
) -> dict[str, Any]:
    """Match QK-norm on the ids; its weights by layer, and what a token costs before, with weights of one, and then."""
    ids = ids[:, : int(model.config.max_position_embeddings)]
    say(f"matching QK-norm on {ids.shape[1]:,} tokens of {path}")
    measured = ids[:, :MEASURED_TOKENS]
    with torch.inference_mode():
        logits = language_model.eval()(input_ids=measured, use_cache=False).logits.float()
        before = float(F.cross_entropy(logits[0, :-1], measured[0, 1:]))
        with_ones = float(model(input_ids=measured, labels=measured).loss)
        match_qk_norm(model, ids)
        after = float(model(input_ids=measured, labels=measured).loss)
    return {
        "weights": "matched",
        "probe": {"file": None if path is None else path.name, "tokens": ids.shape[1]},
        "layers": [
            {"q": layer.self_attn.q_norm.weight[0].item(), "k": layer.self_attn.k_norm.weight[0].item()}
            for layer in model.model.layers
        ],
        "nats_per_token": {"tokens": measured.shape[1] - 1, "before": before, "ones": with_ones, "matched": after},
    }


def _report(
    model: UM3ForCausalLM, language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, images: ImageTokenizer
) -> dict[str, Any]:
    """Counts and ids, for people and programs."""
    config, vocabulary, given = model.config, model.vocabulary, language_model.config
    markers = tokenizer.convert_ids_to_tokens([vocabulary.image_begin, vocabulary.image_end])
    return {
        "model_type": given.model_type,
        "text_ids": vocabulary.text_size,
        "rows_before": given.vocab_size,
        "visual_ids": vocabulary.visual_size,
        "division": list(vocabulary.division),
        "grid": list(config.grid),
        "image_size": config.image_size,
        "ids_per_picture": vocabulary.image_length,
        "image_begin": {"token": markers[0], "id": vocabulary.image_begin},
        "image_end": {"token": markers[1], "id": vocabulary.image_end},
        "image_tokenizer": {"name": images.name, "encoder_fingerprint": images.encoder_fingerprint},
        "softmax": config.softmax,
        "tied_before": bool(given.tie_word_embeddings),
        "qk_norm": {"weights": "taken" if given.model_type == "qwen3" else "ones"},
        "parameters": {
            "before": sum(parameter.numel() for parameter in language_model.parameters()),
            "after": sum(parameter.numel() for parameter in model.parameters()),
        },
    }


def report_lines(report: dict[str, Any]) -> list[str]:
    """What became of vocabulary, tables, QK-norm and parameters, one line each."""
    begin, end, rows = report["image_begin"], report["image_end"], report["text_ids"] - report["rows_before"]
    added = f", {rows} more than the model had rows" if rows else ""
    bits = " + ".join(map(str, report["division"]))
    columns = " x ".join(map(str, report["grid"]))
    tables = "the table it shared came apart into input and output" if report["tied_before"] else "input and output"
    counts = report["parameters"]
    return [
        f"text        {report['text_ids']:,} ids{added}",
        f"images      {report['visual_ids']:,} ids of {bits} bits; a picture of {report['image_size']} px is {columns} "
        f"tokens, {report['ids_per_picture']} ids between {begin['token']} ({begin['id']}) and {end['token']} "
        f"({end['id']})",
        f"tables      {tables}; new rows are the mean of the text rows",
        f"softmax     {report['softmax']}" + (", of text and images (Eq 6)" if report["softmax"] == "separate" else ""),
        f"QK-norm     {_qk_norm_line(report['qk_norm'])}",
        f"parameters  {counts['before']:,} -> {counts['after']:,}",
    ]


def _qk_norm_line(found: dict[str, Any]) -> str:
    if found["weights"] == "matched":
        nats = found["nats_per_token"]
        return (
            f"matched on {found['probe']['tokens']:,} tokens, of which one costs {nats['matched']:.2f} nats now; "
            f"{nats['before']:.2f} before, {nats['ones']:.2f} with weights of one"
        )
    if found["weights"] == "taken":
        return "the model's own"
    return "weights one: text is continued worse than before until it is trained; --probe TEXT matches them"
