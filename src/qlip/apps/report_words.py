"""What the report says about each figure and each training term: unit, better direction, one plain sentence."""

from __future__ import annotations

import math
from typing import NamedTuple


class Words(NamedTuple):
    """How to show one figure."""

    unit: str
    """`share` is shown in per cent; `dB`, `nats` and others stand behind the number."""
    better: str
    """`higher`, `lower`, or empty where neither is better."""
    meaning: str
    """One plain sentence."""


FIGURES = {
    "psnr": Words("dB", "higher", "Pixel error of the reconstructions; 3 dB more is half the squared error."),
    "ssim": Words("", "higher", "Structural similarity: local contrast and edges; 1 is identical."),
    "encoder_distance": Words(
        "", "lower", "Distance of original and reconstruction in this model's own encoder, 0 to 4."
    ),
    "fd_encoder": Words(
        "", "lower", "Frechet distance of both sets of pictures in this model's own encoder; not rFID."
    ),
    "bit_entropy": Words("nats", "higher", "How evenly a bit is used, averaged over the bits; ln 2 = 0.693 is even."),
    "bit_entropy_max": Words("nats", "", "The most a bit can hold: ln 2."),
    "balanced_bits": Words("share", "higher", "Share of bits that hold more than nine tenths of that maximum."),
    "distinct_token_share": Words("share", "higher", "Different tokens among all tokens of the test pictures."),
    "bits_per_pixel": Words("", "", "Size of the code: bits of a token over pixels of a patch."),
    "compression_ratio": Words("times", "", "24-bit pixels over the size of the code."),
    "top1": Words("share", "higher", "Right colour and shape among all pairs, from the class names alone."),
    "top5": Words("share", "higher", "The right pair is among the five most probable."),
    "top1_seen_pairs": Words("share", "higher", "As top1, on pairs of colour and shape that training showed."),
    "top1_unseen_pairs": Words("share", "higher", "As top1, on pairs that training never showed together."),
    "colour_top1": Words("share", "higher", "Right colour among the colour names."),
    "shape_top1": Words("share", "higher", "Right shape among the shape names."),
    "mean_class": Words("share", "higher", "Accuracy of each class, averaged over the classes."),
    "rfid": Words("", "lower", "Frechet distance of both sets of pictures over Inception features."),
    "lpips_alex": Words("", "lower", "LPIPS 0.1 over AlexNet: perceptual distance learned from human judgements."),
    "lpips_vgg": Words("", "lower", "LPIPS 0.1 over VGG-16."),
    "gfid": Words("", "lower", "Frechet distance of generated and real pictures over Inception features."),
    "fd_clip": Words("", "lower", "Frechet distance of generated and real pictures over features of CLIP; not FID."),
    "clip_cosine": Words("", "higher", "Cosine of picture and caption in CLIP; another caption's stands beside it."),
    "clipscore": Words("", "higher", "2.5 times that cosine, at least 0."),
    "overall": Words("share", "higher", "Mean of the six categories, as GenEval's."),
    "single_object": Words("share", "higher", "Pictures that show the object of the prompt."),
    "two_object": Words("share", "higher", "Pictures that show both objects of the prompt."),
    "counting": Words("share", "higher", "Pictures that show as many objects as the prompt says, no more."),
    "colors": Words("share", "higher", "Pictures that show the object in the colour of the prompt."),
    "position": Words("share", "higher", "Pictures whose objects lie to each other as the prompt says."),
    "color_attr": Words("share", "higher", "Pictures that show both objects, each in its own colour."),
    **{
        f"accuracy_{kind}": Words("share", "higher", f"Questions {said} answered exactly, words and numbers alike.")
        for kind, said in (
            ("existence", "whether something is there"),
            ("colour", "about a colour"),
            ("count", "how many there are"),
            ("position", "where something is"),
        )
    },
    "accuracy_mean_of_kinds": Words("share", "higher", "Mean of these accuracies: every kind weighs the same."),
    "accuracy_all_questions": Words("share", "higher", "Share of all questions that are answered exactly."),
    "yes_share_existence": Words("share", "", "How often the answer is yes, whatever is there."),
    "true_yes_share_existence": Words("share", "", "How often yes would be right."),
    "vqa_accuracy": Words("share", "higher", "Agreement with people's answers as VQA counts it."),
    "answered": Words("share", "higher", "Answers that are not empty; they are scored elsewhere."),
    **{
        f"{figure}{suffix}": Words("share", better, f"{said}{where}.")
        for figure, better, said in (
            ("accuracy", "higher", "POPE: yes and no that are right"),
            ("precision", "higher", "POPE: things said to be there that are"),
            ("recall", "higher", "POPE: things there that are said to be"),
            ("f1", "higher", "POPE: harmonic mean of precision and recall"),
            ("yes_share", "", "POPE: answers that are yes"),
        )
        for suffix, where in (
            ("", ""),
            ("_random", ", absent things drawn at random"),
            ("_popular", ", absent things that are frequent elsewhere"),
            ("_adversarial", ", absent things that often go with what is there"),
        )
    },
    **{
        f"bleu_{n}": Words("of 100", "higher", f"Runs of up to {n} words that people's captions of the picture have.")
        for n in (1, 2, 3, 4)
    },
    "meteor": Words("of 100", "higher", "Words that people's captions have, synonyms and stems too, in their order."),
    "rouge_l": Words("of 100", "higher", "Longest common run of words with a person's caption, gaps allowed."),
    "cider": Words("of 1000", "higher", "Runs of words shared with people's captions; rare ones weigh more."),
    "parsed": Words("share", "higher", "Captions that are in the language of scenes at all."),
    "objects": Words("share", "higher", "Captions that name all shapes of the scene, and no others."),
    "colours": Words("share", "higher", "Captions that name all shapes, each in its colour."),
    "counts": Words("share", "higher", "Captions that name as many objects as there are."),
    "all": Words("share", "higher", "Captions that say all there is, rightly: sizes, places and background too."),
    "perplexity": Words("", "lower", "Tokens of a story between which the model is as if undecided; 1 is certain."),
    "bits_per_byte": Words(
        "bits", "lower", "What a byte of the stories costs: comparable between tokenizers, within one kind of softmax."
    ),
    "continued": Words("share", "higher", "Stories whose hero has its right colour in the model's own last sentence."),
    "f1_mean": Words("share", "higher", "Mean F1 over POPE's three categories, as LLaVA-1.5 reports it."),
    **{
        f"{kind}_{position}": Words("share", "higher", f"{said} {where}.")
        for kind, said in (
            ("linear", "Right answers of a linear classifier on"),
            ("linear_top5", "The right answer is among the five best of a linear classifier on"),
            ("knn", "Right answers of the twenty nearest training pictures by"),
        )
        for position, where in (
            ("cls", "the pooled CLS state"),
            ("mean", "the mean of the patch states before the quantizer"),
            ("cls+mean", "both side by side"),
        )
    },
}

