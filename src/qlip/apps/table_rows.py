"""The paper's rows of Tables 2, 3, 10 and 14 as data, printed figures as printed (arXiv 2502.05178).

Figures are strings with the paper's digits, empty where the paper has none. The training data of an encoder without
decoder are given with the first of its name there; later ones of that name carry them on.
"""

from __future__ import annotations

from typing import NamedTuple

MARKS = {
    "+": "reproduced by the paper's authors",
    "#": "latents are 16-bit floats, not bits of a discrete code",
    "&": "residual quantization: bits times depth",
}


class PaperRow(NamedTuple):
    """A line of Tables 2 and 14: per cent for ZS, dB for PSNR."""

    name: str
    data: str
    params: str
    """Encoder + decoder + quantizer; the encoder alone where it has no decoder."""
    bits: str = ""
    """Per token."""
    ratio: str = ""
    """24-bit pixels over the code."""
    zero_shot: str = ""
    rfid: str = ""
    psnr: str = ""
    ssim: str = ""
    mark: str = ""
    """Of the name: `+`."""
    bits_mark: str = ""
    """`#` or `&`."""
    family: str = "tokenizers without text"
    """For Figure 1."""


ENCODERS = "encoders without decoder"
ALIGNED = "tokenizers aligned with text"
QLIP = "QLIP (paper)"


def _encoder(name: str, data: str, params: str, zero_shot: str, *, mark: str = "") -> PaperRow:
    return PaperRow(name, data, params, zero_shot=zero_shot, mark=mark, family=ENCODERS)


TOKENIZERS: dict[str, tuple[PaperRow, ...]] = {
    "base": (
        _encoder("CLIP-B", "WIT-400M", "87M", "68.3"),
        _encoder("EVA-CLIP-B", "Merged-2B", "87M", "74.7"),
        _encoder("SigLIP-B", "WL-10B", "87M", "76.7"),
        _encoder("OpenCLIP-B", "DC-1B", "87M", "73.5"),
        PaperRow("VQGAN", "IN-1k", "29M+42M+4M", "14", "438.8", rfid="4.98"),
        PaperRow("MaskGIT", "IN-1k", "24M+30M+6k", "10", "614.4", rfid="1.98", psnr="18.63", ssim=".4619"),
        PaperRow("MoVQGAN", "IN-1k", "82.7M", "40", "153.6", "", "1.12", "22.42", ".6731", bits_mark="&"),
        PaperRow("RQ-VAE/f32", "IN-1k", "", "112", "219.4", rfid="2.69", bits_mark="&"),
        PaperRow("Open-MAGVIT2", "IN-1k", "25M+40M+18k", "18", rfid="1.53", psnr="21.53"),
        PaperRow("BSQ-ViT", "DC-1B", "87M+87M+1M", "28", "219.4", "", "3.81", "24.12", ".6638", mark="+"),
        PaperRow("QLIP-B (16)", "DC-1B", "87M+87M+1M", "28", "219.4", "74.3", "3.21", "23.16", ".6286", family=QLIP),
    ),
    "base, smaller patch": (
        _encoder("SigLIP-B (smaller patch)", "WL-10B", "87M", "79.2"),
        _encoder("EVA-CLIP-B (smaller patch)", "DC-1B", "87M", "77.2", mark="+"),
        PaperRow("DALL-E dVAE", "CC3M+YF", "54M+44M+0", "13", "118.2", "", "32.63", "27.31", ".7943"),
        PaperRow("ViT-VQGAN", "IN-1k", "91M+91M+.5M", "13", "118.2", rfid="1.55"),
        PaperRow("SD-VAE 1.x", "OI-2M", "34M+49M+0", "14", "109.7", "", "1.40", "23.65", ".6354"),
        PaperRow("SD-VAE 2.x", "OI-2M+LA-ae", "34M+49M+0", "64", "24", "", "0.70", "26.90", ".7592", bits_mark="#"),
        PaperRow("SDXL-VAE", "OI-2M+LA-ae++", "34M+49M+0", "64", "24", "", "0.67", "27.37", ".7814", bits_mark="#"),
        PaperRow("SBER-MoVQGAN", "LAHR-166M", "29M+42M+4M", "14", "109.7", "", "0.96", "26.45", ".7250"),
        PaperRow("BSQ-ViT (8)", "IN-1k", "87M+87M+28k", "18", "85.3", "", "0.99", "27.78", ".8171"),
        PaperRow("QLIP-B (8)", "DC-1B", "87M+87M+1M", "28", "54.8", "75.6", "0.70", "26.79", ".7905", family=QLIP),
    ),
    "large": (
        _encoder("CLIP-L/f14", "WIT-400M", "304M", "75.5"),
        _encoder("SigLIP-L", "WL-10B", "304M", "80.5"),
        _encoder("OpenCLIP-L", "DC-1B", "304M", "79.2"),
        _encoder("EVA-CLIP-L", "Merged-2B", "304M", "79.8"),
        PaperRow("Open-MAGVIT2 (large)", "IN-1k", "50M+65M+18k", "18", "85.3", rfid="1.17", psnr="21.90"),
        PaperRow(
            *("VILA-U", "WL-10B+CY-1B", "316M+42M+134M", "56", "27.4", "73.3", "1.80"), bits_mark="&", family=ALIGNED
        ),
    ),
    "large, high resolution": (
        _encoder("CLIP-L/f14 (high res)", "WIT-400M", "304M", "76.6"),
        _encoder("SigLIP-L (high res)", "WL-10B", "304M", "82.1"),
        _encoder("EVA-CLIP-L (high res)", "Merged-2B", "304M", "80.4"),
        PaperRow(
            *("VILA-U (SO400M, high res)", "WL-10B+CY-1B", "428M+42M+537M", "224", "21", "78.0", "1.25"),
            bits_mark="&",
            family=ALIGNED,
        ),
        PaperRow(
            "QLIP-L (14, 392)", "DC-1B", "304M+304M+2M", "28", "168", "79.1", "1.46", "25.36", ".6903", family=QLIP
        ),
    ),
}

