"""Floating-point operations that a training step asks for, whoever runs it. Plain numbers: no torch.

A matmul of ``[n, a]`` with ``[a, b]`` has ``2 n a b`` operations. Counted are linear layers and attention (scores and
weighted values) over real tokens: no padding, no prefix tokens, and of a causal square half. Not counted are the
projector, embeddings, norms, activations, and what checkpointing computes again.

The backward pass of a linear layer has twice the operations of the forward pass, half of them for its weights and half
for its input; that of attention has twice as well, all of them for its inputs. This is the count of the PaLM paper
(Chowdhery et al. 2022, appendix B, https://arxiv.org/abs/2204.02311), there with every position in the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Flops:
    """Operations of one forward pass: ``linear`` of layers with weights, ``attention`` of those without."""

    linear: float = 0.0
    attention: float = 0.0

    @property
    def forward(self) -> float:
        return self.linear + self.attention

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.linear + other.linear, self.attention + other.attention)

    def step(self, trained: bool, differentiated: bool = True) -> float:
        """Operations of a training step.

        trained: the weights get gradients; differentiated: something in front of this part is trained, so that
        gradients go through it.
        """
        if trained:
            return 3 * self.forward
        return 2 * self.linear + 3 * self.attention if differentiated else self.forward


def attention_flops(width: int, lengths: Sequence[int], causal: bool = False) -> float:
    """``4 n^2 width`` summed over segments, of one layer: scores and weighted values; half of it if causal."""
    return (2.0 if causal else 4.0) * width * sum(n * n for n in lengths)


def encoder_flops(
    config: Any,
    lengths: Sequence[int],
    layers: int | None = None,
    grids: Sequence[Sequence[int]] | None = None,
) -> Flops:
    """One forward pass of a vision encoder.

    config: has ``hidden_size``, ``intermediate_size``, ``num_hidden_layers`` and, where MLPs may be gated,
    ``use_gated_mlp``; lengths: patches of each image, clip or tile, which attend to each other; layers: those that the
    selected features need (all if left out); grids: (frames, rows, columns) of each, from which a family whose blocks
    attend in windows or slices of clips (``config.attended``) has its segments.
    """
    width, inner = config.hidden_size, config.intermediate_size
    layers = config.num_hidden_layers if layers is None else layers
    gated = getattr(config, "use_gated_mlp", getattr(config, "model_type", None) == "aimv2_packing")
    linear = 2.0 * (4 * width**2 + (3 if gated else 2) * width * inner) * sum(lengths)
    kinds = [(lengths, range(layers))] if grids is None or not hasattr(config, "attended") else config.attended(grids)
    attention = sum(attention_flops(width, own) * sum(i < layers for i in blocks) for own, blocks in kinds)
    return Flops(linear * layers, attention)


def decoder_flops(config: Any, lengths: Sequence[int]) -> Flops:
    """One forward pass of the layers of a LLaMA, Qwen2 or Mistral, without the head.

    config: of transformers; lengths: tokens of each sample.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or width // heads
    inner, keys = heads * head_dim, (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    weights = 2 * width * inner + 2 * width * keys + 3 * width * config.intermediate_size
    return Flops(2.0 * weights * layers * sum(lengths), attention_flops(inner, lengths, causal=True) * layers)


def head_flops(config: Any, positions: int) -> Flops:
    """One forward pass of the language model's head at so many positions: those with a label."""
    return Flops(2.0 * config.hidden_size * config.vocab_size * positions)


def step_flops(
    encoder: Flops,
    decoder: Flops,
    head: Flops = Flops(),  # noqa: B008
    *,
    tower_trained: bool = True,
    decoder_trained: bool = True,
    projector_trained: bool = True,
) -> float:
    """Operations of a training step: 3 x forward, of frozen parts less.

    A frozen tower has its forward pass alone, for nothing in front of it is trained. Through a frozen decoder gradients
    go to what is in front of it: it lacks those of its weights. An adapter's own operations (LoRA) are not counted.
    """
    behind = tower_trained or projector_trained
    language = (part.step(decoder_trained, behind) for part in (decoder, head))
    return encoder.step(tower_trained, differentiated=False) + sum(language)