TERMS = {
    "loss": Words("weighted sum", "", "What the optimizer lowers: the sum of the terms below."),
    "contrastive_loss": Words("nats", "", "Picks the right caption in the batch for each picture, and back."),
    "pixel_loss": Words("weighted", "", "Squared pixel error, times its weight."),
    "quantizer_loss": Words("weighted", "", "Confident bits minus balanced bits (Eq 1); falls below zero."),
    "commitment_loss": Words("weighted", "", "How far the latents lie from their codes."),
    "perceptual_loss": Words("weighted", "", "Distance in the frozen encoder or LPIPS, times its weight."),
    "generator_loss": Words("weighted", "", "Rises when the discriminator sees through the reconstructions."),
    "discriminator_loss": Words("nats", "", "ln 2 = 0.693 when it cannot tell original from reconstruction."),
    "r1_loss": Words("weighted", "", "Keeps the discriminator smooth; measured every few steps."),
    "contrastive": Words("nats", "", "The contrastive term before its weight."),
    "mse": Words("squared error", "", "Squared error of pixels in [0, 1]."),
    "encoder": Words("distance", "", "Distance in the frozen stage-1 encoder, before its weight."),
    "lpips": Words("distance", "", "LPIPS, before its weight."),
    "logit_scale": Words("factor", "", "Inverse temperature of the contrastive softmax, at most 100."),
    "sample_entropy": Words("nats", "", "Doubt within one token, all bits together: falls as bits get confident."),
    "codebook_entropy": Words("nats", "", "Spread over all tokens, all bits together: high when bits are balanced."),
    "bit_entropy": Words("nats per bit", "", "Balance of the hard bits; 0.693 is perfect."),
    "bits_alive": Words("share", "", "Bits that are not stuck at one value."),
    "real_logit": Words("logit", "", "What the discriminator says to originals."),
    "fake_logit": Words("logit", "", "What the discriminator says to reconstructions."),
    "grad_norm": Words("norm", "", "Length of the gradient before clipping."),
    "lr_factor": Words("factor", "", "Warm-up and decay of the learning rates."),
    "images_per_second": Words("images / s", "", "Training speed."),
}

UNKNOWN = Words("", "", "")


def figure_words(name: str) -> Words:
    """The words for a figure of an evaluation; empty ones for a figure this page does not know."""
    return FIGURES.get(name, UNKNOWN)


def term_words(term: str) -> Words:
    """The words for a training term, with or without its phase (`decoder/mse`)."""
    return TERMS.get(term.split("/")[-1], UNKNOWN)


def format_figure(name: str, value: float | None) -> str:
    """`psnr 24.3` -> `24.30 dB`, `top1 0.5` -> `50.0 %`; a dash for a figure that could not be measured."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    unit = figure_words(name).unit
    if unit == "share":
        return f"{100 * value:.1f} %"
    if unit == "dB":
        return f"{value:.2f} dB"
    return f"{value:.4g} {unit}".strip()


def format_duration(seconds: float) -> str:
    """Seconds as `4.2 s` or `3 min 05 s`."""
    if seconds < 59.95:  # 59.96 would read 60.0 s
        return f"{seconds:.1f} s"
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60:02d} s"
