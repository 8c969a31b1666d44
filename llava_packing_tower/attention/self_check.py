"""Checks kernels that other packages built, before they are used.

A build may lack a dtype or a head width and return wrong numbers without an error: a flash-attn that was compiled for
bfloat16 alone, to save time, reads float16 as bfloat16, and the features have nothing to do with the image.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType

import torch

from ..data.segments import VarlenMetadata, make_segments
from . import eager

PARTS = ("results", "gradients of q", "gradients of k", "gradients of v")
LENGTHS, HEADS = (300, 517, 270), 2  # more than a tile of any kernel, and multiples of none
MOST = 0.05  # plain bf16 attention is 2 % off at most, what is wrong is so by much more


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest absolute difference of two tensors of one shape, relative to the largest value of ``want``.

    NaN where either has a NaN.
    """
    return ((got.float() - want.float()).abs().max() / want.float().abs().max()).item()


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether two tensors of one shape are equal up to rounding in half precision. One with a NaN never is."""
    return off(got, want) <= MOST


@contextlib.contextmanager
def apart(device: torch.device, grad: bool) -> Iterator[None]:
    """Shields a check from its surroundings: another current GPU, autocast, inference mode, and activation
    checkpointing, which counts the saved tensors."""
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(torch.set_grad_enabled(grad))
        if grad:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x))
        yield


def random_segments(
    lengths: tuple[int, ...], heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> tuple[list[torch.Tensor], torch.Tensor, VarlenMetadata]:
    """q, k, v and a gradient of the output, each ``[N, heads, head_dim]``, and their metadata.

    Always the same ones; the user's random numbers are not drawn.
    """
    generator = torch.Generator(device).manual_seed(0)
    noise = torch.randn(sum(lengths), 4, heads, head_dim, generator=generator, device=device).to(dtype)
    *given, grad = (x.contiguous() for x in noise.unbind(1))
    return given, grad, make_segments(lengths, device)


def results(
    attend: Callable,
    heads: Sequence[torch.Tensor],
    segments: VarlenMetadata,
    scale: float,
    grad: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """The output of ``attend`` for q, k, v and, given ``grad``, their gradients. Each ``[N, heads, head_dim]``."""
    if grad is None:
        return (attend(*heads, segments, scale),)
    heads = [x.detach().requires_grad_() for x in heads]
    out = attend(*heads, segments, scale)
    return out.detach(), *torch.autograd.grad(out, heads, grad)


def self_check_error(
    module: ModuleType, device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool, causal: bool = False
) -> str | None:
    """None if a backend agrees with plain attention in float32 on random segments, else what it gets wrong.

    Its gradients are checked as well if they are needed. causal: as a decoder uses it, with two query heads for each
    key head. Synchronizes. Raises ``torch.cuda.OutOfMemoryError`` where memory does not suffice for the check.
    """
    attend, plain = (partial(f, causal=True) if causal else f for f in (module.attend, eager.attend))
    with apart(device, needs_grad):
        (q, *rest), grad, segments = random_segments(LENGTHS, HEADS, head_dim, device, dtype)
        heads = [q, *([x[:, :1].contiguous() for x in rest] if causal else rest)]
        scale = head_dim**-0.5
        try:
            got = results(attend, heads, segments, scale, grad if needs_grad else None)
        except torch.cuda.OutOfMemoryError:  # says nothing about the build
            raise
        except (RuntimeError, TypeError) as error:  # TypeError: a build that does not know an argument
            return f"it fails: {error}".partition("\n")[0]
        exact = [x.float() for x in heads]
        want = results(plain, exact, segments, scale, grad.float() if needs_grad else None)
        for what, x, y in zip(PARTS, got, want):
            if not (distance := off(x, y)) <= MOST:
                return (
                    f"its {what} are wrong ({distance:.2g} of the largest value away from plain attention's, at most "
                    f"{MOST} allowed): this build may lack such kernels"
                )
    return None
