"""The original packing tower of OneVision-Encoder, from a clone that the user gives; nothing of it is kept.

https://github.com/EvolvingLMMs-Lab/OneVision-Encoder carried the two files until its public release; they are read from
the clone's history, or from a folder that holds just them.
"""

from __future__ import annotations

import contextlib
import importlib
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from ...utils.files import user_path
from .availability import Unavailable

PACKAGE = "model_factory"
MODEL, TOWER = "vit_preview_v0_packing_hf", "hevc_vit_packing_tower"
SOURCES = {
    MODEL: ("28efa3a", f"model_factory/{MODEL}.py"),
    TOWER: ("83bb8df", f"llava_next/llava/model/multimodal_encoder/{TOWER}.py"),
}


def read_source(clone: Path, name: str) -> bytes:
    """One of the two files: lying in the folder itself, at its old place below it, or in the git history."""
    commit, path = SOURCES[name]
    for file in (clone / f"{name}.py", clone / path):
        if file.is_file():
            return file.read_bytes()
    shown = subprocess.run(["git", "-C", str(clone), "show", f"{commit}:{path}"], capture_output=True)
    if shown.returncode:
        raise Unavailable(
            f"{clone} has neither {name}.py nor commit {commit} with {path}: give a full clone of OneVision-Encoder"
        )
    return shown.stdout


@contextlib.contextmanager
def _import_surroundings(folder: Path) -> Iterator[None]:
    """What the files import and do not need here (timm's registry, LLaVA's printing) stands in while they load."""

    def stand_in(name: str, **content: object) -> types.ModuleType:
        module = types.ModuleType(name)
        module.__path__ = []
        module.__dict__.update(content)
        return module

    stand_ins = {
        "timm": stand_in("timm"),
        "timm.models": stand_in("timm.models"),
        "timm.models.registry": stand_in("timm.models.registry", register_model=lambda function: function),
        "llava": stand_in("llava"),
        "llava.utils": stand_in("llava.utils", rank0_print=print),
    }
    import transformers.utils

    hidden = {name: sys.modules.get(name) for name in stand_ins}
    check = transformers.utils.is_flash_attn_2_available
    sys.modules.update(stand_ins)
    sys.path.insert(0, str(folder))
    # flash_attn has been imported by now; transformers' own check would also want its package metadata.
    transformers.utils.is_flash_attn_2_available = lambda: True
    try:
        yield
    finally:
        transformers.utils.is_flash_attn_2_available = check
        sys.path.remove(str(folder))
        for name, module in hidden.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module


def original_tower(clone: str | Path, sizes: dict, select_layer: int, device: torch.device, dtype: torch.dtype):
    """The original tower with random weights, ready to be called with images.

    Args:
        clone: a git clone (bare or not) of OneVision-Encoder, or a folder with the two files.
        sizes: fields of the model's config.
        select_layer: the hidden state that it returns, counted as LLaVA does.
        device, dtype: of the weights.

    Raises:
        Unavailable: flash-attn is not installed, or the files are not found.
    """
    clone = user_path(clone)
    if not clone.is_dir():
        raise Unavailable(f"no folder {clone}")
    if f"{PACKAGE}.{TOWER}" not in sys.modules:
        try:
            import flash_attn  # noqa: F401
        except (ImportError, OSError) as error:
            raise Unavailable(f"it needs flash-attn ({error})") from error
        with tempfile.TemporaryDirectory() as temporary:
            package = Path(temporary) / PACKAGE
            package.mkdir()
            (package / "__init__.py").touch()
            for name in SOURCES:
                (package / f"{name}.py").write_bytes(read_source(clone, name))
            importlib.invalidate_caches()
            with _import_surroundings(Path(temporary)):
                importlib.import_module(f"{PACKAGE}.{TOWER}")
    models, towers = sys.modules[f"{PACKAGE}.{MODEL}"], sys.modules[f"{PACKAGE}.{TOWER}"]
    with torch.device(device):
        model = models.LlavaViTPackingModel(models.LlavaViTPackingConfig(**sizes))
    # Its constructor reads a folder; this is the state that the folder would have left.
    tower = towers.HEVCViTPackingVisionTower.__new__(towers.HEVCViTPackingVisionTower)
    nn.Module.__init__(tower)
    tower.is_loaded, tower.vision_tower_name, tower.projector_type = True, "random", "mlp2x_gelu"
    tower.select_layer, tower.select_feature = select_layer, "patch"
    tower.vision_tower = _cast_weights(model, dtype)
    return tower


def _cast_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Parameters alone, as loading in that dtype would leave it: the frequency buffers stay float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
