"""Tensor names of published checkpoints mapped to those of the packed encoders, by a table of rules per family."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from .weights import Recipe, WeightPlan

QKVBias = tuple[bool, bool, bool]


def carried(source: Mapping, fields: Iterable[str], aliases: Mapping[str, str] | None = None) -> dict:
    """The fields of a source config that the target config has; ``aliases`` maps other spellings to its names."""
    renamed = {(aliases or {}).get(name, name): value for name, value in source.items()}
    return {name: renamed[name] for name in fields if name in renamed}


@dataclass(frozen=True)
class Rule:
    """What becomes of the tensors that one regular expression names, where a new name is not enough.

    target: name in the encoder, with backreferences. build: makes it of the sources. sources: names (with
    backreferences) of all tensors that it is made of; those that a rule names are claimed by each of them. stacked: the
    first axis counts the blocks, and ``{block}`` in target is their number.
    """

    target: str
    build: Callable[..., torch.Tensor] = lambda tensor: tensor
    sources: tuple[str, ...] = ()
    stacked: bool = False

    def recipes(
        self, match: re.Match, prefix: str, names: Mapping[str, tuple[int, ...]] | Iterable[str]
    ) -> dict[str, Recipe]:
        """The recipes by target, for one tensor that the expression matched."""
        sources = tuple(prefix + match.expand(source) for source in self.sources) or (prefix + match.string,)
        target = match.expand(self.target)
        if not self.stacked:
            return {target: Recipe(sources, self.build)}
        shape = names[prefix + match.string] if isinstance(names, Mapping) else ()
        return {
            target.format(block=number): Recipe(sources, partial(_one_of, self.build, number))
            for number in range(shape[0] if shape else 0)
        }


def _one_of(build: Callable[..., torch.Tensor], number: int, *stacked: torch.Tensor) -> torch.Tensor:
    return build(*(tensor[number] for tensor in stacked))


Target = str | tuple[str, Callable[..., torch.Tensor]] | Rule | Sequence[Rule]


@dataclass(frozen=True)
class KeyMap:
    """Rules for the tensors of one naming scheme, all regular expressions over whole names.

    prefix: what may stand in front of the encoder's own names (taken off before the rules below apply).
    qkv: separate projections, with the named groups ``block`` (its number), ``part`` (q, k or v) and ``kind`` (weight
        or bias); they are fused into ``encoder.layers.<block>.self_attn.qkv``.
    renames: name to target name (with backreferences), the first match counts; with a function that reshapes the
        tensor, or as one or several :class:`Rule`. A name without a rule is kept, and is then reported as unexpected
        unless the encoder has it.
    dropped: tensors that the packed encoder does not use, matched with the prefix, and the reason.
    """

    renames: Mapping[str, Target]
    qkv: str = r"$^"
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
            if self.qkv and (match := re.fullmatch(self.qkv, own)):
                target, sources = self._fused(match, biases)
                plan.recipes[target] = Recipe(tuple(prefix + s for s in sources), lambda *parts: torch.cat(parts))
            else:
                plan.recipes.update(self._renamed(own, prefix, names))
        return plan

    @staticmethod
    def _fused(match: re.Match, biases: QKVBias) -> tuple[str, list[str]]:
        """The fused tensor that a q, k or v tensor belongs to, and all tensors that it is made of."""
        target = f"encoder.layers.{match['block']}.self_attn.qkv"
        if match["kind"] == "bias" and not all(biases):
            return f"{target}.{match['part']}_bias", [match.string]
        start, end = match.span("part")
        return f"{target}.{match['kind']}", [match.string[:start] + part + match.string[end:] for part in "qkv"]

    def _renamed(self, name: str, prefix: str, names: Iterable[str]) -> dict[str, Recipe]:
        for rule, target in self.renames.items():
            if match := re.fullmatch(rule, name):
                made: dict[str, Recipe] = {}
                for one in _rules(target):
                    made.update(one.recipes(match, prefix, names))
                return made
        return {name: Recipe((prefix + name,))}


def _rules(target: Target) -> Sequence[Rule]:
    if isinstance(target, str):
        return (Rule(target),)
    if isinstance(target, Rule):
        return (target,)
    if isinstance(target, tuple) and isinstance(target[0], str):
        return (Rule(target[0], target[1]),)  # type: ignore[arg-type]
    return target  # type: ignore[return-value]
