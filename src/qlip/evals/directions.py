"""Which way each figure is better, and which figures are in a unit of the model's own."""

from __future__ import annotations

HIGHER = (
    *("psnr", "ssim", "bit_entropy", "balanced_bits", "distinct_token_share"),
    *("top1", "top5", "top1_seen_pairs", "top1_unseen_pairs", "colour_top1", "shape_top1", "mean_class"),
    *("clip_cosine", "clipscore", "overall"),
    *("single_object", "two_object", "counting", "colors", "position", "color_attr"),
    *("accuracy", "precision", "recall", "f1", "vqa_accuracy", "answered"),
    *("meteor", "rouge_l", "cider", "parsed", "objects", "colours", "counts", "all", "continued"),
)
HIGHER_FAMILIES = (
    "bleu_",
    "image_to_text_",
    "text_to_image_",
    "linear_",
    "knn_",
    "accuracy_",
    "precision_",
    "recall_",
    "f1_",
)
LOWER = (
    *("rfid", "gfid", "lpips_alex", "lpips_vgg", "encoder_distance", "fd_encoder", "fd_clip"),
    *("perplexity", "bits_per_byte"),
)
ENCODER = ("encoder_fingerprint", "other encoder")
TOKENIZER = ("text_tokens_sha256", "other tokenizer")
SOFTMAX = ("softmax", "other softmax")
OWN = {
    "encoder_distance": (ENCODER,),
    "fd_encoder": (ENCODER,),
    "perplexity": (TOKENIZER, SOFTMAX),
    "bits_per_byte": (SOFTMAX,),
}
"""Measured in units of the model's own: the card's keys that say which, and the words where they differ. A separate
softmax is told that the next id is text, a joint one has to say so: their likelihoods are not of one event."""


def direction(figure: str) -> str:
    """`higher` or `lower`, whichever is better; empty for a figure of which neither is."""
    if figure in LOWER:
        return "lower"
    return "higher" if figure in HIGHER or figure.startswith(HIGHER_FAMILIES) else ""
