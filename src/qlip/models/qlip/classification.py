"""QLIP's encoder with a linear classifier, for fine-tuning on labelled pictures (with transformers' Trainer, say)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import can_return_tuple

from qlip.models.qlip.configuration import QLIPConfig
from qlip.models.qlip.pretrained import QLIPPreTrainedModel
from qlip.models.qlip.towers import QLIPVisionModel


class QLIPForImageClassification(QLIPPreTrainedModel):
    """`from_pretrained(a QLIP folder, num_labels=10)` takes the encoder and starts a fresh classifier.

    The classifier reads what `config.classifier_pooling` names: `cls`, the CLS state after `post_layernorm`; `mean`,
    the average of the patch states before the quantizer; or `cls+mean`, both (QLIP's Tables 10 and 11).
    """

    base_model_prefix = "vision_model"
    input_modalities = ("image",)
    _keys_to_ignore_on_load_unexpected = [
        *(QLIPPreTrainedModel._keys_to_ignore_on_load_unexpected or ()),
        r"^(text_model|vision_decoder|visual_projection|text_projection)\.|^logit_scale$",
    ]
    _parts = ("vision_model", "classifier")
    _may_be_fresh = ("classifier.",)

    def __init__(self, config: QLIPConfig) -> None:
        super().__init__(config)
        self.vision_model = QLIPVisionModel(config.vision_config)
        parts = config.classifier_pooling.count("+") + 1
        self.classifier = nn.Linear(parts * config.vision_config.hidden_size, config.num_labels)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The patch convolution."""
        return self.vision_model.get_input_embeddings()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        *,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: object,
    ) -> ImageClassifierOutput:
        """(b, 3, S, S) -> `logits` (b, num_labels), and `loss` by `config.problem_type` when there are `labels`."""
        if output_hidden_states is None and self.config.output_hidden_states:
            output_hidden_states = True
        vision = self.vision_model(
            pixel_values,
            output_hidden_states=output_hidden_states,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )
        features = {"cls": vision.pooler_output, "mean": vision.pre_quant.mean(dim=1)}
        logits = self.classifier(torch.cat([features[name] for name in self.config.classifier_pooling.split("+")], -1))
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=vision.hidden_states)
