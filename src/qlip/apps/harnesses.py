"""What evaluation harnesses find through qlip's entry points; importing it imports neither torch nor a harness.

lmms-eval --model qlip_llava --model_args pretrained=FOLDER --tasks pope

lm-eval's entry point names its class itself (`lm_harness.py`), since that harness imports it when a user names it.
"""

from __future__ import annotations

from typing import Any

LMMS_MODEL = "qlip_llava"
"""Name of our assistants in lmms-eval."""


def lmms_models() -> Any:
    """What lmms-eval asks the entry point of group `lmms_eval.models` for: where the class of `qlip_llava` is.

    Interface of lmms-eval 0.7.3. A plug-in that fails there hides those after it, so the class itself is imported
    only when a user names it.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=LMMS_MODEL, chat_class_path="qlip.apps.lmms_assistant.LmmsAssistant")
