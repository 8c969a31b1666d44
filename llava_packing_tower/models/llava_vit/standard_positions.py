"""Where the patches of the standard model stand: rotary tables, visible patches, clips in a longer context."""

from __future__ import annotations

import torch

RESIDUAL_PATCHES = 2048
"""How many patches a residual map keeps (the source model kept 1536)."""


def rotary_table(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, float32 ``[B, 1, K, head_dim]``, for positions (frame, row, column) ``[B, K, 3]``.

    Of the ``head_dim / 2`` frequencies a quarter belongs to the frame and three eighths each to row and column; the
    k-th of n has the base ``theta ** (-k / n)``. The second half of the head repeats the first. (LlavaViT.)
    """
    axis, frequency = [], []
    for index, eighths in enumerate((2, 3, 3)):
        count = head_dim // 2 * eighths // 8
        axis += [index] * count
        frequency += [theta ** (-k / count) for k in range(count)]
    frequencies = torch.tensor(frequency, dtype=torch.float32, device=positions.device)
    angles = (positions.float()[..., axis] * frequencies).repeat(1, 1, 2).unsqueeze(1)
    return angles.cos(), angles.sin()


class VideoRotary:
    """The angles of :func:`rotary_table` by the interface of OneVision-Encoder's ``model.video_rope``.

    half: angles per token, half of the head's width. ``inv_freq_t``, ``inv_freq_h``, ``inv_freq_w``: the frequencies of
    frame, row and column.
    """

    def __init__(self, head_dim: int, theta: float, device: torch.device) -> None:
        self.half = head_dim // 2
        counts = [self.half * eighths // 8 for eighths in (2, 3, 3)]
        ladders = [[theta ** (-k / count) for k in range(count)] for count in counts]
        self.inv_freq_t, self.inv_freq_h, self.inv_freq_w = (torch.tensor(part, device=device) for part in ladders)

    def __call__(self, t: int, h: int, w: int, device: torch.device | str | None = None) -> torch.Tensor:
        """Angles of a grid of patches, float32 ``[t * h * w, half]``."""
        sides = (torch.arange(n, device=device or self.inv_freq_t.device) for n in (t, h, w))
        return self.forward_from_positions(torch.cartesian_prod(*sides).view(1, -1, 3))[0]

    def forward_from_positions(self, patch_positions: torch.Tensor) -> torch.Tensor:
        """Angles ``[B, K, half]`` of positions (frame, row, column) ``[B, K, 3]``."""
        ladders = (self.inv_freq_t, self.inv_freq_h, self.inv_freq_w)
        axes = patch_positions.float().unbind(-1)
        return torch.cat([axis.unsqueeze(-1) * ladder.to(axis.device) for axis, ladder in zip(axes, ladders)], dim=-1)


def rotate(x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn neighbors (2m, 2m + 1) of ``[B, heads, K, head_dim]``, each with the angle of its own element."""
    cos, sin = (part.to(x.dtype) for part in table)
    turned = torch.empty_like(x)
    turned[..., 0::2] = x[..., 0::2] * cos[..., 0::2] - x[..., 1::2] * sin[..., 0::2]
    turned[..., 1::2] = x[..., 1::2] * cos[..., 1::2] + x[..., 0::2] * sin[..., 1::2]
    return turned


def flat_positions(visible_indices: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Flat indices ``[B, K]`` into a (frames, rows, columns) grid as triples ``[B, K, 3]``."""
    plane = rows * columns
    inside = visible_indices % plane
    return torch.stack([visible_indices // plane, inside // columns, inside % columns], dim=-1)


def residual_indices(residual: torch.Tensor, patch_size: int, keep: int = RESIDUAL_PATCHES) -> torch.Tensor:
    """Flat indices, ascending, of the patches with the largest summed absolute residual.

    residual: ``[B, C, T, H, W]``. Returns int64 ``[B, min(keep, patches)]``.
    """
    batch, _, frames, height, width = residual.shape
    energy = residual.abs().sum(1)
    energy = energy.view(batch, frames, height // patch_size, patch_size, width // patch_size, patch_size)
    energy = energy.sum((3, 5)).flatten(1)
    return energy.topk(min(keep, energy.shape[1]), dim=1).indices.sort(dim=1).values


def clip_in_context(
    frames: torch.Tensor, frame_indices: torch.Tensor, patch_size: int, context: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put frames at their places in a longer clip of zeros, as LlavaViT was trained to see sampled videos.

    Args:
        frames: ``[B, C, T, H, W]``.
        frame_indices: integer ``[B, T]``, all different, 0 .. context - 1; see
            :func:`positions.interpolate_frame_indices`.
        patch_size: side of a patch in pixels.
        context: frames of the clip.

    Returns:
        The clip ``[B, C, context, H, W]`` and the flat indices ``[B, T * h * w]`` of the patches of these frames.

    Raises:
        ValueError: a frame index outside the clip, or two frames of a video at one place.
    """
    batch, channels, count, height, width = frames.shape
    for places in frame_indices.tolist():
        if len(set(places)) != count or min(places) < 0 or max(places) >= context:
            raise ValueError(f"{count} frames need {count} different positions in 0..{context - 1}, got {places}")
    clip = frames.new_zeros(batch, channels, context, height, width)
    index = frame_indices.to(frames.device).long()
    clip.scatter_(2, index[:, None, :, None, None].expand_as(frames), frames)
    plane = height // patch_size * (width // patch_size)
    visible = index[:, :, None] * plane + torch.arange(plane, device=frames.device)
    return clip, visible.flatten(1)
