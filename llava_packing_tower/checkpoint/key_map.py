"""Tensor names of published checkpoints mapped to those of the packed encoders, by a table of rules per family."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from .weights import Recipe, WeightPlan

QKVBias = tuple[bool, bool, bool]


def carried(source: Mapping, fields: Iterable[str], aliases: Mapping[str, str] | None = None) -> dict:
    """The fields of a source config that the target config has; ``aliases`` maps other spellings to its names."""
    renamed = {(aliases or {}).get(name, name): value for name, value in source.items()}
    return {name: renamed[name] for name in fields if name in renamed}


@dataclass(frozen=True)
class KeyMap:
    """Rules for the tensors of one naming scheme, all regular expressions over whole names.

    prefix: what may stand in front of the encoder's own names (taken off before the rules below apply).
    qkv: separate projections, with the named groups ``block`` (its number), ``part`` (q, k or v) and ``kind`` (weight
        or bias); they are fused into ``encoder.layers.<block>.self_attn.qkv``.
    renames: name to target name (with backreferences), the first match counts; a rule may have a function that reshapes
        the tensor. A name without a rule is kept, and is then reported as unexpected unless the encoder has it.
    dropped: tensors that the packed encoder does not use, matched with the prefix, and the reason.
    """

    qkv: str
    renames: Mapping[str, str | tuple[str, Callable[..., torch.Tensor]]]
    dropped: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""

    def plan(self, names: Iterable[str], biases: QKVBias = (True, True, True)) -> WeightPlan:
        """Recipes for the tensors ``names`` of a checkpoint; ``biases`` says which of q, k and v have one."""
        plan = WeightPlan()
        for name in names:
            if reason := next((why for rule, why in self.dropped.items() if re.fullmatch(rule, name)), None):
                plan.dropped[name] = reason
                continue
            found = re.match(f"(?:{self.prefix})?", name)
            prefix = found.group() if found else ""
            own = name[len(prefix) :]
            if match := re.fullmatch(self.qkv, own):
                target, sources = self._fused(match, biases)
                plan.recipes[target] = Recipe(tuple(prefix + s for s in sources), lambda *parts: torch.cat(parts))
            else:
                target, build = self._renamed(own)
                plan.recipes[target] = Recipe((name,), build) if build else Recipe((name,))
        return plan

    @staticmethod
    def _fused(match: re.Match, biases: QKVBias) -> tuple[str, list[str]]:
        """The fused tensor that a q, k or v tensor belongs to, and all tensors that it is made of."""
        target = f"encoder.layers.{match['block']}.self_attn.qkv"
        if match["kind"] == "bias" and not all(biases):
            return f"{target}.{match['part']}_bias", [match.string]
        start, end = match.span("part")
        return f"{target}.{match['kind']}", [match.string[:start] + part + match.string[end:] for part in "qkv"]

    def _renamed(self, name: str) -> tuple[str, Callable[..., torch.Tensor] | None]:
        for rule, target in self.renames.items():
            if match := re.fullmatch(rule, name):
                template, build = target if isinstance(target, tuple) else (target, None)
                return match.expand(template), build
        return name, None
