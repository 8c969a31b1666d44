"""How the blocks of one forward pass are run: one decision, made here from all switches."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ...attention.dispatch import backend_module, resolve_backend
from ...kernels.reference import ACTIVATIONS
from ...utils import environment
from ..activations import HALF
from ..layers import BlockConfig
from .cuda_graphs import graphs_allowed
from .fused import kernels_work
from .layer_graphs import worth_a_graph
from .module_state import Snapshot

logger = logging.getLogger(__name__)

FUSED, EAGER = "fused", "eager"


@dataclass(frozen=True)
class ExecutionPlan:
    """path: ``fused`` (few kernels per block, which read the weights around their modules) or ``eager`` (modules are
    called). graph: whether a CUDA graph of the blocks is captured or replayed. backend: of attention. reason: why the
    path is eager."""

    path: str
    graph: bool
    backend: str
    reason: str | None = field(default=None, compare=False)

    def __str__(self) -> str:
        why = f" ({self.reason})" if self.reason else ""
        return f"{self.path}{why}, {'CUDA graphs' if self.graph else 'no CUDA graphs'}, attention by {self.backend}"


def is_autocast(device: torch.device) -> bool:
    """Whether autocast is on for this kind of device."""
    if hasattr(torch, "get_autocast_dtype"):  # torch 2.4 and newer
        return torch.is_autocast_enabled(device.type)
    return device.type == "cuda" and torch.is_autocast_enabled()


def compute_dtype(hidden_states: torch.Tensor) -> torch.dtype:
    """The dtype of the output of linear layers: autocast's if it is on, else that of the input (of any shape)."""
    device = hidden_states.device
    if not is_autocast(device):
        return hidden_states.dtype
    if hasattr(torch, "get_autocast_dtype"):
        return torch.get_autocast_dtype(device.type)
    return torch.get_autocast_gpu_dtype()


def recompute_by_graphs(hidden_states: torch.Tensor, weights: int) -> bool:
    """Whether checkpointed layers with so many weights may be replayed for ``[N, hidden]`` states, and gain by it."""
    device = hidden_states.device
    return graphs_allowed(device) and not is_autocast(device) and worth_a_graph(weights, hidden_states.shape[0])


def make_plan(
    config: BlockConfig,
    hidden_states: torch.Tensor,
    lengths: Sequence[int],
    state: Snapshot,
    grad: bool,
    attention: str = "auto",
    fused: bool | None = None,
    recomputed: int = 0,
) -> ExecutionPlan:
    """The plan for one forward.

    Args:
        config: of the blocks.
        hidden_states: ``[N, hidden]``, their input.
        lengths: of the segments, in tokens.
        state: of the encoder's modules.
        grad: whether gradients are needed.
        attention: a backend's name, or ``auto``.
        fused: False: eager blocks; True: fused ones wherever they can be (plain torch without a GPU); None: fused in
            half precision on a GPU, unless ``LLAVA_PACKING_FUSED=0``.
        recomputed: how many weights a block has, where blocks are checkpointed; else 0.

    Raises:
        ValueError: a backend that cannot run these tensors, or another value of a variable than 0 and 1.
        ImportError: a backend whose package is missing.
    """
    device, dtype = hidden_states.device, compute_dtype(hidden_states)
    backend = resolve_backend(attention, device, dtype, config.head_dim, lengths=lengths, needs_grad=grad)
    reason = _why_eager(config, hidden_states, dtype, state, backend, fused)
    graph = reason is None and not state.hooked
    if grad:
        graph = graph and bool(recomputed) and recompute_by_graphs(hidden_states, recomputed)
    else:
        graph = graph and graphs_allowed(device, hidden_states.shape[0])
    plan = ExecutionPlan(EAGER if reason else FUSED, graph, backend, reason)
    if not torch.compiler.is_compiling():
        _log(plan, reason)
    return plan


def plan_kinds(
    config: BlockConfig,
    hidden_states: torch.Tensor,
    kinds: Sequence[Sequence[int]],
    state: Snapshot,
    grad: bool,
    attention: str = "auto",
    fused: bool | None = None,
    recomputed: int = 0,
) -> tuple[ExecutionPlan, tuple[str, ...]]:
    """The plan for one forward whose blocks have several kinds of segments, and the backend for each kind.

    ``kinds``: the lengths of the segments, by kind; the rest as in :func:`make_plan`. Backends are chosen for each;
    blocks are fused if they can be with all of them. Without gradients, blocks with several kinds have no CUDA graphs
    of their own.
    """
    more = (state, grad, attention, fused, recomputed)
    plans = [make_plan(config, hidden_states, lengths, *more) for lengths in kinds]
    backends = tuple(plan.backend for plan in plans)
    if len(plans) == 1:
        return plans[0], backends
    reason = next((plan.reason for plan in plans if plan.path == EAGER), None)
    together = " and ".join(dict.fromkeys(backends))
    graph = grad and all(plan.graph for plan in plans)
    return ExecutionPlan(EAGER if reason else FUSED, graph, together, reason), backends


def _why_eager(
    config: BlockConfig,
    hidden_states: torch.Tensor,
    dtype: torch.dtype,
    state: Snapshot,
    backend: str,
    fused: bool | None,
) -> str | None:
    if fused is False or (fused is None and environment.switch(environment.FUSED) is False):
        return "requested"
    if state.foreign is not None:
        return state.foreign
    if not state.weights:  # the copies that DataParallel makes
        return "the modules have no parameters"
    if not backend_module(backend).VARLEN:
        return f"{backend} runs segment by segment"
    if config.hidden_act not in ACTIVATIONS:
        return f"no kernel for {config.hidden_act}"
    if state.weights[0].dtype != dtype and not is_autocast(hidden_states.device):  # (which has blocks cast them)
        return f"weights in {state.weights[0].dtype}, states in {dtype}"
    if fused:
        return None
    if hidden_states.device.type != "cuda":
        return f"on {hidden_states.device.type}"
    if dtype not in HALF:
        return f"in {dtype}"
    return None if kernels_work(hidden_states.device) else "Triton kernels do not run here"


@functools.lru_cache(maxsize=64)
def _log(plan: ExecutionPlan, reason: str | None) -> None:
    """Each plan once."""
    logger.info("encoder blocks: %s", plan)
