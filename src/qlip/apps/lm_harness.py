"""`qlip_um3` of lm-evaluation-harness: the text of a UM3, scored and continued as it was trained, without pictures.

    python -m qlip.apps.lm_harness --model qlip_um3 --model_args pretrained=FOLDER --tasks arc_challenge,hellaswag,piqa

takes what `lm_eval` takes. Interface of lm_eval 0.4.13, which has no plug-ins: this command makes the model known, then
hands over; later releases find it by our entry point (group `lm_eval.models`). `--model hf` is for processes that have
imported `qlip.models`; it needs `add_bos_token=True` where the tokenizer itself puts no BOS before texts.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from qlip.core.errors import UserError, last_line, nearest_name
from qlip.engine.parallel import pick_device
from qlip.models.unified_model import Unified, open_unified

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    problem = f"lm-evaluation-harness is not there ({error}): pip install 'qlip[eval]'"
    if __name__ == "__main__":
        print(f"qlip: {problem}", file=sys.stderr)
        raise SystemExit(2) from None
    raise UserError(problem) from None

LM_MODEL = "qlip_um3"
"""Our name in the harness."""
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HARNESS_DEVICE = "cuda:0"
"""What the harness asks for where a user names no device."""
OPTIONS = ("pretrained", "batch_size", "max_batch_size", "device", "dtype", "max_length")


class UnifiedHarness(HFLM):
    """A UM3's folder, as the harness asks it; all that the harness does with a language model stays its own.

    A text is scored behind BOS, as documents are trained; markers in it are plain characters. Probabilities are those
    of the softmax over text (Eq 6), in float32. No picture is ever begun.
    """

    def __init__(
        self,
        pretrained: str = "",
        *,
        batch_size: int | str = 1,
        max_batch_size: int = 64,
        device: str = "auto",
        dtype: str = "auto",
        max_length: int | None = None,
        **unknown: Any,
    ) -> None:
        """Called by the harness with the pairs of `--model_args` and with `--batch_size` and `--device`.

        pretrained: the folder that a run exported. dtype: what it computes in, that of its weights if not given.
        max_length: ids of a sequence at most, all of the context if not given. Raises `UserError` for other options and
        for folders that hold no UM3.
        """
        if unknown:
            name = next(iter(unknown))
            raise UserError(f"model_args has {name}, which {LM_MODEL} does not take: {nearest_name(name, OPTIONS)}")
        if not pretrained:
            raise UserError("no model given: add --model_args pretrained=FOLDER, an export of a unified model")
        if dtype not in DTYPES:
            raise UserError(f"dtype {dtype!r} is unknown: {nearest_name(str(dtype), DTYPES)}")
        self.unified: Unified = open_unified(str(pretrained))
        context = self.unified.context_length
        if max_length is not None and not 2 <= max_length <= context:
            raise UserError(f"max_length is {max_length}: give a number from 2 to {context}, the model's context")
        self._bos: list[int] = self.unified.processor.encode([])
        super().__init__(
            str(pretrained),
            backend="causal",
            device=str(pick_device("auto" if device == HARNESS_DEVICE else str(device))),
            dtype=dtype,
            softmax_dtype="float32",  # bfloat16 logarithms of many tokens would add up to errors that change answers
            batch_size=batch_size,
            max_batch_size=max_batch_size,
            max_length=max_length,
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
    ) -> list[int]:
        """Ids of a text without BOS, whatever is asked for: it is put before whole sequences alone."""
        return self.unified.processor.encode_text(string)[-(left_truncate_len or 0) :]

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Texts to be continued -> ids and mask (b, s), padded on the left; BOS and the last ids of longer ones."""
        room = max(1, (left_truncate_len or self.max_length) - len(self._bos))
        return self.unified.processor.padded([[*self._bos, *self.tok_encode(string)[-room:]] for string in strings])

    def get_model_info(self) -> dict[str, Any]:
        """What results say of the model: its fingerprints; the harness itself would ask the hub for the folder."""
        identity = self.unified.identity()
        info = {"model_num_parameters": identity["parameters"]["unified"], "model_dtype": identity["dtype"]}
        return info | {"model_revision": "", "model_sha": identity["model_fingerprint"], "qlip": identity}

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        before, behind = super()._encode_pair(context, continuation)
        return self._bos + before, behind

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        with torch.inference_mode():
            return super()._model_generate(context, max_length, stop, images=False, **options)

    # --- what the harness's constructor calls -----------------------------------------------------------------------

    def _get_config(self, pretrained: str, **_: Any) -> None:
        self._config = self.unified.model.config

    def _create_tokenizer(self, *_: Any, **__: Any) -> None:
        self.tokenizer = self.unified.processor.tokenizer

    def _create_model(self, pretrained: str, *, dtype: str, **_: Any) -> None:
        self.unified.to(self._device, dtype=DTYPES[dtype])
        self._model = self.unified.model


def register() -> None:
    """Make `qlip_um3` known to the harness in this process, if no entry point has."""
    import lm_eval.models  # noqa: F401  # fills the registry, which an entry of ours would otherwise keep empty

    if LM_MODEL not in model_registry:
        model_registry.register(LM_MODEL, target=f"qlip.apps.lm_harness:{UnifiedHarness.__name__}")


def main() -> None:
    """`lm_eval` with our model; mistakes that a user can mend are one line and exit code 2."""
    register()
    try:
        cli_evaluate()
    except UserError as error:
        print(f"qlip: {last_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
