"""What this package does in each method of a LLaVA, and in which order.

A method is wrapped once, however many steps it has, and where it has none it is not touched. Its steps nest as ``with``
blocks do: the first one in the list is the outermost. Classes and modules have the names that LLaVA-NeXT gives them;
those of another host are fields of :class:`.host.Host`.

Besides methods, a few functions are replaced under every name that LLaVA's modules copied them to; each has one
wrapper: the builders of the tower and of the projector and ``get_model_name_from_path`` (:mod:`.tower_builder`),
``process_anyres_image`` (:mod:`.compat.models`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager

from .patcher import Patches

STEPS: dict[str, tuple[str, ...]] = {
    # ---- llava/model/llava_arch.py
    "LlavaMetaModel.__init__": (
        "know_model",  # saving: the config of a living model is saved with the state of its tower
    ),
    "LlavaMetaModel.initialize_vision_modules": (
        "tower_fp32",  # compat patch: train() casts the tower to float16 in float32 training
        "remember_tower",  # trainable_parts: the config says where the tower's weights are found again
        "native_settings",  # native_resolution: what native resolution means for this run, into tower and config
        "fsdp_tower",  # compat patch: under FSDP the host puts the tower outside of the model
    ),
    "LlavaMetaForCausalLM.prepare_inputs_labels_for_multimodal": (
        "modalities",  # compat patch: what `modalities` of the forward kept
        "count_tokens",  # speed: tokens of the samples that come out
        "words_on_host",  # words_on_host: in training, text and images are put together without asking the GPU
        "blank_images",  # text_only_batches: a batch without images runs the tower on blanks
        "native_images",  # native_resolution: images are encoded here, LLaVA puts them between the text
        "one_lookup",  # text_only_batches: the embeddings of all words of a batch, in one call
    ),
    "LlavaMetaForCausalLM.encode_images": (
        "native_features",  # native_resolution: what `native_images` encoded is not encoded again
    ),
    # ---- llava/model/language_model/*.py: every model class
    "LlavaForCausalLM.forward": (
        "modalities",  # compat patch: the collator gives modalities, which some classes do not take
        "fwd_kw",  # compat patch: generate() passes arguments that the host does not take
    ),
    "LlavaForCausalLM.generate": (
        "pad_left",  # native_resolution: samples of a batch differ in length
    ),
    "LlavaForCausalLM.save_pretrained": (
        "refresh_note",  # saving: the config says whether the checkpoint has the tower's weights
    ),
    "DecoderForCausalLM.forward": (  # of transformers, under each of them
        "packed_step",  # packed_step: a training step has its samples in one row, and the head on supervised positions
    ),
    "PretrainedConfig.save_pretrained": (
        "refresh_note",  # saving: the same where the host saves the config alone
    ),
    # ---- llava/model/builder.py
    "builder.load_pretrained_model": (
        "class_by_architectures",  # model_class: config.json says which class is loaded, not the folder's name
        "strict_adapter",  # checkpoint: a LoRA that does not fit is refused
        "check_loaded",  # checkpoint: the loaded model is compared with its files ...
        "restore_frozen",  # restore_frozen: ... after a frozen tower got its own weights again ...
        "projector_in_full",  # checkpoint: ... and the projector those of its file, unrounded
        "loader_attention",  # compat patch: sdpa where flash-attn cannot be used
        "tower_half",  # compat patch: the tower is not moved to the first GPU as float16
    ),
    # ---- llava/train/train.py
    "train.make_supervised_data_module": (
        "fit_batches",  # native_dataset: a collator that gives a sample as many images as its text has places
    ),
    "train.preprocess_qwen": (
        "chat_template_ids",  # compat patch: apply_chat_template returns lists
    ),
    "train.get_model": (
        "without_deepspeed",  # compat patch: train_dpo looks for a word in the name of DeepSpeed's configuration
    ),
    "train.preprocess_llama3": (
        "chat_template_ids",  # compat patch: the same
    ),
    "train.safe_save_model_for_hf_trainer": (
        "save_what_is_trained",  # saving: the projector alone is saved only if nothing else is trained
        "fsdp_save",  # compat patch: the trainer gathers the model on rank 0
        "cuda_sync",  # compat patch: no torch.cuda.synchronize() without CUDA
    ),
    "train.get_peft_state_non_lora_maybe_zero_3": (
        "complete_tower",  # saving: beside a LoRA, the whole tower or none of it
    ),
    "LazySupervisedDataset.__init__": (
        "same_choice",  # native_dataset: ranks that choose samples by chance choose the same ones
        "empty_media",  # native_dataset: `image: null` is a sample without an image
    ),
    "LazySupervisedDataset.process_image": (
        "keep_sizes",  # native_dataset: at native resolution no image is padded; strips are bounded where one is
    ),
    "LazySupervisedDataset.__getitem__": (
        "whole_pairs",  # native_dataset: a pair of answers that cannot be read is an error (DPO)
        "one_sample",  # left_out: no other one for a sample that cannot be read (LLaVA-NeXT)
        "leave_out",  # left_out: a mark for a sample that cannot be read (LLaVA 1.x)
        "sample_details",  # native_dataset: how images are read, places of frames, positions of patches (LLaVA 1.x)
    ),
    "LazySupervisedDataset._get_item": (
        "leave_out",  # left_out: the same (LLaVA-NeXT)
        "sample_details",  # native_dataset: the same (LLaVA-NeXT)
    ),
    # ---- llava/train/llava_trainer.py, and transformers' Trainer under it
    "LLaVATrainer.__init__": (
        "speed_log",  # speed: what is trained is settled by then
        "training_callbacks",  # train.callbacks: check of the engine, progress, record of the tower
        "left_out_report",  # left_out: the samples that could not be read, at the end
        "tune_parts",  # trainable_parts: mm_tunable_parts on a host without it
        "fsdp_dtypes",  # compat patch: one dtype for FSDP
        "epoch_orders",  # compat patch: a resumed run draws the orders of the epochs that it has done
        "ddp_adapters",  # compat patch: DDP treats a LoRA as it treats a whole model
        "tokenizer_argument",  # compat patch: `tokenizer` is `processing_class` in transformers 5
    ),
    "LLaVATrainer.create_optimizer": (
        "tower_learning_rate",  # trainable_parts: mm_vision_tower_lr on a host without it
        "optimizer_model",  # compat patch: transformers 5 passes the wrapped model
        "empty_groups",  # compat patch: no parameter groups without parameters
    ),
    "LLaVATrainer._get_train_sampler": (
        "sampler_dataset",  # compat patch: transformers passes the dataset
    ),
    "LLaVATrainer.train": (
        "inner_loop",  # compat patch: no trainer_mode that needs the host's own loop
        "end_where_nothing_is_left",  # train.callbacks: all steps were done before
        "zero3_leaves",  # zero3: a decoder layer is gathered at once
    ),
    "LLaVATrainer.training_step": (
        "check_gradients",  # gradients: every trained weight gets a gradient in the first step
        "dealt_batches",  # dealt_batches: the micro-batches that were dealt to this rank
    ),
    "LLaVATrainer.get_train_dataloader": (
        "dealt_batches",  # dealt_batches: samples are dealt over ranks and micro-batches by cost
    ),
    "LLaVATrainer._save": (
        "save_what_is_trained",  # saving: as above
    ),
    "LLaVATrainer.evaluate": (
        "apart_from_speed",  # speed: no part of the training's time
    ),
    "LLaVATrainer._save_checkpoint": (
        "apart_from_speed",  # speed: the same
        "mark_complete",  # train.callbacks: a checkpoint counts once every rank has written its part
        "lora_extras",  # saving: what is trained beside a LoRA
        "save_what_is_trained",  # saving: as above
    ),
    "LLaVATrainer._load_from_checkpoint": (
        "lora_extras",  # saving: what was trained beside a LoRA
    ),
    "Trainer.training_step": (
        "out_of_memory",  # out_of_memory: what the step was asked for, and which keys lower it
        "left_out",  # left_out: what could not be read is noted; a batch of nothing else has no loss
        "full_logits",  # packed_step: a compute_loss that somebody has overridden gets all logits
    ),
    "Trainer.compute_loss": (
        "skip_logits",  # packed_step: an evaluation with use_liger_kernel
    ),
    "Trainer.log": (
        "speed_log",  # speed: beside the loss
    ),
    "DataLoader.__iter__": (  # of torch
        "data_wait",  # speed: how long each batch was waited for
    ),
    "Trainer._save_checkpoint": (
        "save_metrics",  # compat patch: the host passes metrics, which transformers takes no more
    ),
}

_STEPS = "_llava_packing_steps"
_NOTHING = object()


class Call:
    """One call of a host's method, as its steps see it.

    A step may change ``arguments`` and ``extra``. One that sets ``result`` before its ``yield`` takes the place of the
    host's method, and of the steps inside it.
    """

    def __init__(self, method: Callable, names: Sequence[str], instance: object, args: tuple, kwargs: dict) -> None:
        self.method = method
        """The host's own method, bound to ``self``."""
        self.self = instance
        """The object whose method is called; None for a function of a module."""
        self._positional = names[: len(args)]
        if twice := kwargs.keys() & {*self._positional}:
            raise TypeError(f"got multiple values for argument {min(twice)!r}")
        self.arguments: dict[str, object] = {**dict(zip(names, args)), **kwargs}
        """What was given, by name; what was left to a default is not here."""
        self.extra = args[len(names) :]
        """What was given by position beyond the parameters that the host's method has."""
        self.result: object = _NOTHING
        """What the method returned."""

    @property
    def answered(self) -> bool:
        """Whether there is a result already."""
        return self.result is not _NOTHING

    def take(self, name: str) -> object:
        """Remove an argument that the host's method has no parameter for, however it was given; None without it."""
        if self.extra:
            value, *rest = self.extra
            self.extra = tuple(rest)
            return value
        return self.arguments.pop(name, None)

    def run(self) -> object:
        """Call the host's method with the arguments as they are now: by position what was given by position."""
        by_name = dict(self.arguments)
        by_position = [by_name.pop(name) for name in self._positional]
        return self.method(*by_position, *self.extra, **by_name)


