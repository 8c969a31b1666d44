"""A look at kernels that others built, before they are used.

A build can lack a dtype or a head width and answer with other numbers and no error: a flash-attn compiled for bfloat16
alone, to save time, reads float16 as bfloat16, and the features have nothing to do with the image any more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch

from ..packing import PackedSegments, make_segments
from . import eager

LENGTHS, HEADS = (300, 517, 270), 2  # more than a tile of any kernel, and multiples of none


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether two results agree but for rounding in half precision (plain bf16 attention is 2 % off at most, what is
    wrong is so by much more); NaN never does."""
    return bool((got.float() - want.float()).abs().max() <= 0.05 * want.float().abs().max())


def results(
    attend: Callable,
    heads: Sequence[torch.Tensor],
    segments: PackedSegments,
    scale: float,
    grad: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """The output of ``attend`` for q, k, v, or, with ``grad``, their gradients. Each ``[N, heads, head_dim]``."""
    with torch.autocast(heads[0].device.type, enabled=False):
        if grad is None:
            with torch.no_grad():
                return (attend(*heads, segments, scale),)
        # A checkpoint around us counts what is kept, and must not count this.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            heads = [x.detach().requires_grad_() for x in heads]
            return torch.autograd.grad(attend(*heads, segments, scale), heads, grad)


@torch.inference_mode(False)
def why_wrong(
    module: ModuleType, device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool
) -> str | None:
    """None if a backend gives on random segments what plain attention gives, else what it does not give.

    Its gradients are looked at too where they are needed. Synchronises; the user's random numbers are not drawn.
    """
    generator = torch.Generator(device).manual_seed(0)
    noise = torch.randn(sum(LENGTHS), 4, HEADS, head_dim, generator=generator, device=device).to(dtype)
    *heads, grad = (x.contiguous() for x in noise.unbind(1))
    rest = make_segments(LENGTHS, device), head_dim**-0.5
    for what, weight in (("results", None), ("gradients", grad))[: 1 + needs_grad]:
        try:
            got = results(module.attend, heads, *rest, weight)
        except RuntimeError as error:
            return f"it fails: {error}".partition("\n")[0]
        want = results(eager.attend, [x.float() for x in heads], *rest, None if weight is None else weight.float())
        if not all(map(close, got, want)):
            return f"its {what} are wrong (compared with plain attention): this build may lack such kernels"
    return None
