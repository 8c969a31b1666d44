"""Compat patches of imports: names that newer versions of transformers no longer have where the hosts import them.

Each looks at a host's module right before its body runs, and puts the names back where that body imports them from.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from ..patcher import Patches
from ..registry import host_of
from . import compat_patch

if TYPE_CHECKING:
    import torch

# (module that the hosts import from, name) -> the modules where it went; the first that has it is used.
MOVED: dict[tuple[str, str], tuple[str, ...]] = {
    ("transformers.modeling_utils", "apply_chunking_to_forward"): ("transformers.pytorch_utils",),
    ("transformers.modeling_utils", "find_pruneable_heads_and_indices"): ("transformers.pytorch_utils", __name__),
    ("transformers.modeling_utils", "prune_linear_layer"): ("transformers.pytorch_utils",),
    ("transformers.trainer", "ALL_LAYERNORM_LAYERS"): ("transformers.pytorch_utils",),
    ("transformers.trainer", "GradientAccumulationPlugin"): ("accelerate.utils",),
    ("transformers.trainer", "get_parameter_names"): ("transformers.trainer_pt_utils",),
}


OLD_MASKS = ("_expand_mask", "_make_causal_mask")


def find_pruneable_heads_and_indices(
    heads: Iterable[int], n_heads: int, head_size: int, already_pruned_heads: set[int]
) -> tuple[set[int], torch.Tensor]:
    """What transformers 5 has nowhere any more: which of ``heads`` are still there, and the indices that remain.

    Args:
        heads: numbers of the heads to prune, as they were before anything was pruned.
        n_heads: heads that are still there.
        head_size: width of a head.
        already_pruned_heads: numbers of the heads pruned earlier.

    Returns:
        The heads to prune now, and the int64 indices ``[(n_heads - pruned) * head_size]`` of the rows to keep.
    """
    import torch

    left = set(heads) - set(already_pruned_heads)
    rows = torch.arange(n_heads * head_size).view(n_heads, head_size)
    gone = {head - sum(earlier < head for earlier in already_pruned_heads) for head in left}
    return left, rows[[head for head in range(n_heads) if head not in gone]].flatten()


def missing_names(file: str | Path) -> list[tuple[str, str]]:
    """(module, name) for what a source file imports from transformers and this transformers does not have there."""
    missing = []
    for node in ast.walk(ast.parse(Path(file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "transformers":
            # Only plain modules: asking transformers itself for a name it makes lazily can import half of it.
            if node.module == "transformers" or not any(node.module == module for module, _ in MOVED):
                continue
            module = import_module(node.module)
            missing += [(node.module, alias.name) for alias in node.names if not hasattr(module, alias.name)]
    return missing


def _put_back(module: ModuleType, patches: Patches) -> None:
    for place, name in missing_names(module.__file__):
        if (place, name) not in MOVED:
            raise ImportError(
                f"{module.__name__} imports {name} from {place}, where this transformers does not have it, "
                "and no compat patch knows where it went"
            )
        patches.set(import_module(place), name, _found(name, MOVED[place, name]))


def _found(name: str, places: tuple[str, ...]) -> object:
    for place in places:
        module = import_module(place)
        if hasattr(module, name):
            return getattr(module, name)
    raise ImportError(f"{name} is in none of {', '.join(places)}")


def _taken_types(models: ModuleType) -> list[str]:
    """Model types that files of a host register, and that this transformers has itself."""
    from transformers import CONFIG_MAPPING

    host = host_of(models)
    folder = Path(next(iter(models.__path__))) / host.language_models.removeprefix(f"{host.models}.")
    texts = [file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.py"))]
    registered = [
        word for text in texts for word in re.findall(r"^AutoConfig\.register\(\"(\w+)\"", text, re.MULTILINE)
    ]
    return [word for word in registered if word in CONFIG_MAPPING]


@compat_patch(
    module="{models}",
    reason="the host registers its model under a type that transformers has itself by now, which is an error",
    defect=lambda models: bool(_taken_types(models)),
    before=True,
)
def model_types(models: ModuleType, patches: Patches) -> None:
    from transformers import AutoConfig

    register, host = AutoConfig.register, host_of(models)

    def register_anyway(model_type: str, config: type, exist_ok: bool = False) -> None:
        register(model_type, config, exist_ok=exist_ok or host.owns(config.__module__))

    patches.set(AutoConfig, "register", staticmethod(register_anyway))


def _old_masks(package: ModuleType) -> list[tuple[str, str]]:
    """(module, name) of the mask functions that files of a host import from models of transformers, which lost them."""
    places = []
    for root in package.__path__:
        for file in sorted(Path(root).rglob("*.py")):
            text = file.read_text(encoding="utf-8")
            if not any(name in text for name in OLD_MASKS):
                continue
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers.models."):
                    places += [(node.module, alias.name) for alias in node.names if alias.name in OLD_MASKS]
    return [place for place in dict.fromkeys(places) if not hasattr(import_module(place[0]), place[1])]


@compat_patch(
    module="{package}",
    reason="files of the host import mask functions that models of transformers no longer have, for text encoders and "
    "prefix language models; the host can be imported again, and these models say so when they are called",
    defect=lambda package: bool(_old_masks(package)),
    before=True,
)
def mask_names(package: ModuleType, patches: Patches) -> None:
    for place, name in _old_masks(package):

        def gone(*args: object, place: str = place, name: str = name, **kwargs: object) -> object:
            raise NotImplementedError(f"{place} of this transformers has no {name}, which this model of the host needs")

        patches.set(import_module(place), name, gone)


@compat_patch(
    module="{qformer}",
    reason="a resampler imports helpers from transformers.modeling_utils that moved to transformers.pytorch_utils; "
    "without them no LLaVA model can be imported",
    issue="EvolvingLMMs-Lab/lmms-eval#860",
    defect=lambda qformer: bool(missing_names(qformer.__file__)),
    before=True,
)
def resampler_names(qformer: ModuleType, patches: Patches) -> None:
    _put_back(qformer, patches)


@compat_patch(
    module="{trainer}",
    reason="the trainer imports names from transformers.trainer that have moved",
    issue="huggingface/transformers#38922",
    defect=lambda trainer: bool(missing_names(trainer.__file__)),
    before=True,
)
def trainer_names(trainer: ModuleType, patches: Patches) -> None:
    _put_back(trainer, patches)
