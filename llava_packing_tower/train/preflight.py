"""Values of a training configuration that would fail, or be ignored, only after the model is loaded. No torch here.

Each check raises :class:`UsageError` that names the key. They run for ``--dry_run`` and before every start.
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from importlib.util import find_spec
from types import SimpleNamespace

from ..data.images import reading_of
from ..data.media_check import MediaCheck, check_data
from ..data.native_config import NATIVE
from ..data.smart_resize import CHECKPOINT, known_merge
from ..integrations.llava.arguments_table import check_dealing, tunable_parts
from ..integrations.llava.host import Argument, FoundHost, syntax
from ..towers.feature_select import SELECT_FEATURES, selected_layers
from ..towers.names import CHANNEL, FUSED, PACKING, tower_kind, tower_names
from ..utils.errors import UsageError
from ..utils.files import read_json, user_path
from ..utils.progress import progress
from .sequence_lengths import LengthCheck
from .trainer_values import check_with_images

ASPECTS = re.compile(r"^(square|pad|native|highres|anyres|anyres_max_\d+|crop_split)$")
PROJECTORS = re.compile(r"^(linear|identity|pooler|mlp\d+x_gelu|mlp\d+x_res\d+x_gelu)$")
MERGES = re.compile(r"^(flat|spatial\w*)$")
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
UNLISTED_VERSIONS = ("v0", "v0.5")  # which LLaVA's train.py knows beside those of its conversation.py


def check_projector(name: str, value: str) -> None:
    """Raises ``ValueError`` for a projector that neither this package nor LLaVA has; ``name`` is where it is named."""
    if value != CHECKPOINT and not known_merge(value) and not PROJECTORS.match(value):
        examples = "linear, mlp2x_gelu, spatial_merge, spatial_merge_3x3, patch_merger, checkpoint"
        raise ValueError(f"{name}: {value!r} is unknown; known are for example {examples}")


def check_values(values: Mapping[str, object], found: FoundHost) -> None:
    """Check values that LLaVA does not check: an unknown one is ignored there, or fails late."""
    parts = values.get("mm_tunable_parts")
    try:
        if parts is not None and not tunable_parts(str(parts)):
            raise ValueError(f"mm_tunable_parts {parts!r} names no part: remove it, or name parts")
        check_dealing(values)
        if values.get("mm_projector_type") is not None:
            check_projector("mm_projector_type", str(values["mm_projector_type"]))
    except ValueError as error:
        raise UsageError(str(error)) from error
    for name, pattern, examples in (
        ("image_aspect_ratio", ASPECTS, "native, square, pad, anyres, anyres_max_9, highres, crop_split"),
        ("mm_patch_merge_type", MERGES, "flat, spatial, spatial_unpad"),
    ):
        value = values.get(name)
        if value is not None and not pattern.match(str(value)):
            raise UsageError(f"{name}: {value!r} is unknown; known are for example {examples}")
    tokens = values.get("mm_packing_encoder_tokens")
    if tokens is not None and (type(tokens) is not int or tokens < 1):
        raise UsageError(f"mm_packing_encoder_tokens: {tokens!r} is no number of patches, at least 1")
    if values.get("use_liger_kernel") and find_spec("liger_kernel") is None:
        raise UsageError("use_liger_kernel: liger-kernel is not installed: pip install liger-kernel")
    if (steps := values.get("mm_packing_profile")) is not None and steps < 1:
        raise UsageError(f"mm_packing_profile must be at least 1, got {steps}")
    if (peak := values.get("mm_packing_peak_tflops")) is not None and not peak > 0:
        raise UsageError(f"mm_packing_peak_tflops must be above 0, got {peak}")
    rank = values.get("lora_r")
    if values.get("lora_enable") and rank is not None and (type(rank) is not int or rank < 1):
        raise UsageError(f"lora_r must be at least 1, got {rank!r}")
    attention = values.get("attn_implementation")
    if attention is not None and "/" not in str(attention):  # owner/name is a kernel of the hub
        _one_of("attn_implementation", attention, ATTENTIONS)
    if (version := values.get("version")) is not None:
        _one_of("version", version, (*conversations(found), *UNLISTED_VERSIONS))
    check_tower(values)


def _one_of(key: str, value: object, known: Collection[str]) -> None:
    if value not in known:
        nearest = difflib.get_close_matches(str(value), known, n=1, cutoff=0)
        raise UsageError(f"{key}: {value!r} is unknown; the nearest is {nearest[0]!r}, of {', '.join(sorted(known))}")


def conversations(found: FoundHost) -> tuple[str, ...]:
    """The names in ``conv_templates`` of a host's conversation.py, read without running it."""
    file = found.file(found.host.conversation)
    for node in syntax(file).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(t, ast.Name) and t.id == "conv_templates" for t in targets) and isinstance(
            node.value, ast.Dict
        ):
            return tuple(key.value for key in node.value.keys if isinstance(key, ast.Constant))
    raise UsageError(f"{file} defines no conv_templates")


def check_tower(values: Mapping[str, object]) -> None:
    """The selection of features against the tower's own config, where its folder is here."""
    name = str(values["vision_tower"])
    try:
        kind = tower_kind(name)
    except ValueError as error:
        raise UsageError(f"vision_tower: {error}") from error
    if kind not in (PACKING, FUSED):
        return
    feature = values.get("mm_vision_select_feature") or "patch"
    _one_of("mm_vision_select_feature", feature, SELECT_FEATURES)
    attention = values.get("mm_packing_attention")
    if attention not in (None, "auto"):
        from ..attention.dispatch import BACKENDS

        _one_of("mm_packing_attention", attention, ("auto", *BACKENDS))
    if kind != FUSED and values.get("mm_packing_fusion"):
        raise UsageError("mm_packing_fusion has no effect with one tower: several are joined by ` + `")
    if kind == FUSED:
        _one_of("mm_packing_fusion", values.get("mm_packing_fusion") or CHANNEL, (CHANNEL,))
        if values.get("mm_projector_type") == CHECKPOINT:
            raise UsageError(f"mm_projector_type {CHECKPOINT}: the several towers {name} have no projector in common")
    for own in tower_names(name):
        _check_layer(values, own, str(feature))


