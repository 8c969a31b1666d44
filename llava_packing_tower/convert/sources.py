"""The kind of a source (checkpoint folder, hub id, weight file), from its config.json or its tensor names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoint.namings import NAMINGS, refusal
from ..checkpoint.opening import Checkpoint, identify, open_files
from ..checkpoint.single_file import FILE_SUFFIXES
from ..checkpoint.single_file import SingleFile as SingleFile
from ..checkpoint.weights import WeightFiles
from ..models.llava_vit.key_map import SOURCE_TYPE
from ..models.llava_vit.presets import ONEVISION, PRESETS, SIZE_FIELDS, Preset, mismatches, names_that_fit, preset
from ..models.registry import part_of, type_of
from ..utils.files import CONFIG_NAME, read_json, user_path


@dataclass(frozen=True)
class Spelling:
    """How one kind of LlavaViT checkpoint names the tensors that its sizes can be read from."""

    model_type: str
    patch: str
    norm_bias: str
    fc1: str


SPELLINGS = (
    Spelling(SOURCE_TYPE, "conv1.weight", "ln_pre.bias", r"transformer\.layers\.(\d+)\.mlp\.0\.weight"),
    Spelling(
        "llava_vit",
        "embeddings.patch_embedding.weight",
        "layernorm_pre.bias",
        r"encoder\.layers\.(\d+)\.mlp\.fc1\.weight",
    ),
    Spelling(
        "llava_vit_packing",
        "patch_embed.proj.weight",
        "layernorm_pre.bias",
        r"encoder\.layers\.(\d+)\.mlp\.fc1\.weight",
    ),
)


@dataclass
class Source:
    """A checkpoint to convert.

    raw: the content of its config.json, or what stands for one (``model_type`` says which kind it is).
    ignored: what the file holds besides the weights, with the reason why it is left out.
    """

    name: str
    path: Path
    raw: dict
    files: WeightFiles
    ignored: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return type_of(self.raw) or self.raw["model_type"]

    @property
    def folder(self) -> Path | None:
        """The checkpoint folder, None for a single file."""
        return self.path if self.path.is_dir() else None


def sizes_of(shapes: Mapping[str, tuple[int, ...]], spelling: Spelling) -> dict[str, object]:
    """The config fields that the tensors themselves tell. Raises ``ValueError`` if they contradict each other."""
    patch = shapes[spelling.patch]
    if len(patch) != 4 or patch[2] != patch[3]:
        raise ValueError(f"{spelling.patch} should be [hidden, channels, patch, patch], found {list(patch)}")
    layers = {int(match[1]): shapes[name] for name in shapes if (match := re.fullmatch(spelling.fc1, name))}
    if not layers or min(len(shape) for shape in layers.values()) != 2:
        raise ValueError(f"no layers found (weights named like {spelling.fc1})")
    return {
        "hidden_size": patch[0],
        "num_channels": patch[1],
        "patch_size": patch[2],
        "num_hidden_layers": max(layers) + 1,
        "intermediate_size": layers[max(layers)][0],
        "layer_norm_type": "layer_norm" if spelling.norm_bias in shapes else "rms_norm",
        "use_head": any(name.startswith("head.") for name in shapes),
    }


def check_preset(chosen: Preset, sizes: Mapping[str, object], where: object) -> None:
    """Raises ``ValueError`` with both sizes if a named model is not of these sizes."""
    if wrong := mismatches(chosen, sizes):
        fitting = ", ".join(names_that_fit(sizes)) or "none"
        raise ValueError(
            f"{where} is not a {chosen.name}:\n  "
            + "\n  ".join(wrong)
            + f"\nnames with the sizes of the checkpoint: {fitting}"
        )


def _config_beside(path: Path) -> dict:
    """Fields from a config.json beside (or in) the weights of a training run; head_dim may stand for the heads."""
    file = (path if path.is_dir() else path.parent) / CONFIG_NAME
    if not file.is_file():
        return {}
    content = read_json(file)
    for nested in ("constructor", "packing_config"):
        if isinstance(content.get(nested), dict):
            content = {**content, **content[nested]}
    return content


def _spelling_of(shapes: Mapping[str, tuple[int, ...]], where: Path) -> Spelling:
    for spelling in SPELLINGS:
        if spelling.patch in shapes and any(re.fullmatch(spelling.fc1, name) for name in shapes):
            return spelling
    known = ", ".join(spelling.patch for spelling in SPELLINGS)
    raise ValueError(f"{refusal(shapes, where)}. It is not a LlavaViT checkpoint: those have one of {known}")


def _read_bare(name: str, opened: Checkpoint, model_name: str | None, fields: Mapping[str, object]) -> Source:
    """LlavaViT without a config.json of a known kind: sizes from the tensors, heads from the name or the fields."""
    path, files = opened.path, opened.files
    shapes = files.shapes()
    spelling = _spelling_of(shapes, path)
    sizes = sizes_of(shapes, spelling)
    beside = _config_beside(path)
    told = {key: beside[key] for key in CONFIG_FIELDS if key in beside}
    if "head_dim" in beside and "num_attention_heads" not in told:
        told["num_attention_heads"] = sizes["hidden_size"] // beside["head_dim"]
    told.update(fields)
    if wrong := [
        f"{key}: the config says {told[key]!r:.80}, the weights {sizes[key]}"
        for key in sizes
        if told.get(key, sizes[key]) != sizes[key]
    ]:
        raise ValueError(f"{opened.where}: " + "; ".join(wrong))
    if model_name:
        check_preset(preset(model_name), sizes | {k: v for k, v in fields.items() if k in SIZE_FIELDS}, path)
        told = {**preset(model_name).fields, **told}
    if "num_attention_heads" not in told:
        fitting = names_that_fit(sizes)
        raise ValueError(
            f"{path} has no config.json, and the number of attention heads cannot be read from weights: give the "
            f"model's name with --model_name (of these sizes: {', '.join(fitting) or 'none'}; all names: "
            f"{', '.join(sorted(PRESETS))}), or --num_attention_heads"
        )
    kind = spelling.model_type
    if model_name and preset(model_name).form == ONEVISION:
        if kind != "llava_vit":
            raise ValueError(f"{path} has the tensor names of a {kind}, not those of {model_name} (onevision_encoder)")
        kind = "onevision_encoder"
    return Source(name, path, {**told, **sizes, "model_type": kind}, files, opened.ignored)


CONFIG_FIELDS = (
    *SIZE_FIELDS,
    *("num_channels", "image_size", "hidden_act", "layer_norm_eps", "layer_norm_type", "rope_theta", "use_head"),
)


def read_source(name: str, model_name: str | None = None, fields: Mapping[str, object] | None = None) -> Source:
    """Find out what a checkpoint is.

    Args:
        name: folder, hub id or weight file (``.pt``, ``.pth``, ``.bin``, ``.safetensors``, ``.npz``).
        model_name: named sizes (``presets``). Needed for a file without config.json; for others only checked.
        fields: config fields that the user gave, for weights without a config.json.

    Raises:
        ValueError: not found, unreadable, of no known kind, or sizes that contradict the name.
    """
    fields, path = dict(fields or {}), user_path(name)
    if not path.exists() and path.suffix in FILE_SUFFIXES:
        raise ValueError(f"weight file {name!r} does not exist")
    opened = open_files(name, part=part_of)
    if "model_type" not in opened.raw:
        if not identify(opened):
            return _read_bare(name, opened, model_name, fields)
        if model_name:
            whose = next(naming.whose for naming in NAMINGS if naming.model_type == opened.raw["model_type"])
            raise ValueError(f"{opened.path} is {whose}, not a {model_name}: leave out the model's name")
        return Source(name, opened.path, {**opened.raw, **fields}, opened.files, opened.ignored)
    folder, raw = opened.path, opened.raw
    if not isinstance(raw["model_type"], str):
        raise ValueError(f"{opened.where}: model_type in its config is {raw['model_type']!r:.80}, it should be text")
    if fields:
        raise ValueError(
            f"{', '.join(fields)} cannot be given, because {folder} has a config.json, whose values are kept"
        )
    if model_name:
        shown = raw.get("vision_config", raw)
        check_preset(preset(model_name), {key: shown[key] for key in CONFIG_FIELDS if key in shown}, folder)
    return Source(name, folder, raw, opened.files, opened.ignored)
