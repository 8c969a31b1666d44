"""The building blocks that all encoder families share: norms, fused qkv attention, MLP, LayerScale, the block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from ..attention.dispatch import attend
from ..data.patches import PatchLayout
from ..data.segments import VarlenMetadata
from ..kernels.rotary import ROTATE, apply_rotary
from .activations import activation

Rotary = tuple[torch.Tensor, torch.Tensor]
OLD_ROTARY = {"pairs": "interleaved", "halves": "half"}  # the names before 0.2, which families from outside may use


@dataclass(frozen=True)
class BlockConfig:
    """What one encoder block is made of; the families fill it from their own configs.

    norm: "layer_norm" or "rms_norm". qkv_bias: for q, k and v. rotary: None, "interleaved" (element 2m with 2m+1) or
    "half" (element j with j + head_dim/2). layer_scale: learned factor per channel behind attention and MLP.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    hidden_act: str
    norm: str = "layer_norm"
    norm_eps: float = 1e-6
    gated_mlp: bool = False
    qkv_bias: tuple[bool, bool, bool] = (True, True, True)
    proj_bias: bool = True
    mlp_bias: bool = True
    layer_scale: float | None = None
    rotary: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rotary", OLD_ROTARY.get(self.rotary or "", self.rotary))
        if self.rotary not in (None, *ROTATE):
            raise ValueError(f"unknown rotary {self.rotary!r}; choose one of {', '.join(ROTATE)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads")
        if self.norm not in NORMS:
            raise ValueError(f"unknown norm {self.norm!r}; choose one of {', '.join(NORMS)}")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"unknown activation {self.hidden_act!r}")

    @classmethod
    def of(cls, config: PretrainedConfig, **others: Any) -> BlockConfig:
        """With the sizes and the activation of a family's config, and the fields that differ from the defaults."""
        sizes = config.hidden_size, config.intermediate_size, config.num_attention_heads
        return cls(*sizes, config.hidden_act, **others)

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_attention_heads

    def check_rotary(self, axes: int, unit: int) -> None:
        """Raises ``ValueError`` if rotary positions over so many axes do not fit the heads."""
        if self.head_dim % unit:
            raise ValueError(
                f"hidden_size {self.hidden_size} with {self.num_attention_heads} heads gives head width "
                f"{self.head_dim}; {axes}-D rotary positions need a multiple of {unit}"
            )


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps)`` in float32, cast back, times the weight (Zhang and Sennrich 2019)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., hidden]`` to the same shape and dtype."""
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


NORMS = {"layer_norm": nn.LayerNorm, "rms_norm": RMSNorm}


def make_norm(kind: str, hidden_size: int, eps: float) -> nn.Module:
    """A norm over the last dimension; ``kind`` is a key of :data:`NORMS`."""
    return NORMS[kind](hidden_size, eps=eps)


class PatchProjection(nn.Conv2d):
    """A patch convolution (kernel = stride = patch), which for single patches is one matrix product.

    It is made and called as any convolution: an adapter takes its place, and makes others of its class.

    layout: how the numbers of a patch lie in memory, which makes no difference to the result.
    """

    def __init__(self, *args: Any, layout: PatchLayout = PatchLayout.CHANNEL_FIRST, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.layout = layout

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """``[B, C, H, W]`` to ``[B, hidden, H / p, W / p]``."""
        weight = self.weight
        if images.dim() != 4 or images.shape[1:] != weight.shape[1:] or self.padding != (0, 0):
            return super().forward(images)
        if self.layout is PatchLayout.CHANNEL_LAST:  # as the rows lie in memory
            images, weight = images.permute(0, 2, 3, 1), weight.permute(0, 2, 3, 1)
        return F.linear(images.flatten(1), weight.flatten(1), self.bias)[..., None, None]


class PatchEmbed(nn.Module):
    """Ready-cut patch rows, each of them an image of one patch to the projection."""

    def __init__(self, num_channels: int, hidden_size: int, patch_size: int, bias: bool, layout: PatchLayout) -> None:
        super().__init__()
        self.proj = PatchProjection(num_channels, hidden_size, patch_size, patch_size, bias=bias, layout=layout)
        self.layout, self.patch_size = layout, patch_size

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """``[N, C * p * p]`` in the row layout to ``[N, hidden]``."""
        side = self.patch_size
        if self.layout is PatchLayout.CHANNEL_FIRST:
            patches = rows.view(len(rows), -1, side, side)
        else:
            patches = rows.view(len(rows), side, side, -1).permute(0, 3, 1, 2)
        return self.proj(patches).flatten(1)


class FusedQKV(nn.Linear):
    """q, k and v in one product, weight ``[3 * hidden, hidden]`` in the order q, k, v.

    With a bias on only some of the three (DINOv3 has none on k), these are parameters of their own, ``q_bias``,
    ``k_bias``, ``v_bias``: a bias that the original does not have is never trained.
    """

    def __init__(self, hidden_size: int, biases: tuple[bool, bool, bool]) -> None:
        super().__init__(hidden_size, 3 * hidden_size, bias=all(biases))
        self.partial_biases = not all(biases) and any(biases)
        if self.partial_biases:
            for name, present in zip("qkv", biases, strict=True):
                parameter = nn.Parameter(torch.zeros(hidden_size)) if present else None
                self.register_parameter(f"{name}_bias", parameter)

    def whole_bias(self) -> torch.Tensor | None:
        """One bias for all three, ``[3 * hidden]``, or None."""
        if not self.partial_biases:
            return self.bias
        zeros = self.weight.new_zeros(self.in_features)
        biases: tuple[Any, ...] = (self.q_bias, self.k_bias, self.v_bias)
        return torch.cat([zeros if bias is None else bias for bias in biases])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, hidden]`` to ``[N, 3 * hidden]``: q, k and v."""
        return F.linear(x, self.weight, self.whole_bias())


