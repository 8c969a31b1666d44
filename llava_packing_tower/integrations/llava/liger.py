"""Fused decoder layers from liger-kernel (https://github.com/linkedin/Liger-Kernel), where it is installed.

RMSNorm, the rotary embedding of packed rows and SwiGLU only, at the decoder's classes: ``forward`` of the model and the
cross entropy stay, since liger's own ``apply_liger_kernel_to_*`` would put a ``forward`` there that knows no images.
RMSNorm is torch's own kernel where torch has one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import nn

from .patcher import Patches

INSTALL = "pip install liger-kernel"
LARGEST_ERROR = 2.0  # times the rounding error that eager layers make in this dtype
_ON = "_llava_packing_liger"
TORCH_NORM = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 9)
"""Whether ``torch.nn.functional.rms_norm`` is one kernel on CUDA. It rounds once where liger's rounds twice, its
backward takes three quarters of the time at widths below 4,096, and a call costs the host a third."""

try:
    from liger_kernel.transformers.functional import liger_rms_norm, liger_rope, liger_swiglu

    missing_package = None
except Exception as error:  # whatever a wrong mix of triton and liger raises: training must not need it
    missing_package = f"not installed ({error}): {INSTALL}".replace("\n", " ")


def unsupported_liger(model: nn.Module, asked: bool | None) -> str | None:
    """None if liger-kernel can compute the layers of this decoder, else why not.

    asked: switched on or off by a key; None where nothing is said. Raises ``ValueError`` if it is asked for and cannot
    be imported.
    """
    if asked is False:
        return "mm_packing_liger: false"
    if missing_package is not None:
        if asked:
            raise ValueError(f"use_liger_kernel is true, but liger-kernel is {missing_package}")
        return missing_package
    parameter = next(model.model.layers.parameters())
    if parameter.device.type != "cuda":
        return "needs a CUDA GPU"
    layer = model.model.layers[0]
    return _unlike(layer) or wrong_layers(layer, parameter.device, model.model.norm.weight.dtype)


def _unlike(layer: nn.Module) -> str | None:
    """None for a decoder layer of RMSNorm, rotary embedding and SwiGLU as liger-kernel has them."""
    norm, mlp = getattr(layer, "input_layernorm", None), getattr(layer, "mlp", None)
    if not hasattr(norm, "variance_epsilon") or not type(norm).__name__.endswith("RMSNorm"):
        return f"{type(norm).__name__} is no RMSNorm"
    if not all(hasattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return f"{type(mlp).__name__} is no SwiGLU"
    if type(mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        return f"the activation is {type(mlp.act_fn).__name__}"
    return None


# ---------------------------------------------------------------- the layers


def fuse_layers(model: nn.Module, patches: Patches, on: bool) -> None:
    """Have the layers of this decoder compute with liger-kernel on CUDA, or no longer do so. Idempotent.

    ``forward`` of their classes is wrapped, and other models of these classes go on as before. on: only for a decoder
    of which :func:`unsupported_liger` returns None; off, any model may be given.
    """
    if not on:
        for module in model.modules():
            vars(module).pop(_ON, None)
        return
    decoder = model.model
    for layer in decoder.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm, decoder.norm):
            _switch_on(norm, _norm, patches)
        _switch_on(layer.mlp, _swiglu, patches)
        setattr(layer.self_attn, _ON, True)  # asked by the attention of packed rows


def _switch_on(module: nn.Module, make: Callable[[Callable], Callable], patches: Patches) -> None:
    setattr(module, _ON, True)
    original = type(module).forward
    if not hasattr(original, _ON):
        fused = functools.wraps(original)(make(original))
        setattr(fused, _ON, True)
        patches.set(type(module), "forward", fused)


def is_fused(module: nn.Module) -> bool:
    """Whether :func:`fuse_layers` has this module compute with liger-kernel."""
    return vars(module).get(_ON, False)


def on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda


def fused_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of ``x [..., width]``, in its dtype; weight: ``[width]``."""
    if TORCH_NORM:
        return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
    return liger_rms_norm(x, weight, eps, in_place=False)  # in place, it would change what may be others' gradient


