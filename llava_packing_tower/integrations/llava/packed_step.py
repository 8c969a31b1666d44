"""The training step of a LLaVA with a packing tower: samples in one row, head on supervised positions, fused layers.

LLaVA's models hand a padded batch to the ``forward`` of transformers' decoder that they are built on. That is the one
method that is wrapped. It is unchanged for everything but a training step of such a LLaVA.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import nn

from ...models.runtime.execution import compute_dtype
from ...multimodal.packed_decoder import PackedRow, causal_backend, pack_batch, remember
from ...multimodal.supervised_head import IGNORE, next_labels, supervised_loss
from ...utils.say import say
from .arguments import current_arguments
from .decoder_attention import read_rows, unsupported_attention, without_mask
from .decoder_graphs import recomputed_by_graphs
from .liger import TORCH_NORM, fuse_layers, unsupported_liger
from .methods import Call, add_step
from .patcher import Patches
from .trainable_parts import is_packing_tower, without_adapters
from .words_on_host import on_host

logger = logging.getLogger(__name__)

DECODERS = {  # transformers' own classes, by their modules
    "transformers.models.llama.modeling_llama": "LlamaForCausalLM",
    "transformers.models.qwen2.modeling_qwen2": "Qwen2ForCausalLM",
    "transformers.models.mistral.modeling_mistral": "MistralForCausalLM",
}
CACHES = ("past_key_values", "cache", "cache_position")
_PLAN = "_llava_packing_step"
_full_logits: ContextVar[bool] = ContextVar("a loss is computed from the logits", default=False)
_sample_weights: ContextVar[SampleWeights | None] = ContextVar("weights of the samples", default=None)


# ---------------------------------------------------------------- the plan


@dataclass(frozen=True)
class StepPlan:
    """What the training step of a model does. Each reason says why a part is off; None where it is on.

    attention: the backend of the packed decoder; fused: the layers that liger-kernel computes.
    """

    attention: str | None
    decoder_reason: str | None
    head_reason: str | None
    fused: tuple[str, ...]
    liger_reason: str | None

    def __str__(self) -> str:
        parts = (
            ("packed decoder", f"on ({self.attention})", self.decoder_reason),
            ("head", "supervised positions", self.head_reason),
            ("liger", ", ".join(self.fused), self.liger_reason),
        )
        off = {"head": "all positions"}
        said = (f"{name}: " + (on if why is None else f"{off.get(name, 'off')} ({why})") for name, on, why in parts)
        return "; ".join(said)


def make_plan(model: nn.Module) -> StepPlan:
    """Decide how a LLaVA trains; changes nothing."""
    unknown = unsupported_model(model)
    if unknown is not None:
        return StepPlan(None, unknown, unknown, (), unknown)
    decoder = unsupported_decoder(model)
    attention = None
    if decoder is None:
        weight = next(model.model.layers[0].self_attn.q_proj.parameters())
        # Quantised projections hold integers, and compute in the dtype of the norms.
        dtype = compute_dtype(model.model.norm.weight)
        attention = causal_backend(weight.device, dtype, model.model.layers[0].self_attn.head_dim)
    full = "mm_packing_full_logits" if setting(model, "mm_packing_full_logits", False) else None
    liger = unsupported_liger(model, _liger_asked(model))
    layers = ("RMSNorm by torch" if TORCH_NORM else "RMSNorm", *["rotary"] * (decoder is None), "SwiGLU")
    return StepPlan(attention, decoder, full, layers if liger is None else (), liger)


def unsupported_model(model: nn.Module) -> str | None:
    """None for a LLaVA whose training step is known here, else why it stays the host's own."""
    if not is_packing_tower(getattr(model, "get_vision_tower", lambda: None)()):
        return "the vision tower is not a packing tower"
    base = decoder_base(type(model))
    if base is None:
        return f"{type(model).__name__} is not built on {', '.join(DECODERS.values())} of transformers"
    for owner in _own_forwards(type(model), base):
        if not _hands_over(owner):
            return f"{owner.__name__} computes its loss itself"
    if getattr(model.config, "pretraining_tp", 1) > 1:
        return f"pretraining_tp is {model.config.pretraining_tp}"
    if getattr(model, "loss_type", None) not in (None, "ForCausalLM") or "_loss_function" in vars(model):
        return "the model has a loss function of its own"
    return None


def decoder_base(cls: type) -> type | None:
    """The class of transformers that a LLaVA class is built on; None for one that is not in DECODERS."""
    for base in cls.__mro__:
        if DECODERS.get(base.__module__) == base.__name__:
            return base
    return None


def _own_forwards(cls: type, base: type) -> list[type]:
    """The classes of a LLaVA class, down to the one of transformers, that have a ``forward``."""
    before = cls.__mro__[: cls.__mro__.index(base)]
    return [each for each in before if "forward" in vars(each)]


def _hands_over(cls: type) -> bool:
    """Whether the ``forward`` of a class leaves loss and logits to the one that it inherits.

    LLaVAction's has a loss of its own; one that reads ``logits`` scales or caps them.
    """
    code = getattr(inspect.unwrap(vars(cls)["forward"]), "__code__", None)
    names = set() if code is None else set(code.co_names)
    return {"super", "forward"} <= names and "logits" not in names