class PackedAttention(nn.Module):
    """Multi-head self-attention inside each segment of a packed sequence."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.qkv = FusedQKV(config.hidden_size, config.qkv_bias)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.proj_bias)
        self.rotate = ROTATE[config.rotary] if config.rotary else None

    def forward(
        self,
        x: torch.Tensor,
        segments: VarlenMetadata,
        rotary: Rotary | None,
        backend: str,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``[N, hidden]`` to ``[N, hidden]``, plus ``residual`` where one is given."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        if rotary is None or self.rotate is None:
            q, k, v = qkv.unbind(1)
        else:
            q, k, v = apply_rotary(qkv, *rotary, self.rotate)
        out = self.proj(attend(q, k, v, segments.to(q.device), backend=backend).flatten(1))
        return out if residual is None else residual + out


class MLP(nn.Module):
    """``fc2(act(fc1(x)))``, or gated ``fc2(act(gate(x)) * fc1(x))`` (GLU variants, Shazeer 2020)."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        hidden, wide, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate = nn.Linear(hidden, wide, bias=bias) if config.gated_mlp else None
        self.fc1 = nn.Linear(hidden, wide, bias=bias)
        self.fc2 = nn.Linear(wide, hidden, bias=bias)
        self.act = activation(config.hidden_act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, hidden]`` to ``[N, hidden]``."""
        inner = self.act(self.fc1(x)) if self.gate is None else self.act(self.gate(x)) * self.fc1(x)
        return self.fc2(inner)


class LayerScale(nn.Module):
    """A learned factor per channel (Touvron et al. 2021)."""

    def __init__(self, hidden_size: int, value: float) -> None:
        super().__init__()
        self.value = value
        self.weight = nn.Parameter(torch.full((hidden_size,), value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class EncoderBlock(nn.Module):
    """Pre-norm transformer block over a packed sequence ``[N, hidden]``.

    The last residual sum of a block is left to the next one: a block takes and returns ``(hidden_states, pending)``,
    whose sum is the state, so that the addition can be fused with the norm that follows. (In fused blocks without
    gradients, ``pending`` is one row for all tokens, or None.)
    """

    _z3_leaf = True  # read by DeepSpeed: ZeRO-3 gathers a block's weights at once, for half the host's time per step

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.layer_norm1 = make_norm(config.norm, config.hidden_size, config.norm_eps)
        self.self_attn = PackedAttention(config)
        self.layer_norm2 = make_norm(config.norm, config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)
        scale = config.layer_scale
        self.layer_scale1 = nn.Identity() if scale is None else LayerScale(config.hidden_size, scale)
        self.layer_scale2 = nn.Identity() if scale is None else LayerScale(config.hidden_size, scale)

    def forward(
        self,
        hidden_states: torch.Tensor,
        pending: torch.Tensor | None,
        segments: VarlenMetadata,
        rotary: Rotary | None,
        backend: str,
        body: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``hidden_states`` and ``pending`` ``[N, hidden]``, in and out.

        body: called as ``body(self, ...)`` with the same arguments instead of the modules (see :mod:`.runtime.fused`).
        """
        if body is not None:
            return body(self, hidden_states, pending, segments, rotary, backend)
        if pending is not None:
            hidden_states = hidden_states + pending
        normed = self.layer_norm1(hidden_states)
        if isinstance(self.layer_scale1, nn.Identity):
            hidden_states = self.self_attn(normed, segments, rotary, backend, residual=hidden_states)
        else:
            hidden_states = hidden_states + self.layer_scale1(self.self_attn(normed, segments, rotary, backend))
        return hidden_states, self.layer_scale2(self.mlp(self.layer_norm2(hidden_states)))