TOKENIZER_NOTES = (
    "The paper states neither its prompts nor its resize filter; its rows are as printed in its Tables 2 and 14 "
    "(RQ-VAE/f32 stands in 2 alone, Open-MAGVIT2 of 25M+40M+18k in 14 alone).",
    "Ratio is 24 bits times the pixels of a patch over the bits of a token. By it the paper's 54.8 and 438.8 are "
    "truncated (54.86, 438.86), VILA-U's 27.4 would be 109.7 (16 x 16 x 4 codes of 14 bits at 256 pixels), and "
    "Open-MAGVIT2's 85.3 would be 341.3 (16 x 16 pixels a token).",
)


class Variant(NamedTuple):
    """A column of Table 3: per cent for ZS, dB for PSNR."""

    part: str
    """`a`, `b` or `c`."""
    name: str
    zero_shot: str
    rfid: str
    psnr: str


ABLATIONS = (
    Variant("a", "1:0", "75.7", "367.8", "11.7"),
    Variant("a", "1:1", "75.1", "162.6", "17.8"),
    Variant("a", "1:1e2", "74.7", "41.7", "22.5"),
    Variant("a", "1:1e3 (default)", "74.3", "35.3", "24.5"),
    Variant("a", "1:1e4", "35.4", "35.6", "24.5"),
    Variant("a", "0:1", "0.1", "35.7", "24.5"),
    Variant("b", "none", "26.4", "35.0", "24.8"),
    Variant("b", "MIM (default)", "74.3", "35.3", "24.5"),
    Variant("b", "CLIP", "74.7", "41.7", "23.9"),
    Variant("c", "1: stage 1", "74.3", "35.3", "24.49"),
    Variant("c", "1: stage 2 (default)", "74.3", "3.21", "23.16"),
    Variant("c", "1: stage 2 on IN-1k", "74.3", "2.90", "23.33"),
    Variant("c", "2: stage 1 without Q", "75.0", "17.2", "26.72"),
    Variant("c", "2: then Q, finetune G", "75.0", "13.7", "23.34"),
)
ABLATION_PARTS = {
    "a": "Table 3a: balancing of the losses, alignment : reconstruction",
    "b": "Table 3b: start of the visual encoder",
    "c": "Table 3c: training recipes",
}
ABLATION_NOTES = {
    "a": "The paper's columns are ViT-B/16 after 2B samples.",
    "b": "3b's CLIP repeats ZS and rFID of 3a's 1:1e2 exactly, with another PSNR: perhaps a slip of the paper.",
    "c": "The paper gives one ZS per recipe of 3c.",
}


class Probe(NamedTuple):
    """A column of Table 10, in per cent."""

    name: str
    position: str
    """`cls`, `mean`, `cls+mean`; empty where the paper has none."""
    accuracy: str
    mark: str = ""


PROBES = (
    Probe("VQ-VAE", "", "18.4"),
    Probe("LQAE", "", "39.7"),
    Probe("EVA-CLIP-B", "cls", "82.7"),
    Probe("BSQ-ViT", "cls", "29.3", "+"),
    Probe("BSQ-ViT", "mean", "25.4", "+"),
    Probe("QLIP-B", "cls", "81.8"),
    Probe("QLIP-B", "mean", "77.7"),
    Probe("QLIP-B", "cls+mean", "82.1"),
    Probe("EVA-CLIP-L", "cls", "86.3"),
    Probe("QLIP-L", "cls", "85.2"),
)
PROBE_NOTES = (
    "Position mean is the paper's ft: patch features before the quantizer, averaged. VQ-VAE and LQAE are copied by the "
    "paper from theirs.",
)
