"""Makes the golden checkpoints of the vision towers of VLMs: tests/golden/<family>, tiny, with random weights.

    .venv-new/bin/python tests/helpers/make_vlm_golden.py [family ...]

Each is a whole VLM in three shards, of which one holds the tower (with a tensor of the decoder), and
``case_images.safetensors``: pixels of images and clips, and what the reference makes of them: the hidden states in
raster order, and the gradients (``grad.<name in the checkpoint>``) of ``sum(last hidden state * weights)``. References
are the classes of transformers 5.24, run one image or clip at a time; for two families the author's code, from clones
whose folders are named by ONEVISION2 and PERCEPTION_MODELS.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parents[1] / "golden"
FACTORS = ("norm", "ln_", "ls1", "ls2", "lambda", "gamma")


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights of which every one can be seen: norms around 1, none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            around = 1.0 if p.dim() == 1 and not name.endswith("bias") and any(f in name for f in FACTORS) else 0.0
            spread = 0.8 * max(p[0].numel(), 1) ** -0.5 if p.dim() > 1 else 0.3
            p.copy_(around + torch.randn(p.shape, generator=generator) * spread)


def pixels(patch: int, shapes: Sequence[tuple[int, ...]], seed: int = 0) -> list[torch.Tensor]:
    """Noise for grids (rows, columns) of images and (frames, rows, columns) of clips."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(3, *shape[:-2], shape[-2] * patch, shape[-1] * patch) for shape in shapes]
    return [torch.randn(size, generator=generator) for size in sizes]


def grid_of(image: torch.Tensor, config: dict) -> tuple[int, int, int]:
    """Temporal patches, rows and columns of an image ``[C, H, W]`` or clip ``[C, T, H, W]``."""
    vision = config.get("vision_config", config)
    frames = image.shape[1] if image.dim() == 4 else 1
    h, w = (side // vision["patch_size"] for side in image.shape[-2:])
    return -(-frames // vision.get("temporal_patch_size", 1)), h, w


def write(
    name: str,
    config: dict,
    tower: dict[str, torch.Tensor],
    images: list[torch.Tensor],
    states: Callable[[torch.Tensor], list[torch.Tensor]],
    named: dict[str, torch.Tensor | list[torch.Tensor]] | Callable[[], dict[str, torch.Tensor]],
    merged: Callable[[torch.Tensor, tuple[int, int, int]], torch.Tensor] | None = None,
    processor: dict | None = None,
    decoder: str = "model.language_model.layers.{}.mlp.up_proj.weight",
) -> None:
    """Write one golden checkpoint.

    tower: the tensors of the tower and of its projector, under the checkpoint's names; states: hidden states of an
    image, each ``[n, hidden]``; named: parameters whose gradients are kept, under the checkpoint's names (a list: the
    parts of one), or what gives these gradients; merged: what the projector makes of the last hidden state of an image
    with this grid of patches.
    """
    folder = GOLDEN / name
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(9)
    rest = {decoder.format(i): torch.randn(4, 6, generator=generator) for i in range(5)}
    texts = list(rest.items())
    tower = {key: value.detach().clone().contiguous() for key, value in tower.items()}
    shards = [dict(texts[:2]), {**tower, **dict(texts[2:3])}, dict(texts[3:])]
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=1) + "\n")
    case: dict[str, torch.Tensor] = {f"pixels.{i}": image for i, image in enumerate(images)}
    all_states = [states(image) for image in images]
    case["hidden_states"] = torch.stack([torch.cat(parts) for parts in zip(*all_states, strict=True)])
    case["weights"] = torch.randn(case["hidden_states"].shape[1:], generator=generator)
    (case["hidden_states"][-1] * case["weights"]).sum().backward()
    for key, parts in (named() if callable(named) else named).items():
        if callable(named):
            case[f"grad.{key}"] = parts
            continue
        parts = parts if isinstance(parts, list) else [parts]
        if all(part.grad is not None for part in parts):
            case[f"grad.{key}"] = torch.cat([part.grad for part in parts])
    if merged is not None:
        grids = [grid_of(image, config) for image in images]
        case["merged"] = torch.cat([merged(s[-1], grid) for s, grid in zip(all_states, grids, strict=True)])
    case = {key: value.detach().clone().contiguous() for key, value in case.items()}
    save_file(case, folder / "case_images.safetensors")
    for file in folder.iterdir():
        file.chmod(0o644)
    total = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name}: {case['hidden_states'].shape[1]} tokens, {total / 1000:.0f} kB")