def _check_layer(values: Mapping[str, object], name: str, feature: str) -> None:
    """The selected hidden state against the config of a tower, where its folder is here."""
    file = user_path(name) / "config.json"
    layer = values.get("mm_vision_select_layer")
    if layer is None or not file.is_file():
        return
    try:
        config = read_json(file)
        config = config.get("vision_config") or config
        layers = config.get("num_hidden_layers", config.get("depth"))
    except ValueError as error:
        raise UsageError(f"vision_tower: {error}") from error
    except AttributeError as error:
        raise UsageError(f"vision_tower: {file} is damaged: vision_config is no JSON object") from error
    if layers is not None and (type(layers) is not int or layers < 1):
        raise UsageError(f"vision_tower: {file} is damaged: num_hidden_layers is {layers!r}")
    if layers is not None:
        try:
            selected_layers(str(feature), int(str(layer)), layers)
        except ValueError as error:
            raise UsageError(f"vision_tower {name}: {error}") from error


def check_precision(values: Mapping[str, object], device: str) -> None:
    """Number formats that the hardware lacks, or that exclude each other: transformers or accelerate refuse them late.

    bf16 runs on every CPU.
    """
    for one, other in (("bf16", "fp16"), ("bf16_full_eval", "fp16_full_eval")):
        if values.get(one) and values.get(other):
            raise UsageError(f"{one} and {other} exclude each other: --{other} null")
    asked = [key for key in ("tf32", "fp16", "fp16_full_eval", "bf16", "bf16_full_eval") if values.get(key)]
    if not asked:
        return
    if device != "gpu":
        for key in asked:
            if key == "tf32":
                raise UsageError(
                    "tf32: needs an NVIDIA GPU of Ampere or newer, and this run is on the CPU: --tf32 null"
                )
            if key.startswith("fp16"):
                raise UsageError(f"{key}: needs a GPU, and this run is on the CPU: --{key} null")
        return
    import torch

    needs = "needs an NVIDIA GPU of Ampere or newer, and this GPU has compute capability"
    for key in asked:
        if key == "tf32":
            lacks = torch.cuda.get_device_capability()[0] < 8
        else:  # the GPUs of a hostfile may be elsewhere
            lacks = key.startswith("bf16") and torch.cuda.is_available() and not torch.cuda.is_bf16_supported()
        if lacks:
            major, minor = torch.cuda.get_device_capability()
            raise UsageError(f"{key}: {needs} {major}.{minor}: --{key} null")


def media_check(values: Mapping[str, object], found: FoundHost, all_files: bool) -> MediaCheck:
    """How the files of a configuration's data are looked at."""
    folders = {kind: values.get(f"{kind}_folder") for kind in ("image", "video")}
    return MediaCheck(
        {kind: None if folder is None else str(folder) for kind, folder in folders.items()},
        found.host.reads_videos,
        reading_of(SimpleNamespace(**values), is_checkpoint=False),
        native=values.get("image_aspect_ratio") == NATIVE,
        all_of_it=all_files,
        strict=bool(values.get("mm_packing_strict")),
    )


def check_format(data_path: str, found: FoundHost) -> None:
    """Raises :class:`UsageError` for a kind of file that the host's dataset does not open, by its source."""
    nodes = syntax(found.file(found.host.train)).body
    classes = [n for n in nodes if isinstance(n, ast.ClassDef) and n.name == found.host.dataset]
    if not classes:
        return
    source = ast.unparse(classes[0])
    kind, pattern = "{a,b}.json", r"'\{' in data_path"
    if "{" not in data_path:
        kind = user_path(data_path).suffix
        pattern = rf"data_path\.endswith\('\.?{kind[1:]}'\)"
    if kind in ("{a,b}.json", ".yaml", ".yml", ".jsonl") and not re.search(pattern, source):
        raise UsageError(f"data_path: {found.host.title} opens no {kind} here, but a .json file: {data_path}")


def check_samples(
    values: Mapping[str, object], found: FoundHost, max_length: Argument | None, all_files: bool = False
) -> tuple[int, str | None, list[str]]:
    """Check the data; returns the number of samples, what ``model_max_length`` cuts of them in words, and lines about
    files that cannot be read.

    max_length: the host's argument, whose default holds where the configuration sets none. all_files: read every image
    and video to its end.
    Raises :class:`UsageError` that names file and sample.
    """
    default = re.search(r"default=(\d+)", max_length.default if max_length else "")
    limit = values.get("model_max_length")
    limit = int(str(limit)) if limit is not None else default and int(default[1])
    tower = user_path(tower_names(str(values["vision_tower"]))[0])
    check_format(str(values["data_path"]), found)
    try:
        lengths = None if limit is None else LengthCheck(values, tower, limit)
        look = lengths and lengths.look
        with progress("reading images") if all_files else nullcontext() as shown:
            media = media_check(values, found, all_files)
            media.progress = shown or media.progress
            pairs = found.host.dataset == "DPODataset"
            count = check_data(str(values["data_path"]), media, None if pairs else look, pairs)
        if media.looked_at:
            check_with_images(values)
        return count, lengths and lengths.result(), media.lines()
    except ValueError as error:
        of_a_key = str(error).startswith(("model_", "mm_packing_"))
        raise UsageError(str(error) if of_a_key else f"data_path: {error}") from error
