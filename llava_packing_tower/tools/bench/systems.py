"""The measured systems: the packed encoders of this package, and the table of the others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from transformers import PretrainedConfig

from ...data.patches import batch_images_to_packing_input, split_packed
from ...data.segments import read_grid
from ...models.encoder import PackedEncoder
from ...models.registry import family_for
from .models import Preset
from .workloads import Images

Output = torch.Tensor | list[torch.Tensor]


@dataclass(frozen=True)
class Step:
    """One batch, ready to run.

    run: returns a tensor or a list of them; shapes: of what it returns; features: that as one ``[tokens, hidden]`` per
    image.
    """

    run: Callable[[], Output]
    shapes: tuple[tuple[int, ...], ...]
    features: Callable[[Output], list[torch.Tensor]]


@dataclass
class System:
    """name: in the tables; prepare: images to a :class:`Step` (never timed); same_weights: whether it has the weights
    of the packed encoder, so that the features can be compared; backend: the attention backend that the packed encoder
    ran last."""

    name: str
    model: nn.Module
    prepare: Callable[[Images], Step]
    packed: bool = False
    same_weights: bool = False
    backend: str | None = None
    weight_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.weight_bytes = sum(p.numel() * p.element_size() for p in self.model.parameters())


@dataclass(frozen=True)
class Setting:
    """What is built: a family's preset, its config, where, and in which precision."""

    family: str
    preset: Preset
    config: PretrainedConfig
    device: torch.device
    dtype: torch.dtype

    @property
    def title(self) -> str:
        full = self.preset.config(tiny=False)
        return self.preset.title if self.config.hidden_size == full.hidden_size else f"tiny {self.family}"

    @property
    def layers(self) -> int:
        return self.preset.layers(self.config)


class InMemory:
    """Tensors of a running model, for the loader that otherwise reads checkpoint folders."""

    folder = name = Path("the model in memory")

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: tuple(value.shape) for key, value in self._tensors.items()}

    def dtypes(self) -> dict[str, str]:
        return {key: str(value.dtype).removeprefix("torch.") for key, value in self._tensors.items()}

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._tensors[key]


Weights = tuple[dict, Mapping[str, torch.Tensor]]
"""config.json content and state dict of the model whose weights the packed encoder takes."""


def random_weights(setting: Setting) -> Weights:
    """Weights for the packed encoder where no other system brings some."""
    with torch.device(setting.device):
        model = family_for(setting.preset.model_type)(setting.config)
    return setting.config.to_dict(), model.to(setting.dtype).state_dict()


def packed_system(setting: Setting, weights: Weights, backend: str, train: bool) -> System:
    """This package's encoder: as LLaVA's tower where the preset selects a hidden state, else the model alone."""
    family = family_for(setting.preset.model_type)
    source, tensors = weights
    config, plan = family.plan(source, InMemory(tensors).shapes())
    model = family.from_weights(config, plan, InMemory(tensors), setting.dtype, setting.device)
    model.set_attention_backend(backend)
    runner = model if setting.preset.select_layer is None else _tower_around(model, setting)
    runner.requires_grad_(train).train(train)

    def prepare(images: Images) -> Step:
        run = (lambda: runner(images)) if runner is not model else (lambda: _encode(model, images))
        return Step(run, per_image_shapes(images, config.patch_size, config.hidden_size), list)

    return System(f"packed ({backend})", runner, prepare, packed=True, same_weights=True)


def _tower_around(model: nn.Module, setting: Setting) -> nn.Module:
    from ...towers.packing_tower import HEVCViTPackingVisionTower

    saved = {
        "weights": "checkpoint",
        "config": setting.preset.config(tiny=True).to_dict(),
        "image_processor": model.default_image_processor(model.config).to_dict(),
    }
    arguments = SimpleNamespace(mm_vision_select_layer=setting.preset.select_layer, mm_packing_config=saved)
    tower = HEVCViTPackingVisionTower("bench", arguments)
    tower.vision_tower = model
    return tower


def _encode(model: nn.Module, images: Images) -> list[torch.Tensor]:
    rows, grid = batch_images_to_packing_input(
        images,
        model.config.patch_size,
        model.patch_layout,
        device=model.device,
        dtype=model.dtype,
        frames_per_patch=model.frames_per_patch,
    )
    return split_packed(model(rows, grid), read_grid(grid))


def per_image_shapes(images: Images, patch_size: int, width: int) -> tuple[tuple[int, ...], ...]:
    """``[tokens, width]`` of each image of a list, or the one ``[B, tokens, width]`` of a tensor."""
    if isinstance(images, torch.Tensor):
        return ((len(images), images.shape[2] * images.shape[3] // patch_size**2, width),)
    return tuple((x.shape[1] * x.shape[2] // patch_size**2, width) for x in images)


@contextlib.contextmanager
def recorded_backend(system: System) -> Iterator[None]:
    """Note in ``system.backend`` which attention backend the encoder core took meanwhile."""
    yield
    core = getattr(getattr(system.model, "vision_tower", system.model), "encoder", None)
    if isinstance(core, PackedEncoder) and core.last_plan is not None:
        system.backend = core.last_plan.backend


def training_step(system: System, step: Step, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """Forward and backward from the same random gradients at the outputs; the weights' gradients are made anew."""
    sizes = [torch.Size(shape).numel() for shape in step.shapes]
    noise = torch.randn(sum(sizes), generator=torch.Generator(device).manual_seed(0), device=device, dtype=dtype)
    grads = [part.view(shape) for part, shape in zip(noise.split(sizes), step.shapes, strict=True)]

    weights = list(system.model.parameters())  # walking the modules is not what is measured

    def run() -> None:
        for weight in weights:
            weight.grad = None
        torch.autograd.backward(as_list(step.run()), grads)

    return run


def as_list(output: Output) -> list[torch.Tensor]:
    return [output] if isinstance(output, torch.Tensor) else list(output)


def lowest_cosine(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> float:
    """The smallest cosine between corresponding tokens of two systems; raises ``ValueError`` for other shapes."""
    worst = 1.0
    for index, (a, b) in enumerate(zip(first, second, strict=True)):
        if a.shape != b.shape:
            raise ValueError(f"image {index}: features {list(a.shape)} and {list(b.shape)}")
        worst = min(worst, torch.cosine_similarity(a.float(), b.float(), dim=-1).min().item())
    return worst
