"""Whose weights these are: the ways in which supported encoders are published without transformers' config.json.

Names of tensors tell. Each way has a word that stands for the ``model_type`` that no config.json says; the family that
lists the word in ``source_model_types`` reads it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Naming:
    """One way of naming the tensors of a family.

    model_type: what stands for a ``model_type``. whose: for messages. signature: every one of these regular
    expressions matches a tensor. telling: a name that only these have, for what is incomplete. architecture: what
    timm's name of the model must match, where a config.json has one. values: small tensors whose numbers say something
    that shapes do not.
    """

    model_type: str
    whose: str
    signature: tuple[str, ...]
    telling: str
    architecture: str = ""
    values: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()

    def fits(self, names: Mapping[str, object]) -> bool:
        return _has(names, self.signature) and not any(_has(names, (rule,)) for rule in self.lacking)


NAMINGS = (
    Naming(
        "dinov3_meta",
        "Meta's own file of DINOv3",
        (r"rope_embed\.periods", r"blocks\.\d+\.attn\.qkv\.weight", r"blocks\.\d+\.ls1\.gamma"),
        r"storage_tokens|rope_embed\.periods|blocks\.\d+\.attn\.qkv\.bias_mask",
        values=("rope_embed.periods",),
    ),
    Naming(
        "dinov3_timm",
        "timm's DINOv3",
        (r"reg_token", r"blocks\.\d+\.gamma_1", r"blocks\.\d+\.attn\.qkv\.weight"),
        r"reg_token",
        architecture=r"vit_\w+_patch\d+_dinov3(_qkvb)?(\..*)?",
    ),
    Naming(
        "siglip2_timm",
        "timm's SigLIP2 NaFlex",
        (r"embeds\.proj\.weight", r"embeds\.pos_embed"),
        r"embeds\.(proj\.weight|pos_embed)",
        architecture=r"naflexvit_\w+_siglip(\..*)?",
    ),
    Naming(
        "siglip2_big_vision",
        "Google's own file of SigLIP2",
        (r"(params/)?img/embedding/kernel", r"(params/)?img/pos_embedding"),
        r"(params/)?img/(embedding|Transformer)/.*",
    ),
    Naming(
        "aimv2_timm",
        "timm's AIMv2",
        (r"patch_embed\.norm\.weight", r"blocks\.\d+\.mlp\.fc1_g\.weight", r"pos_embed"),
        r"blocks\.\d+\.mlp\.fc1_g\.weight",
        architecture=r"aimv2_.*",
    ),
    Naming(
        "perception_encoder_meta",
        "Meta's own file of Perception Encoder",
        (
            r"(visual\.)?conv1\.weight",
            r"(visual\.)?(attn_pool\.probe|transformer\.resblocks\.\d+\.ls_1\.gamma)",
            r"(visual\.)?transformer\.resblocks\.\d+\.attn\.in_proj_weight",
        ),
        r"(visual\.)?attn_pool\.probe",
    ),
    Naming(
        "perception_encoder_timm",
        "timm's Perception Encoder",
        (r"norm_pre\.weight", r"blocks\.\d+\.attn\.qkv\.bias", r"pos_embed", r"attn_pool\.latent|blocks\.\d+\.gamma_1"),
        r"norm_pre\.weight",
        architecture=r"vit_pe_(core|lang|spatial)_\w+(\..*)?",
    ),
    # Without pooling and factors its tensors are named like a CLIP's, which has a norm behind the last block.
    Naming(
        "perception_encoder_meta",
        "Meta's own file of PE-Spatial",
        (
            r"(visual\.)?conv1\.weight",
            r"(visual\.)?ln_pre\.weight",
            r"(visual\.)?positional_embedding",
            r"(visual\.)?transformer\.resblocks\.\d+\.attn\.in_proj_weight",
        ),
        r"(visual\.)?transformer\.resblocks\.\d+\.ls_1\.gamma",
        lacking=(r"(visual\.)?ln_post\.weight", r"(visual\.)?proj"),
    ),
    Naming(
        "perception_encoder_timm",
        "timm's PE-Spatial",
        (r"norm_pre\.weight", r"blocks\.\d+\.attn\.qkv\.bias", r"pos_embed"),
        r"norm_pre\.weight",
        architecture=r"vit_pe_spatial_\w+(\..*)?",
        lacking=(r"(fc_)?norm\.weight",),
    ),
    Naming(
        "radio_nvidia",
        "NVIDIA's own file of RADIO",
        (
            r"radio_model\.model\.patch_generator\.embedder\.weight",
            r"radio_model\.model\.blocks\.\d+\.attn\.qkv\.weight",
        ),
        r"radio_model\.model\..*",
    ),
    Naming(
        "aimv2_apple",
        "Apple's own file of AIMv2",
        (r"(image_encoder\.)?preprocessor\.patchifier\.norm\.weight", r"(image_encoder\.)?trunk\.post_trunk_norm\..*"),
        r"((image_encoder|trunk)\.)?preprocessor\.(patchifier|pos_embed).*",
    ),
)

# What is recognized only to be refused: whose it is, names that tell, and what to do.
OTHERS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("DINOv3 with transformers' names", (r"(model\.)?layer\.\d+\.layer_scale1\.lambda1",), "it needs its config.json"),
    ("SigLIP2 with transformers' names", (r"(vision_model\.)?embeddings\.position_embedding\.weight",
     r"(vision_model\.)?encoder\.layers\.\d+\.layer_norm1\.weight"), "it needs its config.json"),
    ("AIMv2 with transformers' names", (r"((vision_model\.)?encoder\.)?layers\.\d+\.rms_norm1\.weight",),
     "it needs its config.json"),
    ("a LlavaViT checkpoint without config.json", (r"conv1\.weight", r"transformer\.layers\.\d+\.mlp\.0\.weight"),
     "convert it: llava-packing convert FILE --model_name NAME"),
    ("a LlavaViT checkpoint without config.json", (r"embeddings\.patch_embedding\.weight|patch_embed\.proj\.weight",
     r"layernorm_pre\.weight"), "convert it: llava-packing convert FILE --model_name NAME"),
    ("a DINOv3 ConvNeXt", (r"(stages\.\d+\.\d+\.gamma|stages\.\d+\.layers\.\d+\.gamma)",), "it has no patches to pack"),
    ("a DINOv2", (r"blocks\.\d+\.ls1\.gamma", r"pos_embed"), "there is no packed encoder of it"),
    ("an EVA of timm", (r"blocks\.\d+\.gamma_1",), "there is no packed encoder of it"),
    ("a CLIP", (r"visual\.(conv1\.weight|trunk\..*)",), "there is no packed encoder of it"),
    ("a SigLIP of timm with one resolution", (r"attn_pool\.latent", r"pos_embed"), "NaFlex ones are read"),
    ("AIM version 1", (r"(module\.)?trunk\.blocks\.\d+\.norm_1\.bias",), "AIMv2 is read"),
)  # fmt: skip


def _has(names: Mapping[str, object], signature: tuple[str, ...]) -> bool:
    return all(any(re.fullmatch(rule, name) for name in names) for rule in signature)


def recognized(raw: Mapping, shapes: Mapping[str, tuple[int, ...]], where: object) -> Naming | None:
    """Whose weights these are, from their names and from the ``architecture`` of timm's config.json; None for none of
    the table.

    Raises ``ValueError`` where timm's config.json names a model that the weights, or this package, do not have.
    """
    found = next((naming for naming in NAMINGS if naming.fits(shapes)), None)
    name = raw.get("architecture")
    if name is None or (found and re.fullmatch(found.architecture, str(name))):
        return found
    known = ", ".join(naming.architecture for naming in NAMINGS if naming.architecture)
    seen = f"its tensors are named like {found.whose}" if found else "its tensors are named like none of the known ones"
    raise ValueError(
        f"{where}: timm's model {name!r:.80} has no packed encoder here ({seen}); timm's models that are read: {known}"
    )


def refusal(shapes: Mapping[str, tuple[int, ...]], where: object) -> str:
    """Why weights without a known config.json cannot be read, with what they look like."""
    for naming in NAMINGS:
        if _has(shapes, (naming.telling,)):
            missing = [rule for rule in naming.signature if not _has(shapes, (rule,))]
            return f"{where} looks like {naming.whose}, but has no tensors named {', '.join(missing)}"
    for whose, signature, then in OTHERS:
        if _has(shapes, signature):
            return f"{where} looks like {whose}: {then}"
    known = ", ".join(naming.whose for naming in NAMINGS)
    return (
        f"{where} has no config.json with a model_type, and its tensors are named like none of {known} "
        f"(first names: {', '.join(list(shapes)[:4])})"
    )
