"""transformers' own models of the families, run image by image: the reference for the packed encoders."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import transformers
from packaging.version import Version
from torch import nn

from ..checkpoint.hub import resolve_folder
from ..utils.files import CONFIG_NAME, read_json
from .hf_towers import block_states, load_tower


class NoReference(Exception):
    """This transformers has no model of the family, or none that reads the checkpoint."""


@dataclass(frozen=True)
class TransformersFamily:
    """Names in transformers: the vision model, the whole model with its ``model_type`` (if there is one), and the
    version that brought them."""

    vision: str
    since: str
    whole: str | None = None
    whole_type: str | None = None
    tower: str | None = None
    """Of a VLM's vision tower: the pattern that its tensors' names begin with, as ``tower_prefix``."""


# by the model_type of the packed encoder
IN_TRANSFORMERS: dict[str, TransformersFamily] = {
    "siglip2_packing": TransformersFamily("Siglip2VisionModel", "4.49", "Siglip2Model", "siglip2"),
    "aimv2_packing": TransformersFamily("Aimv2VisionModel", "4.54", "Aimv2Model", "aimv2"),
    "dinov3_packing": TransformersFamily("DINOv3ViTModel", "4.56"),
    "qwen2_5_vl_packing": TransformersFamily(
        "Qwen2_5_VisionTransformerPretrainedModel", "4.56", tower=r"(model\.)?visual\."
    ),
    "radio_packing": TransformersFamily("RadioModel", "5.24", tower=r"(vision_model\.)?(?=radio_model\.)"),
    "qwen3_vl_packing": TransformersFamily("Qwen3VLVisionModel", "4.57", tower=r"(model\.)?visual\."),
}


def require_reference(model_type: str) -> TransformersFamily:
    """What transformers calls the family. Raises :class:`NoReference` if this transformers does not have it."""
    names = IN_TRANSFORMERS.get(model_type)
    if names is None:
        raise NoReference(
            f"transformers has no model to compare {model_type} with (it has them for {', '.join(IN_TRANSFORMERS)}); "
            f"LlavaViT checkpoints are compared by `llava-packing verify`"
        )
    if not hasattr(transformers, names.vision):
        raise NoReference(
            f"transformers {transformers.__version__} has no {names.vision}: comparing needs transformers "
            f"{names.since} or newer (the packed encoder itself runs on this one)"
        )
    return names


class Reference:
    """A vision model of transformers with the weights of a checkpoint, every one of them loaded.

    Args:
        model_type: of the packed encoder, e.g. ``siglip2_packing``.
        ckpt: folder or hub id of the original checkpoint.
        dtype, device: of the weights.

    Raises:
        NoReference: transformers lacks the family, or would leave weights of this checkpoint random.
    """

    def __init__(
        self, model_type: str, ckpt: str | os.PathLike, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        names = require_reference(model_type)
        folder = resolve_folder(ckpt, part=lambda raw: names.tower)
        self.model_type, self.prefix = model_type, 0
        if names.tower is not None:
            self.model: nn.Module = load_tower(getattr(transformers, names.vision), folder, names.tower, dtype)
            self.model.to(device).eval()
            return
        whole = names.whole is not None and read_json(folder / CONFIG_NAME).get("model_type") == names.whole_type
        cls = getattr(transformers, names.whole if whole else names.vision)
        name = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"
        model, info = cls.from_pretrained(folder, **{name: dtype}, output_loading_info=True)
        if missing := sorted(info["missing_keys"]):
            raise NoReference(
                f"transformers' {cls.__name__} does not fully read {folder}: it would leave {len(missing)} tensors "
                f"random, for example {missing[0]} (AIMv2 files with the remote-code names are such a case)"
            )
        if whole:
            part, vision = model.vision_model, getattr(transformers, names.vision)
            if isinstance(part, vision):
                model = part
            else:  # transformers 4: the inner module alone does not collect hidden states
                model = vision(part.config)
                model.vision_model = part
        self.model = model.to(device).eval()
        config = getattr(model, "config", None)
        self.patch_size = config.patch_size
        if model_type == "dinov3_packing":
            self.prefix = 1 + config.num_register_tokens

    def round_weights(self, dtype: torch.dtype) -> None:
        """Give every weight the value it has in ``dtype``, keeping its own dtype (buffers stay exact)."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(parameter.to(dtype))

    def _run(self, image: torch.Tensor, **options):
        parameter = next(self.model.parameters())
        image = image.to(parameter.device, parameter.dtype)
        if self.model_type != "siglip2_packing":
            return self.model(image.unsqueeze(0), **options)
        p = self.patch_size
        cut = image.unfold(1, p, p).unfold(2, p, p)  # [C, h, w, p, p]
        h, w = cut.shape[1:3]
        rows = cut.permute(1, 2, 3, 4, 0).reshape(1, h * w, -1)
        mask = torch.ones(1, h * w, dtype=torch.int64, device=parameter.device)
        shapes = torch.tensor([[h, w]], device=parameter.device)
        return self.model(rows, pixel_attention_mask=mask, spatial_shapes=shapes, **options)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Final-normed patch tokens ``[h*w, hidden]`` of one image ``[C, H, W]`` (or clip ``[C, T, H, W]``)."""
        if IN_TRANSFORMERS[self.model_type].tower is not None:
            return block_states(self.model, image)[-1]
        return self._run(image).last_hidden_state[0, self.prefix :]

    def hidden_states(self, image: torch.Tensor) -> torch.Tensor:
        """All hidden states ``[layers + 1, h*w, hidden]`` of one image, prefix tokens taken out."""
        if IN_TRANSFORMERS[self.model_type].tower is not None:
            return torch.stack(block_states(self.model, image))
        states = self._run(image, output_hidden_states=True).hidden_states
        return torch.stack([state[0, self.prefix :] for state in states])