def qwen3_vl() -> None:
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    from llava_packing_tower.convert.hf_towers import block_states, in_cells

    vision = {
        **dict(model_type="qwen3_vl", depth=3, hidden_size=32, intermediate_size=40, num_heads=2, in_channels=3),
        **dict(patch_size=4, spatial_merge_size=2, temporal_patch_size=2, num_position_embeddings=25),
        **dict(out_hidden_size=128, deepstack_visual_indexes=[1], hidden_act="gelu_pytorch_tanh"),
    }
    model = Qwen3VLVisionModel(Qwen3VLVisionModel.config_class(**{k: vision[k] for k in vision if k != "model_type"}))
    randomize(model, 1)
    write(
        "qwen3_vl",
        {"model_type": "qwen3_vl", "vision_config": vision, "text_config": {"hidden_size": 24}},
        {f"model.visual.{key}": value for key, value in model.state_dict().items()},
        pixels(4, [(4, 6), (5, 4, 2), (2, 8), (2, 6, 4), (6, 6)]),
        lambda image: block_states(model, image),
        {f"model.visual.{key}": p for key, p in model.named_parameters()},
        lambda last, grid: model.merger(last[in_cells(grid, 2)]),
        {
            **dict(image_processor_type="Qwen2VLImageProcessorFast", image_mean=[0.5] * 3, image_std=[0.5] * 3),
            **dict(size={"longest_edge": 16777216, "shortest_edge": 65536}, patch_size=4, merge_size=2),
            **dict(temporal_patch_size=2, resample=3),
        },
    )


def radio() -> None:
    """In a VLM whose model_type is not known, as NVIDIA's Nemotron has it."""
    from transformers import RadioModel

    from llava_packing_tower.convert.hf_towers import block_states

    vision = {
        **dict(model_type="radio", hidden_size=32, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=1.25),
        **dict(patch_size=4, image_size=16, max_img_size=20, num_cls_tokens=2, num_registers=3, layer_norm_eps=1e-6),
        **dict(norm_mean=[0.5, 0.4, 0.45], norm_std=[0.25, 0.3, 0.2], video_temporal_patch_size=2),
    }
    model = RadioModel(RadioModel.config_class(**{k: vision[k] for k in vision if k != "model_type"}))
    randomize(model, 2)
    with tempfile.TemporaryDirectory() as folder:  # under the names of the hub
        model.save_pretrained(folder)
        tensors = load_file(Path(folder) / "model.safetensors")
    # Buffers count, not the config.
    model.input_conditioner.norm_mean += 0.01
    tensors["radio_model.input_conditioner.norm_mean"] += 0.01
    named = dict(model.named_parameters())
    fused = {}
    for key in [key for key in tensors if "blocks" in key]:
        number, _, rest = key.removeprefix("radio_model.model.blocks.").partition(".")
        name = f"encoder.layer.{number}.{rest}"
        if ".attn.qkv." in name:
            fused[key] = [named[name.replace("attn.qkv", f"attention.{part}_proj")] for part in "qkv"]
        else:
            fused[key] = [named[name.replace("attn.proj", "attention.o_proj")]]
    generator = "radio_model.model.patch_generator"
    fused[f"{generator}.embedder.weight"] = [named["embeddings.patch_projection.weight"]]
    fused[f"{generator}.pos_embed"] = [named["embeddings.position_embedding"]]
    fused[f"{generator}.cls_token.token"] = [named["embeddings.cls_register_token"]]
    write(
        "radio",
        {"model_type": "nemotron_of_tomorrow", "vision_config": vision, "text_config": {"hidden_size": 24}},
        {f"vision_model.{key}": value for key, value in tensors.items()},
        pixels(4, [(4, 6), (1, 3), (7, 2), (5, 5), (3, 9)]),
        lambda image: block_states(model, image),
        {f"vision_model.{key}": parts for key, parts in fused.items()},
    )