def unsupported_decoder(model: nn.Module) -> str | None:
    """None if the decoder can take packed rows, else why its batches stay padded."""
    if not setting(model, "mm_packing_decoder", True):
        return "mm_packing_decoder: false"
    config = model.config
    window = _window(config)
    longest = getattr(config, "tokenizer_model_max_length", None)
    if window is not None and (longest is None or longest > window):
        return f"sliding window of {window} tokens, and samples of up to {longest or 'any number of'} tokens"
    if getattr(config, "use_pos_skipping", False):
        return "use_pos_skipping"
    return next(filter(None, (unsupported_attention(layer.self_attn) for layer in model.model.layers)), None)


def _window(config: object) -> int | None:
    """The sliding window that transformers gives the decoder. Without flash attention, Qwen2 of 4.40 has it whatever
    ``use_sliding_window`` says."""
    switched_off = not getattr(config, "use_sliding_window", True)
    if switched_off and getattr(config, "_attn_implementation", None) == "flash_attention_2":
        return None
    return getattr(config, "sliding_window", None)


def setting(model: nn.Module, name: str, default: bool) -> bool:
    """A key of ours: of the model's config, else of the arguments that train.py has read."""
    for owner in (model.config, current_arguments("ModelArguments")):
        value = getattr(owner, name, None)
        if value is not None:
            return bool(value)
    return default


def _liger_asked(model: nn.Module) -> bool | None:
    """Whether liger-kernel is switched on or off; None where nothing is said."""
    if not setting(model, "mm_packing_liger", True):
        return False
    return True if getattr(current_arguments("TrainingArguments"), "use_liger_kernel", False) else None


def plan_of(model: nn.Module, patches: Patches) -> StepPlan:
    """The plan of a model: made, logged and put into effect when it is first asked for."""
    plan = vars(model).get(_PLAN)
    if plan is None:
        plan = make_plan(model)
        if plan.decoder_reason is None:
            for layer in model.model.layers:
                read_rows(type(layer.self_attn), patches)
        fuse_layers(model, patches, on=plan.liger_reason is None)
        setattr(model, _PLAN, plan)
        say(logger, "training step: %s", plan)
    return plan


def forget_plan(model: nn.Module) -> None:
    """Have the plan made again: its keys were changed."""
    vars(model).pop(_PLAN, None)


# ---------------------------------------------------------------- the step


def is_training_step(model: nn.Module, given: Mapping[str, object]) -> bool:
    """Whether the decoder was called for a loss to be differentiated, and for nothing else but logits."""
    mask = given.get("attention_mask")
    return (
        model.training
        and torch.is_grad_enabled()
        and given.get("labels") is not None
        and given.get("inputs_embeds") is not None
        and given.get("position_ids") is None
        and all(given.get(name) is None for name in CACHES)
        and not any(_wanted(model, given, name) for name in ("output_attentions", "output_hidden_states"))
        and _wanted(model, given, "return_dict", True)
        and (mask is None or mask.dim() == 2)
    )


def _wanted(model: nn.Module, given: Mapping[str, object], name: str, default: bool = False) -> bool:
    """A switch of ``forward``: as it was given, else as the model's config has it."""
    value = given.get(name)
    return bool(getattr(model.config, name, default) if value is None else value)


KNOWN = frozenset(
    {
        *("self", "input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", "use_cache"),
        *("output_attentions", "output_hidden_states", "return_dict", "num_items_in_batch"),
        *CACHES,
    }
)


