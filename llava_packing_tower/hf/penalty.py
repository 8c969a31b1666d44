"""`repetition_penalty` beside tokens of images, whose ids may lie beyond the vocabulary that is penalized."""

from __future__ import annotations

import torch
from transformers import LogitsProcessor, RepetitionPenaltyLogitsProcessor


class KnownTokensPenalty(LogitsProcessor):
    """transformers' own penalty, for the ids below ``size`` (those of text)."""

    def __init__(self, penalty: float, size: int) -> None:
        self.penalty, self.size = RepetitionPenaltyLogitsProcessor(penalty), size

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        known = input_ids < self.size
        # Another id of the same row stands for an unknown one: an id counts once, however often it is there.
        stand_in = input_ids.masked_fill(~known, -1).max(dim=1, keepdim=True).values.clamp(min=0)
        return self.penalty(torch.where(known, input_ids, stand_in), scores)