def qwen2_5_vl() -> None:
    from transformers import Qwen2_5_VisionTransformerPretrainedModel

    from llava_packing_tower.convert.hf_towers import block_states, in_cells

    vision = {
        **dict(model_type="qwen2_5_vl", depth=3, hidden_size=32, intermediate_size=36, num_heads=2, in_chans=3),
        **dict(patch_size=4, spatial_patch_size=4, spatial_merge_size=2, temporal_patch_size=2, tokens_per_second=2),
        **dict(out_hidden_size=128, window_size=18, fullatt_block_indexes=[1], hidden_act="silu"),
    }
    cls = Qwen2_5_VisionTransformerPretrainedModel
    model = cls(cls.config_class(**{k: v for k, v in vision.items() if k not in ("model_type", "in_chans")}))
    randomize(model, 3)
    write(
        "qwen2_5_vl",
        {"model_type": "qwen2_5_vl", "vision_config": vision, "hidden_size": 128},
        {f"visual.{key}": value for key, value in model.state_dict().items()},
        pixels(4, [(4, 6), (3, 6, 10), (2, 2), (10, 4), (2, 4, 4)]),
        lambda image: block_states(model, image),
        {f"visual.{key}": p for key, p in model.named_parameters()},
        lambda last, grid: model.merger(last[in_cells(grid, 2)]),
        decoder="model.layers.{}.mlp.up_proj.weight",
    )


