"""torch.compile of one encoder block: compiled once per process, shared by all layers, ragged shapes as dynamic sizes.

Per block and not per model: seconds instead of minutes, and nothing is compiled again when the number of images or
their sizes change. Inductor caches the result between processes.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import types
from collections.abc import Callable

import torch
import torch._dynamo

from .layers import BlockConfig, EncoderBlock, Rotary
from .packing import PackedSegments

logger = logging.getLogger(__name__)

COMPILE_ENV = "LLAVA_PACKING_COMPILE"
# What tracing and code generation raise (the names differ between torch versions).
COMPILE_ERRORS = tuple(
    getattr(torch._dynamo.exc, name)
    for name in ("TorchDynamoException", "BackendCompilerFailed", "Unsupported", "InternalTorchDynamoError")
    if hasattr(torch._dynamo.exc, name)
)
_failed: list[str] = []


def compile_wanted(choice: bool | None, device: torch.device) -> bool:
    """Whether to compile: the explicit choice, else the environment variable (0 or 1), else only on CUDA."""
    if _failed:
        return False
    if choice is None and (text := os.environ.get(COMPILE_ENV)):
        if text not in ("0", "1"):
            raise ValueError(f"{COMPILE_ENV} must be 0 or 1, got {text!r}")
        choice = text == "1"
    return device.type == "cuda" if choice is None else choice


def constant_floats(compiled: bool) -> contextlib.AbstractContextManager:
    """In here floats (a norm's epsilon, coefficients) are compiled as constants.

    Else, from torch 2.6 on, they are passed as tensors and read back: 0.1 ms per block.
    """
    if compiled and hasattr(torch._dynamo.config, "specialize_float"):
        return torch._dynamo.config.patch(specialize_float=True)
    return contextlib.nullcontext()


def run_block(
    layer: EncoderBlock,
    hidden_states: torch.Tensor,
    pending: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    rotary: Rotary | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return layer(hidden_states, pending, PackedSegments(cu_seqlens, max_seqlen, ()), rotary, backend)


@functools.cache
def compiled_block(config: BlockConfig, backend: str, grad: bool) -> Callable:
    """The compiled :func:`run_block` for one kind of block.

    Each kind has a code object of its own: compiled versions are counted, searched and limited per code object.
    """
    code = run_block.__code__.replace(co_name=f"run_block_{backend}{'_grad' if grad else ''}")
    return torch.compile(types.FunctionType(code, run_block.__globals__), dynamic=True)


def call_compiled(
    config: BlockConfig,
    layer: EncoderBlock,
    hidden_states: torch.Tensor,
    pending: torch.Tensor,
    segments: PackedSegments,
    rotary: Rotary | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One block through the compiled code; eager, with a warning, from the first failure to compile on."""
    if _failed:
        return layer(hidden_states, pending, segments, rotary, backend)
    try:
        block = compiled_block(config, backend, torch.is_grad_enabled())
        return block(layer, hidden_states, pending, segments.cu_seqlens, segments.max_seqlen, rotary, backend)
    except COMPILE_ERRORS as error:
        _failed.append(str(error))
        logger.warning("torch.compile of the encoder block failed, running eager from now on: %s", error)
        return layer(hidden_states, pending, segments, rotary, backend)
