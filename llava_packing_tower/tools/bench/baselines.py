"""Other implementations: transformers' models, timm's NaFlex, the original tower; each as its users would run it.

Their inputs are prepared outside of the measured time, pooling heads that nobody asked for are left out where a config
can say so, and models that stand in for LlavaViT have just as many layers as the task needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers import PretrainedConfig

from ...data.patches import PatchLayout, patchify
from .availability import Unavailable
from .systems import Images, Setting, Step, System, Weights, per_image_shapes

Peer = tuple[list[System], Weights | None]
"""The systems, and the weights that the packed encoder can take over so that the features can be compared."""


def initialized(build: Callable[[], nn.Module], setting: Setting, train: bool) -> nn.Module:
    with torch.device(setting.device):
        model = build()
    return model.to(setting.dtype).requires_grad_(train).train(train)


def transformers_class(name: str):
    import transformers

    if not hasattr(transformers, name):
        raise Unavailable(f"transformers {transformers.__version__} has no {name}")
    return getattr(transformers, name)


def _each(images: Images) -> Iterator[torch.Tensor]:
    yield from (image.unsqueeze(0) for image in images)


def _one_by_one(setting: Setting, call: Callable[..., torch.Tensor], inputs: Callable[[torch.Tensor], tuple]):
    """A step that runs the model once per image."""

    def prepare(images: Images) -> Step:
        ready = [inputs(image) for image in _each(images)]
        shapes = per_image_shapes(list(images), setting.config.patch_size, setting.config.hidden_size)
        return Step(lambda: [call(*arguments) for arguments in ready], shapes, list)

    return prepare


def _rows(image: torch.Tensor, setting: Setting) -> torch.Tensor:
    return patchify(image, setting.config.patch_size, PatchLayout.CHANNEL_LAST)


def _padded(images: Images, setting: Setting) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows ``[B, longest, patch_dim]``, which are real ``[B, longest]``, and (rows, columns) ``[B, 2]`` on the host."""
    rows = [_rows(image, setting) for image in _each(images)]
    patch = setting.config.patch_size
    grids = torch.tensor([[x.shape[1] // patch, x.shape[2] // patch] for x in images])
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = grids.prod(1).to(padded.device)
    return padded, torch.arange(padded.shape[1], device=padded.device) < lengths[:, None], grids


def _unpad(output: torch.Tensor, grids: torch.Tensor) -> list[torch.Tensor]:
    return [row[:length] for row, length in zip(output, grids.prod(1).tolist())]


def _sizes(config: PretrainedConfig) -> dict[str, int]:
    """The fields that the packed configs share with transformers'."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")
    return {name: getattr(config, name) for name in names}


def _siglip2(setting: Setting, train: bool) -> Peer:
    c = setting.config
    config = transformers_class("Siglip2VisionConfig")(
        **_sizes(c),
        num_patches=c.num_patches,
        vision_use_head=False,
    )
    model = initialized(lambda: transformers_class("Siglip2VisionModel")(config), setting, train)

    def one(rows: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        return model(rows, None, grid).last_hidden_state[0]

    def prepare_padded(images: Images) -> Step:
        rows, real, grids = _padded(images, setting)
        shape = (*rows.shape[:2], c.hidden_size)
        return Step(lambda: model(rows, real.long(), grids).last_hidden_state, (shape,), lambda out: _unpad(out, grids))

    def inputs(image: torch.Tensor) -> tuple:
        grid = torch.tensor([[image.shape[2] // c.patch_size, image.shape[3] // c.patch_size]])
        return _rows(image, setting).unsqueeze(0), grid

    systems = [
        System("transformers, image by image", model, _one_by_one(setting, one, inputs), same_weights=True),
        System("transformers, padded + mask", model, prepare_padded, same_weights=True),
    ]
    return systems, (config.to_dict(), model.state_dict())


def _aimv2(setting: Setting, train: bool) -> Peer:
    c = setting.config
    config = transformers_class("Aimv2VisionConfig")(
        **_sizes(c),
        image_size=c.image_size,
        is_native=True,
        use_head=False,
    )
    return _pixels_one_by_one(setting, "Aimv2VisionModel", config, 0, train)


def _dinov3(setting: Setting, train: bool) -> Peer:
    c = setting.config
    config = transformers_class("DINOv3ViTConfig")(
        **_sizes(c),
        image_size=c.image_size,
        num_register_tokens=c.num_register_tokens,
        pos_embed_rescale=None,
    )
    return _pixels_one_by_one(setting, "DINOv3ViTModel", config, 1 + c.num_register_tokens, train)


def _pixels_one_by_one(setting: Setting, name: str, config, prefix: int, train: bool) -> Peer:
    model = initialized(lambda: transformers_class(name)(config), setting, train)

    def call(image: torch.Tensor) -> torch.Tensor:
        return model(image).last_hidden_state[0, prefix:]

    prepare = _one_by_one(setting, call, lambda image: (image,))
    system = System("transformers, image by image", model, prepare, same_weights=True)
    return [system], (config.to_dict(), model.state_dict())


def _qwen2_vl(setting: Setting, train: bool) -> Peer:
    """transformers has no LlavaViT; its packed vision tower of the same size is compared instead."""
    c = setting.config
    config = transformers_class("Qwen2VLConfig")().vision_config
    fields = dict(
        depth=setting.layers,
        embed_dim=c.hidden_size,
        hidden_size=c.hidden_size,
        num_heads=c.num_attention_heads,
        mlp_ratio=c.intermediate_size // c.hidden_size,
        patch_size=c.patch_size,
        temporal_patch_size=1,
        spatial_merge_size=1,
    )
    for key, value in fields.items():
        setattr(config, key, value)
    config._attn_implementation = "flash_attention_2" if has_flash_attention(setting) else "sdpa"
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    model = initialized(lambda: Qwen2VisionTransformerPretrainedModel(config), setting, train)
    model.merger = nn.Identity()

    def prepare(images: Images) -> Step:
        rows = torch.cat([patchify(x, c.patch_size, PatchLayout.CHANNEL_FIRST) for x in _each(images)])
        sizes = [[1, x.shape[1] // c.patch_size, x.shape[2] // c.patch_size] for x in images]
        grid = torch.tensor(sizes, device=setting.device)
        lengths = [h * w for _, h, w in sizes]

        def run() -> torch.Tensor:
            output = model(rows, grid)
            return output if isinstance(output, torch.Tensor) else output.last_hidden_state

        return Step(run, ((len(rows), c.hidden_size),), lambda out: list(out.split(lengths)))

    kind = "flash-attn 2" if has_flash_attention(setting) else "sdpa"
    return [System(f"transformers Qwen2-VL vision, same size, packed, {kind}", model, prepare)], None


def has_flash_attention(setting: Setting) -> bool:
    from transformers.utils import is_flash_attn_2_available

    return setting.device.type == "cuda" and is_flash_attn_2_available()


TRANSFORMERS = {"llava_vit": _qwen2_vl, "siglip2": _siglip2, "aimv2": _aimv2, "dinov3": _dinov3}


def transformers_peer(setting: Setting, train: bool, option: str | None) -> Peer:
    from .vision_towers import VISION_TOWERS

    make = {**TRANSFORMERS, **VISION_TOWERS}.get(setting.family)
    if make is None:
        raise Unavailable("it has no such tower, or none that runs on its own")
    return make(setting, train)


def timm_peer(setting: Setting, train: bool, option: str | None) -> Peer:
    """timm's NaFlexVit of the same size: padded to the longest image, with a mask if lengths differ."""
    try:
        from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
    except ImportError as error:
        raise Unavailable(f"it needs timm 1.0.16 or newer ({error})") from error
    c = setting.config
    kinds = {
        "siglip2": dict(act_layer="gelu_tanh", pos_embed_interp_mode="bilinear"),
        "llava_vit": dict(rope_type="axial", pos_embed="none", attn_type="rope"),
        "dinov3": dict(
            rope_type="dinov3",
            pos_embed="none",
            attn_type="rope",
            class_token=True,
            reg_tokens=getattr(c, "num_register_tokens", 0),
            init_values=1.0,
        ),
    }
    if setting.family not in kinds:
        raise Unavailable("NaFlexVit has no such model")
    prefix = 1 + c.num_register_tokens if setting.family == "dinov3" else 0
    cfg = NaFlexVitCfg(
        patch_size=c.patch_size,
        embed_dim=c.hidden_size,
        depth=setting.layers,
        num_heads=c.num_attention_heads,
        mlp_ratio=c.intermediate_size / c.hidden_size,
        global_pool="",
        **kinds[setting.family],
    )
    model = initialized(lambda: NaFlexVit(cfg, num_classes=0), setting, train)

    def prepare(images: Images) -> Step:
        rows, real, grids = _padded(images, setting)
        coordinates = torch.zeros(*rows.shape[:2], 2, dtype=torch.long)
        for one, (h, w) in zip(coordinates, grids.tolist()):
            one[: h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w))
        coordinates = coordinates.to(setting.device)
        valid = None if len(grids.unique(dim=0)) == 1 else real

        def run() -> torch.Tensor:
            return model.forward_features(rows, coordinates, valid)["patches"][:, prefix:]

        return Step(run, ((*rows.shape[:2], c.hidden_size),), lambda out: _unpad(out, grids))

    return [System("timm NaFlexVit, padded + mask", model, prepare)], None


def original_peer(setting: Setting, train: bool, option: str | None) -> Peer:
    """The original HEVC packing tower, as it is: with its pooling head, and keeping every hidden state."""
    from .original_tower import original_tower

    if setting.family != "llava_vit":
        raise Unavailable("the original tower is a LlavaViT")
    if not option:
        raise Unavailable("name the folder of its clone: --peers original=PATH")
    c = setting.config
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size")
    sizes = {name: getattr(c, name) for name in names}
    tower = original_tower(option, sizes, setting.preset.select_layer, setting.device, setting.dtype)
    tower.requires_grad_(train).train(train)

    def prepare(images: Images) -> Step:
        return Step(lambda: tower(images), per_image_shapes(images, c.patch_size, c.hidden_size), list)

    weights = c.to_dict(), tower.vision_tower.state_dict()
    return [System("original tower", tower, prepare, same_weights=True)], weights


PEERS: dict[str, Callable[[Setting, bool, str | None], Peer]] = {
    "transformers": transformers_peer,
    "timm": timm_peer,
    "original": original_peer,
}
