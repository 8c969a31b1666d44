"""Patch positions and rotary angle tables. Angles, cosines and sines are float32 whatever the model's dtype is.

The frequency ladders are made from Python numbers when they are needed and cached per device; nothing is a module
buffer, so neither ``model.to(torch.bfloat16)`` nor a loader can damage them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from .cached_metadata import cached
from .segments import Grid, read_grid, to_device


@cached(1024)
def grid_positions(grid: Grid) -> torch.Tensor:
    """(frame, row, column) of every patch of one sample, int64 ``[t*h*w, 3]`` on the host. Do not modify: cached."""
    return torch.cartesian_prod(*(torch.arange(n, device="cpu") for n in grid)).reshape(-1, 3)


def compute_patch_positions_from_grid_thw(grid_thw: torch.Tensor) -> torch.Tensor:
    """Positions of all patches of a packed batch: frame index 0..t-1, row, column, sample by sample.

    Args:
        grid_thw: integer ``[B, 3]``.

    Returns:
        int64 ``[N, 3]`` on the device of ``grid_thw``. Raises ``ValueError`` for a grid that is no such tensor.
    """
    return torch.cat([grid_positions(grid) for grid in read_grid(grid_thw)]).to(grid_thw.device)


def interpolate_frame_indices(
    frame_indices: torch.Tensor, total_frames: torch.Tensor, target_frames: int = 64
) -> torch.Tensor:
    """The positions of a clip's frames in the temporal context that LlavaViT was trained with.

    ``round(index / max(total - 1, 1) * (target_frames - 1))`` in float32, ties to the even neighbor, clamped to
    ``0 .. target_frames - 1``. Eight of eight frames: 0, 9, 18, 27, 36, 45, 54, 63. (LlavaViT, OneVision-Encoder.)

    Args:
        frame_indices: ``[B, n]`` indices of the sampled frames in their video.
        total_frames: ``[B]`` frame counts of the videos.
        target_frames: length of the context.

    Returns:
        int64 ``[B, n]``.

    Raises:
        ValueError: other shapes.
    """
    if frame_indices.dim() != 2 or total_frames.shape != frame_indices.shape[:1]:
        raise ValueError(
            "expected frame_indices [B, n] and total_frames [B], "
            f"got {list(frame_indices.shape)} and {list(total_frames.shape)}"
        )
    span = (total_frames.float() - 1).clamp(min=1).unsqueeze(1)
    scaled = frame_indices.float() / span * (target_frames - 1)
    return scaled.round().long().clamp(0, target_frames - 1)


def compute_patch_positions_with_interpolated_temporal(
    interpolated_indices: torch.Tensor, h_patches: int, w_patches: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """Positions of clips whose frames are at given (interpolated) indices.

    Args:
        interpolated_indices: integer ``[B, n]``, see :func:`interpolate_frame_indices`.
        h_patches, w_patches: rows and columns of every frame, in patches.
        device: of the result (default: that of the indices).

    Returns:
        int64 ``[B * n * h_patches * w_patches, 3]``: clip by clip, frame by frame, row by row, the triple
        (index, row, column).

    Raises:
        ValueError: the indices are not ``[B, n]``.
    """
    if interpolated_indices.dim() != 2:
        raise ValueError(f"interpolated_indices must be [B, n], got shape {list(interpolated_indices.shape)}")
    frames = interpolated_indices.reshape(-1).long()
    plane = grid_positions((1, h_patches, w_patches)).to(frames.device)
    positions = plane.repeat(len(frames), 1)
    positions[:, 0] = frames.repeat_interleave(len(plane))
    return positions if device is None else positions.to(device)


def per_token(values: torch.Tensor, lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """``[N, k]`` on the device: the numbers ``values [B, k]`` (host) of each sample, once per token of it.

    (Put together on the host and copied, the positions of 64 large images would keep a GPU waiting for 4 ms.)
    """
    counts, tokens = torch.tensor(lengths, device="cpu"), sum(lengths)
    if values.is_floating_point():
        return to_device(values, device).repeat_interleave(to_device(counts, device), dim=0, output_size=tokens)
    both = to_device(torch.cat([values, counts[:, None]], dim=1), device)  # one copy
    return both[:, :-1].repeat_interleave(both[:, -1], dim=0, output_size=tokens)


def positions_and_sizes(grids: Sequence[Grid], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The position of each token of a packed batch, int64 ``[N, 3]`` (frame, row, column), and the grid of its sample,
    int64 ``[N, 3]`` (frames, rows, columns)."""
    lengths = [t * h * w for t, h, w in grids]
    starts = accumulate([0, *lengths])
    values = torch.tensor([(*grid, start) for grid, start in zip(grids, starts)], device="cpu")
    spread = per_token(values, lengths, device)
    _, rows, columns, start = spread.unbind(1)
    place = torch.arange(len(spread), device=device) - start
    line = place // columns
    return torch.stack([line // rows, line % rows, place % columns], dim=1), spread[:, :3]


def positions_of_grids(grids: Sequence[Grid], device: torch.device) -> torch.Tensor:
    """int64 ``[N, 3]`` (frame, row, column) of a packed batch, made on the device."""
    return positions_and_sizes(grids, device)[0]


@cached(8)
def prefix_indices(lengths: tuple[int, ...], prefix: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Index tensors that put ``prefix`` shared tokens in front of every segment, and take them out again.

    With ``x = cat([prefix_tokens, patches])``: ``x[insert]`` is the packed sequence with prefixes, and
    ``packed[patches]`` its patch tokens alone. Both are int64 on the device, ``[N + segments * prefix]`` and ``[N]``.
    """
    ends = prefix * torch.arange(1, len(lengths) + 1, device="cpu")
    tokens = torch.arange(sum(lengths), device=device)
    patches = tokens + per_token(ends[:, None], lengths, device)[:, 0]
    # What is not a patch is a prefix token; which of them, its distance from the start of the segment says.
    sizes = torch.tensor(lengths, device="cpu")
    starts = (sizes.cumsum(0) - sizes + ends - prefix)[:, None]
    whole = [length + prefix for length in lengths]
    insert = torch.arange(sum(whole), device=device) - per_token(starts, whole, device)[:, 0]
    return insert.index_copy(0, patches, tokens + prefix), patches


def batch_positions(grids: Sequence[Grid], patch_positions: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """float32 ``[N, 3]`` positions on the device of the tokens: the given ones, else those of the grids.

    Raises ``ValueError`` for given positions of another shape.
    """
    if patch_positions is None:
        return positions_of_grids(grids, device).float()
    total = sum(t * h * w for t, h, w in grids)
    if patch_positions.shape != (total, 3):
        raise ValueError(f"patch_positions must be [{total}, 3], got {list(patch_positions.shape)}")
    return to_device(patch_positions, device).float()


@cached(32)
def frequency_ladder(count: int, base: float, step: float, device: torch.device) -> torch.Tensor:
    """float32 ``[count]``: ``base ** (-step * k)`` for ``k = 0 .. count-1``. Do not modify it: it is cached."""
    exponents = torch.arange(count, dtype=torch.float32, device="cpu") * -step
    return to_device(torch.pow(torch.tensor(base, dtype=torch.float32, device="cpu"), exponents), device)


def rotary_2d(places: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A rotary table over (row, column), for the "half" rotation.

    With ``g_k = theta ** (-4k / head_dim)``, k below ``head_dim / 4``, the angles of a token are
    ``[row g, column g, row g, column g]``. A token at (0, 0) is not rotated.

    Args:
        places: float32 ``[N, 2]`` (row, column).
        head_dim: width of a head, a multiple of 4.
        theta: base of the frequencies.

    Returns:
        cosines and sines, float32 ``[N, 1, head_dim]`` each.
    """
    ladder = frequency_ladder(head_dim // 4, theta, 4.0 / head_dim, places.device)
    angles = (places.unsqueeze(-1) * ladder).flatten(1)
    angles = torch.cat([angles, angles], dim=1).unsqueeze(1)
    return angles.cos(), angles.sin()


def rotary_3d(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """LlavaViT's rotary table over (frame, row, column).

    With ``u = head_dim / 32`` the axes get 4u, 6u and 6u frequencies ``theta ** (-k / n_axis)``. The angles of a
    token are ``[t*f_T, h*f_H, w*f_W]``, repeated once to the width of a head. (LlavaViT / OneVision-Encoder.)

    Args:
        positions: float32 ``[N, 3]``.
        head_dim: width of a head, a multiple of 32.
        theta: base of the frequencies.

    Returns:
        cosines and sines, float32 ``[N, 1, head_dim]`` each.

    Raises:
        ValueError: ``head_dim`` is not a multiple of 32.
    """
    if head_dim % 32:
        raise ValueError(f"3-D rotary positions need a head width that is a multiple of 32, got {head_dim}")
    unit = head_dim // 32
    angles = torch.cat(
        [
            positions[:, axis, None] * frequency_ladder(count, theta, 1.0 / count, positions.device)
            for axis, count in enumerate((4 * unit, 6 * unit, 6 * unit))
        ],
        dim=1,
    )
    angles = torch.cat([angles, angles], dim=1).unsqueeze(1)
    return angles.cos(), angles.sin()


def rotary_3d_of_grids(
    grids: Sequence[Grid], head_dim: int, theta: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`rotary_3d` at the default positions of the grids, float32 ``[N, 1, head_dim]`` each.

    The tables of small batches are cached.
    """
    make = _kept_rotary_3d if sum(t * h * w for t, h, w in grids) <= 8192 else _kept_rotary_3d.__wrapped__
    return make(tuple(grids), head_dim, theta, device)


def rotary_3d_of_batch(
    grids: Sequence[Grid], patch_positions: torch.Tensor | None, head_dim: int, theta: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`rotary_3d` at the given positions ``[N, 3]``, or at those of the grids if there are none.

    Raises ``ValueError`` for positions of another shape.
    """
    if patch_positions is None:
        return rotary_3d_of_grids(grids, head_dim, theta, device)
    return rotary_3d(batch_positions(grids, patch_positions, device), head_dim, theta)


@cached(8)
def _kept_rotary_3d(
    grids: tuple[Grid, ...], head_dim: int, theta: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    return rotary_3d(batch_positions(grids, None, device), head_dim, theta)
