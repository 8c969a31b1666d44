"""Detects when LLaVA cuts a sequence at ``model_max_length`` inside or before an image."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

logger = logging.getLogger(__name__)


def cut_tokens(text: Sequence[bool], counts: Sequence[int], limit: int) -> tuple[int, int]:
    """What is left out of one sequence.

    Args:
        text: for each token of the text, whether it stands for an image.
        counts: visual tokens of each image. limit: the longest sequence.

    Returns:
        all tokens and visual tokens beyond ``limit``.
    """
    rest, length, cut = iter(counts), 0, 0
    for is_image in text:
        count = next(rest) if is_image else 1
        if is_image:
            cut += max(0, length + count - max(limit, length))
        length += count
    return max(0, length - limit), cut


class Truncations:
    """Counts what was cut, and warns the first time, the second, the fourth, and so on."""

    def __init__(self) -> None:
        self.samples = self.visual = self.seen = 0
        self._next = 1

    def look(
        self,
        marks: torch.Tensor,
        mask: torch.Tensor,
        per_sample: Sequence[int],
        counts: Sequence[int],
        limit: int | None,
    ) -> None:
        """Look at a batch.

        Args:
            marks, mask: bool ``[B, L]``: which tokens stand for an image, which are no padding.
            per_sample: images of each sample. counts: visual tokens of each place, one for a sample without images.
            limit: the longest sequence, None for no limit.
        """
        self.seen += len(per_sample)
        if limit is None:
            return
        lengths, start = mask.sum(1).tolist(), 0
        for index, images in enumerate(per_sample):
            own = list(counts[start : start + images])
            start += max(images, 1)
            if images and lengths[index] - images + sum(own) > limit:
                self._count(cut_tokens(marks[index][mask[index]].tolist(), own, limit)[1], limit)

    def _count(self, cut: int, limit: int) -> None:
        if not cut:
            return
        self.samples += 1
        self.visual += cut
        if self.samples >= self._next:
            self._next *= 2
            logger.warning(
                "%d of %d samples so far were longer than model_max_length %d and lost visual tokens, %d of them in "
                "all: raise model_max_length or lower mm_packing_max_patches",
                self.samples,
                self.seen,
                limit,
                self.visual,
            )
