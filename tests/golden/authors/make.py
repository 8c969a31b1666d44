"""Makes the golden files of this folder with the encoders' authors' own code (and timm), tiny and with random weights.

    python tests/golden/authors/make.py meta  CLONE_OF facebookresearch/dinov3
    python tests/golden/authors/make.py apple CLONE_OF apple/ml-aim
    python tests/golden/authors/make.py timm
    python tests/golden/authors/make.py google CLONE_OF google-research/big_vision   (jax, flax, scipy; no torch)

Each writes weights as their authors publish them, and ``<name>.case.npz``: ``pixels.i`` ``[3, H, W]`` and
``tokens.i`` ``[h * w, hidden]``, the final-normed patch tokens of that image, computed image by image in float32.
Made with dinov3 6876159, ml-aim 55e8d4f, big_vision 0127fb6, timm 1.0.31, torch 2.13, jax 0.10.2.
"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
GRIDS = ((3, 5), (4, 4), (1, 7))


def pictures(patch, grids=GRIDS):
    draw = np.random.default_rng(11)
    return [draw.standard_normal((3, h * patch, w * patch), dtype=np.float32) for h, w in grids]


def save_case(name, images, tokens):
    arrays = {f"pixels.{i}": image for i, image in enumerate(images)}
    arrays |= {f"tokens.{i}": np.asarray(rows, dtype=np.float32) for i, rows in enumerate(tokens)}
    np.savez_compressed(HERE / f"{name}.case.npz", **arrays)
    print(name, [rows.shape for rows in tokens])


def fill(state, keep=()):
    """Random values in place of the initial ones, of a size that makes every tensor matter."""
    import torch

    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in state.items():
            if any(word in name for word in keep):
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            scale = 0.3 if tensor.dim() < 2 else 1.5 / tensor[0].numel() ** 0.5
            tensor.copy_(noise * scale + (1.0 if tensor.dim() == 1 and name.endswith("weight") else 0.0))


def tokens_of(forward, images):
    import torch

    with torch.no_grad():
        return [forward(torch.from_numpy(image)[None])[0].numpy() for image in images]


def meta(clone):
    sys.path.insert(0, clone)
    import torch
    from dinov3.models.vision_transformer import DinoVisionTransformer

    common = dict(
        patch_size=4,
        embed_dim=48,
        depth=2,
        num_heads=2,
        ffn_ratio=2,
        norm_layer="layernormbf16",
        layerscale_init=1e-5,
        pos_embed_rope_dtype="fp32",
        pos_embed_rope_rescale_coords=2,
    )
    kinds = {
        "dinov3_meta": dict(n_storage_tokens=4, mask_k_bias=True, untie_global_and_local_cls_norm=True),
        "dinov3_meta_gated": dict(n_storage_tokens=2, qkv_bias=False, ffn_layer="swiglu64"),
    }
    for name, options in kinds.items():
        model = DinoVisionTransformer(**common, **options)
        model.init_weights()
        fill(model.state_dict(), keep=("periods", "bias_mask"))
        model.eval()
        images = pictures(4)
        save_case(name, images, tokens_of(lambda x, m=model: m.forward_features(x)["x_norm_patchtokens"], images))
        torch.save(model.state_dict(), HERE / f"{name}.pth")


def apple(clone):
    for part in ("aim-v1", "aim-v2"):
        sys.path.insert(0, f"{clone}/{part}")
    import aim

    aim.__path__ = [f"{clone}/aim-v1/aim", f"{clone}/aim-v2/aim"]
    from aim.v2.torch.models import AIMv2VisionEncoder
    from safetensors.torch import save_file

    for name, kind in (("aimv2_apple_native", "sincos"), ("aimv2_apple_learned", "absolute")):
        model = AIMv2VisionEncoder(
            img_size=16,
            patch_size=4,
            embed_dim=48,
            mlp_hidden_dim=64,
            num_blocks=2,
            num_heads=2,
            pos_embed_type=kind,
            use_bias=False,
        )
        fill(model.state_dict())
        images = pictures(4, ((4, 4),) * 2 if kind == "absolute" else GRIDS)
        save_case(name, images, tokens_of(model.eval(), images))
        save_file(model.state_dict(), HERE / f"{name}.safetensors")


def timm_folders(*only):
    import timm
    import torch
    from timm.models import save_for_hf

    sizes = dict(depth=2, embed_dim=48, num_heads=2, patch_size=4)
    for name, architecture, more in (
        ("dinov3_timm", "vit_small_patch16_dinov3_qkvb", dict(img_size=16)),
        ("dinov3_timm_gated", "vit_small_plus_patch16_dinov3", dict(img_size=16)),
        ("aimv2_timm", "aimv2_large_patch14_224", dict(img_size=16)),
        ("siglip2_timm", "naflexvit_base_patch16_siglip", {}),
        ("pe_core_timm", "vit_pe_core_tiny_patch16_384", dict(img_size=16, ref_feat_shape=(4, 4), num_classes=8)),
        ("pe_lang_timm", "vit_pe_lang_large_patch14_448", dict(img_size=16, ref_feat_shape=(4, 4))),
        ("pe_spatial_timm", "vit_pe_spatial_tiny_patch16_512", dict(img_size=16, ref_feat_shape=(4, 4))),
        ("pe_spatial_timm_giant", "vit_pe_spatial_gigantic_patch14_448", dict(img_size=16, ref_feat_shape=(4, 4))),
    ):
        if only and name not in only:
            continue
        model = timm.create_model(architecture, **sizes, **more)
        fill(model.state_dict())
        images = pictures(4, ((4, 4),) * 2 if name.startswith(("aimv2", "pe_")) else GRIDS)
        save_for_hf(model, HERE / name, safe_serialization=True)
        skip = getattr(model, "num_prefix_tokens", 0)

        def forward(x, model=model, skip=skip, naflex=name == "siglip2_timm"):
            if naflex:
                p = 4
                cut = x.unfold(2, p, p).unfold(3, p, p)
                h, w = cut.shape[2:4]
                rows = cut.permute(0, 2, 3, 4, 5, 1).reshape(1, h * w, -1)
                places = torch.cartesian_prod(torch.arange(h), torch.arange(w)).view(1, h * w, 2)
                found = model.forward_features(rows, places, torch.ones(1, h * w, dtype=torch.bool))
                return found["patches"] if isinstance(found, dict) else found
            return model.forward_features(x)[:, skip:]

        model.eval()
        save_case(name, images, tokens_of(forward, images))


def google(clone):
    sys.path.insert(0, clone)
    import jax
    from big_vision.models.proj.image_text import naflex_vit

    patch, images = 4, pictures(4)
    for name, scan in (("siglip2_big_vision", False), ("siglip2_big_vision_scan", True)):
        options = dict(width=48, depth=2, mlp_dim=64, num_heads=2, pool_type="map", nposemb=4, posemb="learn_2d(16)")
        model = naflex_vit._Model(**options, scan=scan)

        def packed(image):
            h, w = image.shape[1] // patch, image.shape[2] // patch
            rows = image.reshape(3, h, patch, w, patch).transpose(1, 3, 2, 4, 0).reshape(1, h * w, -1)
            y, x = (grid.reshape(1, -1) for grid in np.mgrid[:h, :w])
            return rows, np.ones((1, h * w), np.int32), y, x

        params = model.init(jax.random.PRNGKey(0), packed(images[0]))["params"]
        draw = np.random.default_rng(5)
        flat, tree = jax.tree_util.tree_flatten_with_path(params)
        values = []
        for path, value in flat:
            noise = draw.standard_normal(value.shape, dtype=np.float32)
            kernel, scale = "kernel" in str(path[-1]), "scale" in str(path[-1])
            values.append(noise * 0.2 if kernel else noise * 0.3 + float(scale))
        params = jax.tree_util.tree_unflatten(tree, values)
        with jax.default_matmul_precision("float32"):
            tokens = [np.asarray(model.apply({"params": params}, packed(image))[1]["encoded"][0]) for image in images]
        save_case(name, images, tokens)
        names = ["/".join(str(getattr(key, "key", key)) for key in path) for path, _ in flat]
        stored = {f"params/img/{name}": value for name, value in zip(names, values)}
        stored |= {"params/t": np.zeros(1, np.float32), "params/b": np.zeros(1, np.float32)}
        stored["params/txt/head/bias"] = np.zeros(4, np.float32)
        np.savez(HERE / f"{name}.npz", **stored)


if __name__ == "__main__":
    {"meta": meta, "apple": apple, "timm": timm_folders, "google": google}[sys.argv[1]](*sys.argv[2:])