def _norm(original: Callable) -> Callable:
    def forward(self, hidden_states):
        if not is_fused(self) or not on_gpu(hidden_states) or hidden_states.dtype != self.weight.dtype:
            return original(self, hidden_states)
        return fused_norm(hidden_states, self.weight, self.variance_epsilon)

    return forward


def _swiglu(original: Callable) -> Callable:
    def forward(self, x):
        if not is_fused(self) or not on_gpu(x):
            return original(self, x)
        return self.down_proj(liger_swiglu(self.gate_proj(x), self.up_proj(x)))

    return forward


def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *positions: torch.Tensor):
    """transformers' ``apply_rotary_pos_emb`` with liger-kernel, which writes into ``q`` and ``k``.

    q, k: ``[1, heads, T, head_dim]``; cos, sin: ``[1, T, head_dim]``, or tables from which ``positions`` take theirs.
    """
    if positions:
        cos, sin = cos[positions[0]], sin[positions[0]]
    return liger_rope(q, k, cos, sin)


# ---------------------------------------------------------------- the check


def wrong_layers(layer: nn.Module, device: torch.device, dtype: torch.dtype) -> str | None:
    """None if liger-kernel's layers are right here: at most twice as far from float64 as eager ones of this dtype.

    Random tensors of the layer's widths; values and gradients are compared. The user's random numbers are not drawn.
    """
    norm, mlp, attention = layer.input_layernorm, layer.mlp, layer.self_attn
    width, middle = layer.hidden_size, mlp.down_proj.in_features
    head, generator = attention.head_dim, torch.Generator(device).manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    def eager_norm(x, weight):
        x = x * torch.rsqrt(x.to(torch.promote_types(x.dtype, torch.float32)).pow(2).mean(-1, True) + eps)
        return weight * x.to(weight.dtype)

    def eager_rotary(q, k, cos, sin):
        turned = (torch.cat((-x[..., head // 2 :], x[..., : head // 2]), dim=-1) for x in (q, k))
        return torch.cat([x * cos[:, None] + y * sin[:, None] for x, y in zip((q, k), turned)], dim=1)

    def eager_swiglu(a, b):
        return torch.nn.functional.silu(a) * b

    def fused_rotary(q, k, cos, sin):
        return torch.cat(liger_rope(q.clone(), k.clone(), cos, sin), dim=1)

    eps = norm.variance_epsilon
    angles = torch.outer(torch.arange(37, device=device), torch.logspace(0, -3, head // 2, device=device))
    cos, sin = (torch.cat((f(angles), f(angles)), dim=-1)[None].to(dtype) for f in (torch.cos, torch.sin))
    cases = {
        "RMSNorm": (
            lambda x, w: fused_norm(x, w, eps),
            eager_norm,
            [noise(37, width), noise(width)],
            [],
        ),
        "rotary": (fused_rotary, eager_rotary, [noise(1, 4, 37, head), noise(1, 2, 37, head)], [cos, sin]),
        "SwiGLU": (
            liger_swiglu,
            eager_swiglu,
            [noise(37, middle), noise(37, middle)],
            [],
        ),
    }
    for name, (fused, eager, given, fixed) in cases.items():
        try:
            got = _values(fused, given, fixed)
        except torch.cuda.OutOfMemoryError:  # says nothing about the build
            raise
        except Exception as error:
            return f"its {name} fails: {type(error).__name__}: {error}".partition("\n")[0]
        plain = _values(eager, given, fixed)
        exact = _values(eager, [x.double() for x in given], [x.double() for x in fixed])
        for value, other, right in zip(got, plain, exact, strict=True):
            allowed = LARGEST_ERROR * (other - right).abs().max() + torch.finfo(dtype).eps * right.abs().max()
            if not (value - right).abs().max() <= allowed:
                return f"its {name} is wrong here"
    return None


def _values(function: Callable, given: Sequence[torch.Tensor], fixed: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The result of a function and the gradients of what it is given."""
    with torch.enable_grad():
        given = [x.detach().clone().requires_grad_() for x in given]  # liger's SwiGLU writes gradients over its inputs
        out = function(*given, *fixed)
        weights = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, given, weights)]