@dataclass
class SampleWeights:
    """What a supervised token of each sample of a micro-batch counts in its loss, where samples were dealt.

    weights, tokens, supervised: of each sample, as they were counted when it was read; used: how often a step took
    them.
    """

    weights: Sequence[float]
    tokens: Sequence[int]
    supervised: Sequence[int]
    used: int = 0

    def apply(self, there: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The targets without those of samples that count nothing, and the weight of each position, both ``[B, L]``.

        there: bool, which positions are tokens. All of it on the host.

        Raises ``RuntimeError`` where the model has made other samples than were counted.
        """
        found = torch.stack([there.sum(1), (targets != IGNORE).sum(1)]).tolist()
        if found != [list(self.tokens), list(self.supervised)]:
            raise RuntimeError(
                f"the model has samples of {found[0]} tokens, {found[1]} of them supervised, but {list(self.tokens)} "
                f"and {list(self.supervised)} were counted: mm_packing_balance: false keeps LLaVA's own order"
            )
        self.used += 1
        weights = torch.tensor(self.weights, dtype=torch.float64)[:, None].expand(targets.shape)
        return targets.masked_fill(weights == 0, IGNORE), weights


def packed_step(model: nn.Module, plan: StepPlan, given: Mapping[str, object]) -> object:
    """Loss of a padded batch, and its logits where somebody asks for them.

    given: what the decoder's ``forward`` was called with: ``inputs_embeds [B, L, hidden]``, ``labels [B, L]``,
    ``attention_mask [B, L]`` or None, ``num_items_in_batch``.
    """
    from transformers.modeling_outputs import CausalLMOutputWithPast

    embeds, mask, labels = given["inputs_embeds"], given.get("attention_mask"), given["labels"]
    targets = next_labels(on_host(labels))  # what a step is made of, it learns without waiting for the GPU
    there = torch.ones_like(targets, dtype=torch.bool) if mask is None else on_host(mask).bool()
    row = pack_batch(there, targets, embeds.device) if plan.decoder_reason is None else None
    weights, num_items = None, given.get("num_items_in_batch")
    if (samples := _sample_weights.get()) is not None:
        targets, weights = samples.apply(there, targets)
    states = _run_decoder(model, embeds, mask, row)
    full = plan.head_reason is not None or _full_logits.get()
    logits = None
    if full:
        padded = states if row is None else row.pad(states, *labels.shape)
        logits = model.lm_head(padded)
        each = None if weights is None else weights.flatten()
        loss = supervised_loss(logits.flatten(0, 1), targets.flatten(), _same, num_items, each)
        return CausalLMOutputWithPast(loss=loss, logits=logits)
    flat = targets.flatten() if row is None else row.pack(targets)[0]
    if weights is not None:
        weights = weights.flatten() if row is None else row.pack(weights)[0]
    loss = supervised_loss(states.flatten(0, 1), flat, model.lm_head, num_items, weights)
    return CausalLMOutputWithPast(loss=loss)


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def _run_decoder(
    model: nn.Module, embeds: torch.Tensor, mask: torch.Tensor | None, row: PackedRow | None
) -> torch.Tensor:
    """Hidden states ``[1, T, hidden]`` of the row, or ``[B, L, hidden]`` of the batch where there is none."""
    if row is None:
        return model.model(inputs_embeds=embeds, attention_mask=mask, use_cache=False)[0]
    states = row.pack(embeds)
    with without_mask(model.model), recomputed_by_graphs(model, states, row):
        return model.model(inputs_embeds=states, position_ids=row.position_ids, use_cache=False)[0]


# ---------------------------------------------------------------- into the host


def into_decoders(patches: Patches) -> None:
    """Add the packed step to ``forward`` of the decoders that models of hosts are built on."""

    def step(call: Call) -> None:
        self, given = call.self, call.arguments
        if not self.training:
            return
        if (positions := given.get("position_ids")) is not None:
            remember(positions, None)
        others = {name for name, value in given.items() if name not in KNOWN and value}
        if not others and is_training_step(self, given) and unsupported_model(self) is None:
            call.result = packed_step(self, plan_of(self, patches), given)

    for module, name in DECODERS.items():
        add_step(getattr(import_module(module), name), "DecoderForCausalLM.forward", "packed_step", step, patches)


def into_trainer(patches: Patches) -> None:
    """Have transformers' Trainer give logits to a ``compute_loss`` that somebody has overridden; say the plan of a
    decoder that has no packed step.

    Label smoothing and ``compute_loss_func`` need nothing: the Trainer then calls the model without labels.
    """
    from transformers import Trainer

    def with_logits(call: Call) -> Iterator[None]:
        self = call.self
        plain = without_adapters(self.model)
        if is_packing_tower(getattr(plain, "get_vision_tower", lambda: None)()):
            plan_of(plain, patches)
        with full_logits() if is_overridden(self.compute_loss) else contextlib.nullcontext():
            yield

    def without_skip(call: Call) -> None:
        # With use_liger_kernel an evaluation says so to models that liger has given another forward.
        inputs = call.arguments["inputs"]
        if "skip_logits" in inputs and hasattr(call.self.model, "get_vision_tower"):
            call.arguments["inputs"] = {name: value for name, value in inputs.items() if name != "skip_logits"}

    add_step(Trainer, "Trainer.training_step", "full_logits", with_logits, patches)
    add_step(Trainer, "Trainer.compute_loss", "skip_logits", without_skip, patches)


def is_overridden(compute_loss: Callable) -> bool:
    """Whether a trainer's ``compute_loss`` is not transformers' own."""
    module = getattr(compute_loss, "__module__", "")
    return not module.startswith("transformers.")


@contextlib.contextmanager
def full_logits() -> Iterator[None]:
    """Within it, training steps return logits of all positions; those of padding mean nothing."""
    token = _full_logits.set(True)
    try:
        yield
    finally:
        _full_logits.reset(token)


@contextlib.contextmanager
def weighing(samples: SampleWeights) -> Iterator[None]:
    """Within it, the loss of a training step is the weighted sum over the tokens of its samples.

    Raises ``RuntimeError`` at its end if no step has used the weights.
    """
    token = _sample_weights.set(samples)
    try:
        yield
    finally:
        _sample_weights.reset(token)
    if samples.used != 1:
        raise RuntimeError(
            f"the weights of dealt samples were used {samples.used} times: the model did not take the packed step; "
            f"mm_packing_balance: false keeps LLaVA's own order"
        )


def are_weighed() -> bool:
    """Whether a training step of dealt samples is running."""
    return _sample_weights.get() is not None