def moonvit() -> None:
    """Kimi-K2.5's, under the names of the hub: q, k and v in one, and what turns together side by side."""
    from transformers import Kimi_K25VisionModel
    from transformers.models.kimi_k25.configuration_kimi_k25 import Kimi_K25VisionConfig

    from llava_packing_tower.convert.hf_towers import block_states

    sizes = dict(num_hidden_layers=3, hidden_size=32, intermediate_size=40, num_attention_heads=2)
    model = Kimi_K25VisionModel(
        Kimi_K25VisionConfig(**sizes, patch_size=4, pos_emb_height=5, pos_emb_width=5, pos_emb_time=4)
    )
    randomize(model, 4)

    def turned(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(0, (2, 2, 8)).transpose(1, 2).flatten(0, 2)

    def hub(values: Callable[[str], torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """Tensors, or their gradients, under the names of the hub."""
        found = {
            "patch_embed.proj.weight": values("patch_embed.proj.weight"),
            "patch_embed.proj.bias": values("patch_embed.proj.bias"),
            "patch_embed.pos_emb.weight": values("patch_embed.pos_emb.position_embeddings"),
        }
        for kind in ("weight", "bias"):
            found[f"encoder.final_layernorm.{kind}"] = values(f"final_layernorm.{kind}")
            for i in range(3):
                block, own = f"encoder.blocks.{i}", f"layers.{i}"
                parts = [values(f"{own}.attn.{part}_proj.{kind}") for part in "qkv"]
                found[f"{block}.wqkv.{kind}"] = torch.cat([turned(parts[0]), turned(parts[1]), parts[2]])
                for old, new in (("norm0", "norm1"), ("norm1", "norm2"), ("wo", "attn.proj")):
                    found[f"{block}.{old}.{kind}"] = values(f"{own}.{new}.{kind}")
                for old, new in (("fc0", "fc1"), ("fc1", "fc2")):
                    found[f"{block}.mlp.{old}.{kind}"] = values(f"{own}.mlp.{new}.{kind}")
        return {f"vision_tower.{key}": value for key, value in found.items() if value is not None}

    named = dict(model.named_parameters())
    projector = torch.nn.ModuleDict(
        {"pre_norm": torch.nn.LayerNorm(32), "0": torch.nn.Linear(128, 128), "2": torch.nn.Linear(128, 128)}
    )
    randomize(projector, 5)
    own = {"pre_norm": "pre_norm", "0": "proj.0", "2": "proj.2"}
    tensors = {
        f"mm_projector.{own[key.partition('.')[0]]}.{key.partition('.')[2]}": value
        for key, value in projector.state_dict().items()
    }

    def merged(last: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        from llava_packing_tower.convert.hf_towers import in_cells

        x = projector["pre_norm"](model.final_layernorm(last[in_cells(grid, 2)])).view(-1, 128)
        return projector["2"](torch.nn.functional.gelu(projector["0"](x)))

    vision = {
        **{f"vt_{name}": value for name, value in sizes.items()},
        **dict(patch_size=4, init_pos_emb_height=5, init_pos_emb_width=5, init_pos_emb_time=4),
        **dict(pos_emb_type="divided_fixed", video_attn_type="spatial_temporal", merge_kernel_size=[2, 2]),
    }
    write(
        "moonvit",
        {"model_type": "kimi_k25", "vision_config": vision, "text_config": {"hidden_size": 128}},
        {**hub(lambda name: named[name].detach()), **tensors},
        pixels(4, [(4, 6), (3, 2, 4), (2, 10), (4, 4, 2), (6, 6)]),
        lambda image: block_states(model, image),
        lambda: hub(lambda name: named[name].grad),
        merged,
    )


def authors(variable: str, module: str) -> object:
    """A module of the author's code, from a clone whose folder an environment variable names."""
    sys.path.insert(0, os.environ[variable])
    return importlib.import_module(module)


def onevision2() -> None:
    """ONEVISION2: ``transformers_impl`` of a clone of EvolvingLMMs-Lab/LLaVA-OneVision-2."""
    from llava_packing_tower.convert.hf_towers import in_cells
    from llava_packing_tower.data.positions import grid_positions

    code = authors("ONEVISION2", "llavaonevision2.modeling_llava_onevision2")
    fields = {
        **dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=1, patch_size=4),
        **dict(image_size=16, out_hidden_size=48, spatial_merge_size=3, frame_windows_size=4, layer_norm_eps=1e-6),
    }
    config = code.LlavaOnevision2VisionConfig(**fields)
    config._attn_implementation = "sdpa"
    model = code.LlavaOnevision2VisionPretrainedModel(config).eval()
    randomize(model, 6)
    given = {"model_type": "llava_onevision2", "vision_config": {**fields, "model_type": "onevision_encoder"}}

    def states(image: torch.Tensor) -> list[torch.Tensor]:
        t, h, w = grid = grid_of(image, given)
        frames = image.view(3, t, h, 4, w, 4).permute(1, 2, 4, 0, 3, 5).reshape(t * h * w, -1)
        order = in_cells(grid, 3)
        out = model(
            frames[order],
            torch.tensor([grid]),
            grid_positions(grid)[order],
            output_hidden_states=True,
            skip_merger=True,
        )
        found = [*out.hidden_states[:2], out.last_hidden_state]  # (their last one is there once or twice)
        return [torch.empty_like(x.view(len(order), -1)).index_copy(0, order, x.view(len(order), -1)) for x in found]

    write(
        "onevision2",
        {**given, "text_config": {"hidden_size": 48}},
        {f"model.visual.{key}": value for key, value in model.state_dict().items()},
        pixels(4, [(3, 6), (6, 3, 3), (9, 3), (5, 3, 6)]),
        states,
        {f"model.visual.{key}": p for key, p in model.named_parameters()},
        lambda last, grid: model.merger(last[in_cells(grid, 3)]).view(-1, 48),
    )


def perception_encoder() -> None:
    """PERCEPTION_MODELS: a clone of facebookresearch/perception_models (it needs timm)."""
    code = authors("PERCEPTION_MODELS", "core.vision_encoder.pe")
    model = code.VisionTransformer(
        4, 32, 3, 2, 1.25, ls_init_value=0.5, image_size=16, use_cls_token=True, output_dim=24, attn_pooler_heads=2
    )
    randomize(model, 7)

    def states(image: torch.Tensor) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        blocks = model.transformer.resblocks
        hooks = [blocks[0].register_forward_pre_hook(lambda module, given: found.append(given[0]))]
        hooks += [b.register_forward_hook(lambda module, given, output: found.append(output)) for b in blocks]
        model.forward_features(image[None])
        for hook in hooks:
            hook.remove()
        return [state[0, 1:] for state in found]

    write(
        "perception_encoder",
        {"model_type": "perception_encoder_meta", "num_attention_heads": 2, "patch_size": 4},
        {f"visual.{key}": value for key, value in model.state_dict().items()},
        pixels(4, [(4, 4), (3, 5), (1, 7), (6, 2)]),
        states,
        {f"visual.{key}": p for key, p in model.named_parameters()},
    )


MAKERS = {
    "qwen3_vl": qwen3_vl,
    "radio": radio,
    "qwen2_5_vl": qwen2_5_vl,
    "moonvit": moonvit,
    "onevision2": onevision2,
    "perception_encoder": perception_encoder,
}

if __name__ == "__main__":
    for chosen in sys.argv[1:] or MAKERS:
        MAKERS[chosen]()
