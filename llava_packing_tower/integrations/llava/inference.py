"""Ask a LLaVA checkpoint about images, with the host's own loader, prompt, image preparation and `generate`."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from PIL import Image

from ...data.images import fit_of, fitted, to_rgb
from ...utils.files import CONFIG_NAME, read_json
from .model_class import loaded_as
from .registry import host_of, host_of_model, loader

DTYPES = ("float32", "bfloat16", "float16")


class Checkpoint(NamedTuple):
    """What the host's `load_pretrained_model` returns."""

    tokenizer: object
    model: torch.nn.Module
    image_processor: object
    context_length: int


def host_module(name: str, model: torch.nn.Module | None = None) -> ModuleType:
    """The module that a field of :class:`.host.Host` names (`mm_utils`), of a model's host or of the one here."""
    host = host_of() if model is None else host_of_model(model)
    return import_module(host.modules().get(name) or host.module(getattr(host, name)))


def build_prompt(version: str, question: str, answer: str | None = None) -> str:
    """The host's conversation template `version` around a question, up to where the answer starts or through it.

    Raises ``ValueError`` for a template that the host does not have.
    """
    templates = host_module("conversation").conv_templates
    if version not in templates:
        raise ValueError(f"this LLaVA has no conversation template {version!r}; it has {', '.join(sorted(templates))}")
    conversation = templates[version].copy()
    conversation.append_message(conversation.roles[0], question)
    conversation.append_message(conversation.roles[1], answer)
    return conversation.get_prompt()


def load_checkpoint(folder: Path, device: str | None = None, model_base: Path | None = None) -> Checkpoint:
    """Load a LLaVA checkpoint with the host's `load_pretrained_model`, in the dtype in which it was saved.

    device: where it goes; None is the first GPU, or the CPU where there is none. model_base: what a LoRA, or a
    checkpoint of the projector alone, was trained on.
    """
    folder = Path(folder)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    content = read_json(folder / CONFIG_NAME)
    dtype = str(content.get("torch_dtype") or content.get("dtype") or "float16")  # transformers 5 writes `dtype`
    if dtype not in DTYPES:
        raise ValueError(f"{folder / CONFIG_NAME}: torch_dtype is {dtype!r:.80}; it is one of {', '.join(DTYPES)}")
    builder = host_module("loader")
    accepted = inspect.signature(loader(builder)).parameters
    options: dict[str, object] = {}
    if "device" in accepted:
        options["device"] = device
    else:
        options["device_map"] = {"": device}  # its default spreads one model over all GPUs
    if "torch_dtype" in accepted:
        # LLaVA-NeXT stops in a debugger at any other; what is loaded is decided below.
        options["torch_dtype"] = dtype if dtype in ("float16", "bfloat16") else "bfloat16"
    if "attn_implementation" in accepted:
        options["attn_implementation"] = "sdpa"
    name = host_module("mm_utils").get_model_name_from_path(str(folder))  # the hook looks at the config
    base = None if model_base is None else str(model_base)
    with loaded_as(getattr(torch, dtype)):
        loaded = Checkpoint(*loader(builder)(str(folder), base, name, **options))
    loaded.model.eval()
    return loaded


def as_read(image: Image.Image, processor: object, config: object) -> Image.Image:
    """An image as training reads it from its file, for what the host makes of it at the ``image_aspect_ratio``.

    Raises ``ValueError`` for one that training would not read.
    """
    reading = processor.image_reading
    return fitted(to_rgb(image, reading), reading, fit_of(getattr(config, "image_aspect_ratio", None)))


def prepare_image(loaded: Checkpoint, image: Image.Image) -> torch.Tensor:
    """What the host's `process_images` makes of one image: `[1, C, H, W]`, or `[1, crops, C, H, W]` for anyres."""
    process_images = host_module("mm_utils", loaded.model).process_images
    image = as_read(image, loaded.image_processor, loaded.model.config)
    pixels = process_images([image], loaded.image_processor, loaded.model.config)
    return pixels if isinstance(pixels, torch.Tensor) else torch.stack(list(pixels))


def takes_modalities(model: torch.nn.Module) -> bool:
    """Whether a model is told which of its images are videos: most of LLaVA-NeXT's are."""
    return "modalities" in inspect.signature(model.generate).parameters


def trains_with_lists(model: torch.nn.Module) -> bool:
    """Whether the host's training gives images of one size as a list, not as a tensor: LLaVA-NeXT does."""
    return host_of_model(model).reads_videos


@torch.inference_mode()
def ask(loaded: Checkpoint, image: Image.Image, question: str, version: str, max_new_tokens: int = 16) -> str:
    """The greedy answer to a question about one image, as the host's own scripts would get it."""
    utilities, constants = host_module("mm_utils", loaded.model), host_module("constants", loaded.model)
    image = as_read(image, loaded.image_processor, loaded.model.config)
    prompt = build_prompt(version, f"{constants.DEFAULT_IMAGE_TOKEN}\n{question}")
    ids = utilities.tokenizer_image_token(
        prompt, loaded.tokenizer, constants.IMAGE_TOKEN_INDEX, return_tensors="pt"
    ).unsqueeze(0)
    device = loaded.model.device
    pixels = prepare_image(loaded, image).to(device, loaded.model.dtype)
    output = loaded.model.generate(
        ids.to(device),
        images=list(pixels) if trains_with_lists(loaded.model) else pixels,  # as it is trained
        image_sizes=[image.size],
        do_sample=False,
        max_new_tokens=max_new_tokens,
        use_cache=True,
    )
    return loaded.tokenizer.batch_decode(output, skip_special_tokens=True)[0].strip()
