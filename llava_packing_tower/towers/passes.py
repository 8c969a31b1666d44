"""A token budget for one encoder pass: larger batches run as several passes, and as many on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import distributed, nn

from ..data.segments import Grid
from ..models.encoder import PackedEncoder
from ..models.unused_parameters import is_whole
from ..utils import environment

KEY = "mm_packing_encoder_tokens"
Run = Callable[[Sequence[int]], tuple[torch.Tensor, list[Grid]]]


def budget_of(args: object) -> int | None:
    """The most patches of one pass, from LLaVA's arguments or config, else from the environment; None for any number.

    Raises ``ValueError`` for anything but a whole number above 0.
    """
    given = getattr(args, KEY, None)
    if given is None:
        found = environment.number(environment.ENCODER_TOKENS)
        return None if found is None else int(found)
    if type(given) is not int or given < 1:
        raise ValueError(f"{KEY} must be a whole number of patches, at least 1, got {given!r:.80}")
    return given


def count_patches(image: object, patch_size: int, frames_per_patch: int = 1) -> int:
    """The patches of an image ``[C, H, W]`` or a clip ``[C, T, H, W]``; 0 for what the tower will refuse."""
    if not isinstance(image, torch.Tensor) or image.dim() not in (3, 4):
        return 0
    frames = 1 if image.dim() == 3 else -(-image.shape[1] // frames_per_patch)
    return frames * math.prod(image.shape[-2:]) // patch_size**2


def divide(sizes: Sequence[int], budget: int | None) -> list[list[int]]:
    """Neighboring images that make one pass each: together within the budget. One that is larger is alone."""
    passes: list[list[int]] = []
    total = 0
    for index, size in enumerate(sizes):
        if not passes or (budget is not None and total + size > budget):
            passes.append([])
            total = 0
        passes[-1].append(index)
        total += size
    return passes or [[]]


def allow_several(model: nn.Module, several: bool) -> None:
    """Have ZeRO-3 gather the parts of a block one by one where it runs several times in a step: DeepSpeed reduces the
    gradients of a block that it gathers whole after the first of its backward passes."""
    for module in model.modules():
        if isinstance(module, PackedEncoder):
            module.runs_several_times = several
        if hasattr(type(module), "_z3_leaf"):
            module._z3_leaf = not several  # type: ignore[assignment]


def wait_for_others(model: nn.Module, count: int, device: torch.device) -> int:
    """The passes of the rank that needs most, where weights are partitioned (ZeRO-3, FSDP): each pass gathers them from
    all ranks. Else ``count``."""
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return count
    if all(is_whole(parameter) for parameter in model.parameters()):
        return count
    most = torch.tensor(count, device=device if distributed.get_backend() == "nccl" else "cpu")
    distributed.all_reduce(most, distributed.ReduceOp.MAX)
    return int(most)


def run_passes(
    model: nn.Module,
    sizes: Sequence[int],
    budget: int | None,
    device: torch.device,
    run: Run,
    note: Callable[[list[Grid]], None] | None = None,
) -> tuple[torch.Tensor, list[Grid]]:
    """Packed features ``[N, hidden]`` of all images, and their grids.

    Args:
        model: the packed encoder.
        sizes: patches of each image.
        budget: see :func:`budget_of`.
        run: encodes the images with these numbers in one packed pass.
        note: is told the grids.

    Raises:
        RuntimeError: as torch raises it where the memory does not suffice, with the patches that were asked for and
            those that fit.
    """
    passes = divide(sizes, budget)
    if len(passes) == 1 and budget is None:
        packed, grids = _guarded(model, passes[0], sizes, run)
        if note is not None:
            note(grids)
        return packed, grids
    more = wait_for_others(model, len(passes), device) - len(passes)
    results = [_guarded(model, each, sizes, run) for each in passes]
    packed = torch.cat([features for features, _ in results]) if len(results) > 1 else results[0][0]
    for _ in range(more):
        # The smallest image once more, without an effect: the other ranks gather weights, forward and backward.
        features, _ = run([min(range(len(sizes)), key=sizes.__getitem__)])
        packed = packed + 0 * features.sum()
    grids = [grid for _, each in results for grid in each]
    if note is not None:
        note(grids)
    return packed, grids


# ---------------------------------------------------------------- out of memory


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is one of too little memory, on a GPU or on the CPU."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def is_explained(error: BaseException) -> bool:
    """Whether an error for want of memory says already what the tower was asked for."""
    return "The vision tower was asked for" in str(error)


def _guarded(
    model: nn.Module, indices: Sequence[int], sizes: Sequence[int], run: Run
) -> tuple[torch.Tensor, list[Grid]]:
    try:
        return run(indices)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        kind, said = type(error), str(error)
    # Behind the except block, so that what the failed pass has allocated is free again.
    asked = sum(sizes[index] for index in indices)
    fits = _largest_that_fits(model, indices, sizes, run)
    if fits:
        advice = f"{fits} fit: set {KEY}: {fits}, or fewer, for training also needs memory for the backward pass"
    else:
        advice = f"the largest image alone has {max(sizes[i] for i in indices)}: lower mm_packing_max_patches"
    raise kind(f"{said}\nThe vision tower was asked for {asked} patches of {len(indices)} images in one pass; {advice}")


def _largest_that_fits(model: nn.Module, indices: Sequence[int], sizes: Sequence[int], run: Run) -> int:
    """The patches of the largest pass of some of these images that was tried and fits; 0 if none does, or where ranks
    would have to try together."""
    if not all(is_whole(parameter) for parameter in model.parameters()):
        return 0
    while len(indices) > 1:
        indices = indices[: len(indices) // 2]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            run(indices)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            continue
        return sum(sizes[index] for index in indices)
    return 0
