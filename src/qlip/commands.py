"""One function per command. Signature and docstring are what `qlip COMMAND --help` shows; the work is in apps/.

Nothing heavy is imported before a command is called: every help answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tyro.conf import Positional


def demo(*, out: Path = Path("runs/demo"), train_scenes: int = 40_000, test_scenes: int = 4_000, seed: int = 0) -> None:
    """Make scenes, train both stages, evaluate, and write OUT/report.html; run it again to resume.

    Example: qlip demo --out runs/demo

    Args:
        out: Folder for data, both run folders, results and the report.
        train_scenes: How many captioned scenes to train on.
        test_scenes: How many held-out scenes to evaluate on.
        seed: Seed of the scenes, the weights and the data order.
    """
    from qlip.apps.demo import run_demo

    run_demo(out, train_scenes=train_scenes, test_scenes=test_scenes, seed=seed)


def data_scenes(
    out: Positional[Path],
    *,
    num: int,
    split: Literal["train", "test"] = "train",
    image_size: int = 64,
    object_counts: tuple[float, float, float, float] = (0.55, 0.15, 0.15, 0.15),
    format: str = "png",
    seed: int = 0,
) -> None:
    """Write captioned scenes as img2dataset shards (tar with image, txt, json; parquet; stats).

    Example: qlip data scenes data/train --num 20000

    Args:
        out: Folder for the shards, 1,000 scenes each; complete shards are kept on a second run.
        num: How many scenes.
        split: train leaves ten colour-shape pairs out, test draws all hundred.
        image_size: Side of the square pictures in pixels.
        object_counts: Probabilities of one, two, three and four objects.
        format: png, jpg or webp.
        seed: Another seed gives other scenes.
    """
    from qlip.data.scene_shards import write_scene_shards
    from qlip.data.scenes import SceneConfig

    config = SceneConfig(image_size=image_size, object_counts=object_counts, seed=seed)
    paths = write_scene_shards(out, num=num, split=split, config=config, image_format=format)
    print(f"{num} scenes in {len(paths)} shards under {out}; look at them with `qlip data inspect {out}`")


def data_conversations(shards: Positional[str], out: Positional[Path], *, captions: bool = False) -> None:
    """Write the questions of scenes as conversations in LLaVA's format, one record a scene.

    Example: qlip data conversations data/train questions.json

    Args:
        shards: Shards of `qlip data scenes`: a folder, PATH/{00000..00009}.tar, or several joined by ::.
        out: The .json file to write; the shards are then its images.
        captions: Write one caption a scene instead, for training a projector alone.
    """
    from qlip.data.scene_conversations import write_scene_conversations

    written = write_scene_conversations(shards, out, captions=captions)
    print(
        f"{written.num_records} conversations of {written.num_turns} answers in {out} ({written.num_skipped} scenes "
        f"skipped); look at them with `qlip data inspect {out} --images {shards}`"
    )


def data_inspect(
    src: Positional[str],
    *,
    limit: int | None = None,
    caption_field: str = "txt",
    images: str = "",
    tokenizer: Path | None = None,
    chat_template: str = "auto",
    sample: int = 0,
    plain: bool = False,
    max_length: int = 2048,
) -> None:
    """Read data as training would and report what is in it, and what would be skipped and why.

    Shards: samples, sizes, captions. A .json or .jsonl of conversations: turns, lengths, missing pictures, and with
    --tokenizer one of them as the language model gets it, what it is supervised on in green.

    Example: qlip data inspect 'PATH/{00000..00009}.tar'

    Args:
        src: A folder, PATH/{00000..00009}.tar, or several joined by ::; local or remote (s3://, https://, hf://). Or
            LLaVA's .json or .jsonl.
        limit: Look at no more than so many samples; of conversations, look for so many pictures (1,000).
        caption_field: Member that holds the caption.
        images: Folder or shards with the pictures of conversations.
        tokenizer: Folder of a language model, or of an assistant that `qlip train` has exported.
        chat_template: auto (the folder's own), a name such as vicuna_v1, or a Jinja file.
        sample: Number of the conversation to show.
        plain: Show it as LLaVA's first stage has it: picture, caption, newline.
        max_length: Tokens of a conversation that training takes.
    """
    if src.endswith((".json", ".jsonl")):
        from qlip.apps.inspect_conversations import InspectSettings, inspect_conversations

        settings = InspectSettings(
            images=images,
            tokenizer=tokenizer,
            chat_template=chat_template,
            sample=sample,
            plain=plain,
            max_length=max_length,
            num_pictures=1000 if limit is None else limit,
        )
        inspect_conversations(src, settings)
        return
    from qlip.data.inspect import format_report, inspect_shards
    from qlip.data.shards import ShardConfig

    config = ShardConfig(shards=src, caption_field=caption_field)
    print(format_report(inspect_shards(src, limit=limit, config=config)))


def reconstruct(
    model: Positional[Path], images: Positional[tuple[Path, ...]], *, out: Path, device: str = "auto"
) -> None:
    """Send pictures through the tokens and back; writes each reconstruction and a sheet of before and after.

    Example: qlip reconstruct runs/demo/stage2/export photo.jpg --out looks

    Args:
        model: Model folder.
        images: Picture files.
        out: Folder for <name>.png and sheet.png.
        device: auto, cpu, cuda, ...
    """
    from qlip.apps.first_look import reconstruct_images

    reconstruct_images(model, list(images), out=out, device=device)


def verify(
    model: Positional[Path],
    images: Positional[tuple[Path, ...]],
    *,
    device: str = "auto",
    batch_sizes: tuple[int, ...] = (2, 8, 32),
    max_images: int = 256,
    compile: bool = True,
    json: Path | None = None,
) -> None:
    """Count the bits that flip between batch sizes, precisions, devices and torch.compile, and show why.

    Example: qlip verify runs/demo/stage2/export photos --max-images 16

    Args:
        model: Model folder.
        images: Picture files, and folders of them at any depth.
        device: auto, cpu, cuda, ...
        batch_sizes: Pictures encoded together; sizes above the number of pictures are left out.
        max_images: Use at most so many pictures, spread evenly over those found.
        compile: Also compare torch.compile, whose compiling takes a minute; --no-compile leaves it out.
        json: Also write counts, margins and the protocol card to this file.
    """
    from qlip.apps.verify import verify_model

    verify_model(
        model,
        images,
        device=device,
        batch_sizes=batch_sizes,
        max_images=max_images,
        compile=compile,
        json=json,
    )


def classify(model: Positional[Path], image: Positional[Path], *, labels: str, device: str = "auto") -> None:
    """Score a picture against labels, most probable first.

    Example: qlip classify runs/demo/stage1/export picture.png --labels "red circle,blue star"

    Args:
        model: Model folder.
        image: Picture file.
        labels: Labels separated by commas.
        device: auto, cpu, cuda, ...
    """
    from qlip.apps.first_look import classify_image

    classify_image(model, image, labels=labels, device=device)


def export(
    src: Positional[Path],
    out: Positional[Path],
    *,
    layout: Literal["qlip", "official", "onnx", "pt2"] = "qlip",
    step: int | None = None,
) -> None:
    """Write a run's newest checkpoint, or a model, as a folder for from_pretrained, the released layout, or graphs.

    Example: qlip export runs/demo/stage1 my_model --layout official

    Args:
        src: Run folder, model folder (ours or released), or hub id.
        out: Folder to write; an earlier export there is replaced.
        layout: qlip, ours; official, that of the released checkpoints; onnx or pt2, encoder and decoder as graphs.
        step: Of a run, take the checkpoint of this step instead of the newest.
    """
    from qlip.apps.export import export_model

    export_model(src, out, layout=layout, step=step)


def import_command(
    kind: Positional[str],
    src: Positional[Path],
    out: Positional[Path],
    *,
    image_size: int | None = None,
    text_from: Path | None = None,
    patch_size: int | None = None,
    head_dim: int | None = None,
    decoder_layers: int | None = None,
    quantizer: Literal["bsq", "none"] | None = None,
    seed: int | None = None,
    tokenizer: str | None = None,
    division: tuple[int, ...] | None = None,
    softmax: Literal["separate", "joint"] | None = None,
    probe: Path | None = None,
) -> None:
    """Start a model from weights of others: EVA-02 or EVA02-CLIP become a tokenizer, Llama 3 or Qwen3 becomes a UM3.

    Example: qlip import eva eva02_B_pt_in21k_p14.pt my_start --text-from EVA02_CLIP_B_psz16_s8B.pt

    Example: qlip import llama Llama-3.2-1B my_um3 --tokenizer QLIP_B_16_256

    Args:
        kind: Whose weights: eva, whose bottleneck and decoder are fresh; or llama, whose vocabulary gets visual ids.
        src: Weight file of eva: .safetensors, or .pt, .pth, .bin (read without running code). Folder of a llama.
        out: Folder to write; an earlier import or export there is replaced.
        image_size: Of eva: side of the new model's pictures in pixels, 256 if not given; positions are resized to it.
            Of llama: side of the pictures, for VQ tokenizers, which take many.
        text_from: Of eva: take the text side from this EVA02-CLIP or CLIP file instead.
        patch_size: Of eva: side of its patches in pixels, 16 if not given; the patch kernel is resized to it.
        head_dim: Of eva: width of one attention head of the imported towers, which files do not tell; 64 if not given.
        decoder_layers: Of eva: blocks of the fresh decoder; as many as the encoder's if not given.
        quantizer: Of eva: bsq, or none for a model whose decoder sees the encoder's states (recipe 2 of Table 3c); bsq
            if not given.
        seed: Of eva: seed of the fresh weights; 0 if not given.
        tokenizer: Of llama: the image tokenizer whose tokens it shall write, a QLIP folder; a copy goes into OUT.
        division: Of llama: bits of each id of a token, such as 14 14; few of at most 14 bits if not given.
        softmax: Of llama: one softmax for each modality (separate, Eq 6), or joint; separate if not given.
        probe: Of llama: a text file, on whose beginning the weights of QK-norm are matched to what queries and keys
            have; they are one if not given, which a short training mends too.
    """
    from qlip.apps.import_weights import import_eva_weights, options_of
    from qlip.core.errors import UserError

    eva = {
        **{"image_size": image_size, "patch_size": patch_size, "head_dim": head_dim},
        **{"decoder_layers": decoder_layers, "quantizer": quantizer, "seed": seed, "text_from": text_from},
    }
    llama = {
        **{"tokenizer": tokenizer, "image_size": image_size, "probe": probe},
        **{"division": division, "softmax": softmax},
    }
    given = options_of(kind, {"eva": eva, "llama": llama})
    if kind == "eva":
        from qlip.models.qlip.eva_sizes import EvaImportConfig

        given.pop("text_from", None)
        import_eva_weights(src, out, text_from=text_from, config=EvaImportConfig(**given))
        return
    from qlip.apps.import_llama import LlamaImportConfig, import_llama
    from qlip.models.widening import WideningConfig

    if tokenizer is None:
        raise UserError("no image tokenizer: add --tokenizer QLIP, a folder such as `make demo` makes")
    widening = WideningConfig(**{name: given.pop(name) for name in ("division", "softmax") if name in given})
    import_llama(src, out, LlamaImportConfig(**given, widening=widening))


def doctor() -> None:
    """Say what this machine has: versions, devices, precision, disk, optional packages; and what does not fit."""
    from qlip.apps.doctor import print_diagnosis

    print_diagnosis()
