"""VQ and KL autoencoders of diffusers as evaluations see them, from local folders.

Shapes: `b` pictures, `S` their side, `h` and `w` the latent grid, `n` = hw tokens, `d` numbers of a latent, `L` bits.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import normalize

from qlip.core.errors import UserError
from qlip.models.baselines import MINUS_ONE_TO_ONE, identity_of, read_config, whole_model
from qlip.models.measured import Ability, Reconstructed, sha256_of_json
from qlip.models.qlip.pretrained import one_line
from qlip.models.qlip.weight_files import read_headers, shown
from qlip.quantizers.ids import bits_to_ids, ids_to_bits

AUTOENCODERS = ("VQModel", "AutoencoderKL")
WEIGHTS = "diffusion_pytorch_model.safetensors"
PIXELS_AT_ONCE = 2**20
"""Pictures go through in groups of so many pixels, 16 of side 256: the first and last layers keep their full size."""
LATENT_BITS = 16
"""What a number of a continuous latent is rounded to and counted as: bfloat16, as the paper's Table 2 counts them."""


class MeasuredAutoencoder:
    """diffusers' VQModel or AutoencoderKL, or LlamaGen's VQGAN, which the former computes (`llamagen.py`).

    A VQ code is its indices, written with ceil(log2 K) bits of K codes; `bits_per_token` is log2 K. A KL latent is the
    mean of its posterior, rounded to the 16 bits a number that `bits_per_token` counts (`latent_bits` on the card).
    """

    image_size = 0

    def __init__(
        self,
        model: Any,
        *,
        name: str = "",
        source_family: str = "diffusers",
        unit_codes: bool = False,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """`name` if it is not the class's; `unit_codes`: latents are brought to norm 1 before the nearest code is
        sought; `facts` go onto the card."""
        self.model, self.unit_codes, self.name = model, unit_codes, name or type(model).__name__
        self.patch_size = 2 ** (len(model.config.block_out_channels) - 1)
        self.abilities: frozenset[Ability] = frozenset(("reconstruct",))
        parts = {"encoder": ("encoder", "quant_conv"), "decoder": ("decoder", "post_quant_conv")}
        self._identity = identity_of(model, source_family=source_family, parts=parts | {"quantizer": ("quantize",)})
        config = {name: value for name, value in model.config.items() if not name.startswith("_")}
        self._identity |= {"config_sha256": sha256_of_json(config), "unit_codes": unit_codes}
        self._identity |= facts or {}
        self.num_bits = 0
        if hasattr(model, "quantize"):
            num_codes = model.quantize.embedding.num_embeddings
            self.num_bits = (num_codes - 1).bit_length()
            self.bits_per_token: float | None = math.log2(num_codes)
        else:
            self.bits_per_token = float(model.config.latent_channels * LATENT_BITS)
            self._identity["latent_bits"] = LATENT_BITS

    def identity(self) -> dict[str, Any]:
        """Fingerprint of all weights, dtype, sizes, and where the model comes from."""
        return dict(self._identity)

    def to(self, device: torch.device) -> None:
        """Move it there."""
        self.model.to(device)

    def reconstruct(self, pictures: Tensor) -> Reconstructed:
        """Encode, quantize, decode. Raises `UserError` for a side that is no multiple of `patch_size`."""
        side = pictures.shape[-1]
        if side % self.patch_size:
            raise UserError(
                f"a {self.name} takes sides that are a multiple of {self.patch_size}, not {side}: use another protocol"
            )
        at_once = max(1, PIXELS_AT_ONCE // side**2)
        parts = [self._through_code(part) for part in pictures.split(at_once)]
        ids = torch.cat([ids for _, ids in parts]) if self.num_bits else None  # (b, n)
        return Reconstructed(
            unit_pixels=MINUS_ONE_TO_ONE.to_unit(torch.cat([values for values, _ in parts])),
            bits=None if ids is None else ids_to_bits(ids, self.num_bits),
        )

    def image_embeds(self, pictures: Tensor) -> Tensor:
        """Raises `UserError`: there is no text side to compare with."""
        raise UserError(f"{self.name} was not trained with text: measure that on a QLIP, CLIP or SigLIP model")

    def text_embeds(self, texts: list[str]) -> Tensor:
        """Raises `UserError`: there is no text side."""
        raise UserError(f"{self.name} has no text tower: measure that on a QLIP, CLIP or SigLIP model")

    def features(self, pictures: Tensor) -> dict[str, Tensor]:
        """Raises `UserError`: there is no state that stands for the picture."""
        raise UserError(f"{self.name} gives no features: probe a QLIP, CLIP or SigLIP model")

    def _through_code(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """(b, 3, S, S) uint8 -> values in [-1, 1] of the same shape, and ids (b, n), of which a KL latent has none."""
        model = self.model
        if not self.num_bits:
            encoded = model.encode(MINUS_ONE_TO_ONE.from_uint8(pictures, dtype=model.dtype))
            latents = encoded.latent_dist.mode().to(torch.bfloat16)
            return model.decode(latents.to(model.dtype)).sample, latents.new_empty(0)
        ids = self._ids(pictures)
        side = pictures.shape[-1] // self.patch_size
        return self._decoded(ids, grid=(side, side)), ids

    def _ids(self, pictures: Tensor) -> Tensor:
        """(b, 3, S, S) uint8 -> (b, n) int64 indices of the nearest codes."""
        model = self.model
        latents = model.encode(MINUS_ONE_TO_ONE.from_uint8(pictures, dtype=model.dtype)).latents  # (b, d, h, w)
        if self.unit_codes:
            latents = normalize(latents, dim=1)
        # one picture at a time: the distances of b pictures to all codes would be the largest tensor by far
        return torch.stack([model.quantize(latent)[2][2].flatten() for latent in latents.split(1)])

    def _decoded(self, ids: Tensor, *, grid: tuple[int, int]) -> Tensor:
        """(b, n) int64 -> (b, 3, S, S) in [-1, 1]."""
        model = self.model
        codes = rearrange(model.quantize.embedding(ids), "b (h w) d -> b d h w", h=grid[0])
        norm_input = codes if model.config.norm_type == "spatial" else None
        return model.decoder(model.post_quant_conv(codes), norm_input)

    def encode_bits(self, pictures: Tensor) -> Tensor:
        """(b, 3, S, S) uint8 -> (b, n, L) bool of a VQ model."""
        return ids_to_bits(self._ids(pictures), self.num_bits)

    def decode_bits(self, bits: Tensor, *, grid: tuple[int, int]) -> Tensor:
        """(b, n, L) bool -> (b, 3, S, S) unit pixels, not clamped, of a VQ model whose codes L bits count."""
        return MINUS_ONE_TO_ONE.to_unit(self._decoded(bits_to_ids(bits), grid=grid))


def open_autoencoder(folder: Path) -> MeasuredAutoencoder:
    """A VQModel or AutoencoderKL of diffusers from a local folder, in float32.

    Raises `UserError` for weights or fields of config.json that do not belong to it, and without diffusers.
    """
    config = read_config(folder)
    model_class = getattr(import_diffusers(), config["_class_name"])
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise UserError(f"{folder} has no {WEIGHTS}; download that file into it")
    known = inspect.signature(model_class.__init__).parameters
    unknown = sorted(name for name in config if name not in known and not name.startswith("_"))
    if unknown:
        raise UserError(f"{folder}: diffusers here does not know {shown(unknown[0])} of config.json; upgrade diffusers")
    read_headers([weights])
    model = whole_model(
        folder,
        lambda: model_class.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        ),
    )
    if (model.config.in_channels, model.config.out_channels) != (3, 3):
        raise UserError(f"{folder}: config.json is not that of RGB pictures; take another model")
    return MeasuredAutoencoder(model)


def import_diffusers() -> Any:
    """The diffusers package, silent but for errors. Raises `UserError` when it is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise UserError(f"this model needs diffusers ({one_line(error)}): pip install 'qlip[baselines]'") from None
    diffusers.utils.logging.set_verbosity_error()
    return diffusers