Step = Callable[[Call], object]
"""A plain function acts before the host's method; a generator acts before and after its one ``yield``."""


def add_step(owner: object, method: str, name: str, step: Step, patches: Patches, called: str | None = None) -> None:
    """Add a step to a method of a class, or to a function of a module, and wrap that if nothing has done so.

    Args:
        owner: the class or module that has it.
        method: its entry in STEPS.
        name: the step, one of this entry. A step of this name that is there already is replaced.
        step: a function of a :class:`Call`; see ``Step``.
        patches: takes it back.
        called: the method's name in ``owner``, if that is not what stands behind the last dot of ``method``.

    Raises:
        ValueError: the entry has no such step.
        AttributeError: ``owner`` has no such method.
    """
    if name not in STEPS.get(method, ()):
        raise ValueError(f"STEPS has no step {name!r} of {method}, but {', '.join(STEPS.get(method, ['nothing']))}")
    attribute = called or method.rpartition(".")[2]
    steps = getattr(vars(owner).get(attribute), _STEPS, None)
    if steps is None:
        steps = {}
        patches.set(owner, attribute, _wrapper(owner, attribute, STEPS[method], steps))
    steps[name] = step
    patches.on_undo(lambda: steps.pop(name, None))


def _wrapper(owner: object, attribute: str, order: Sequence[str], steps: dict[str, Step]) -> Callable:
    """The one function that stands for a method: it runs ``steps`` in ``order`` around it."""
    of_class = isinstance(owner, type)
    own = vars(owner).get(attribute)
    seen = getattr(owner, attribute) if own is None else own
    if hasattr(seen, _STEPS):  # inherited from a class that has a wrapper: it looks like the host's
        seen = seen.__wrapped__
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = tuple(p.name for p in inspect.signature(seen).parameters.values() if p.kind in kinds)
    names = names[1:] if of_class else names

    # generate() and the Trainer read the signature, and must go on seeing the host's: hence wraps.
    @functools.wraps(seen)
    def wrapper(*args, **kwargs):
        instance, args = (args[0], args[1:]) if of_class else (None, args)
        if own is None:  # inherited: looked up now, for the base class may be patched or not by then
            method = getattr(super(owner, instance), attribute)
        else:
            method = functools.partial(own, instance) if of_class else own
        call = Call(method, names, instance, args, kwargs)
        with ExitStack() as stack:
            for step in [steps[name] for name in order if name in steps]:
                if inspect.isgeneratorfunction(step):
                    stack.enter_context(contextmanager(step)(call))
                else:
                    step(call)
                if call.answered:
                    break
            else:
                call.result = call.run()
        return call.result

    setattr(wrapper, _STEPS, steps)
    return wrapper
