"""Loading and saving of all models of this package. Loading is strict: every tensor fits, or nothing is loaded."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from ..utils.files import CONFIG_NAME, atomic_folder, write_json
from .config_check import DROPOUTS, check_config
from .load_options import AUTO_OPTIONS, HUB_OPTIONS, check_options, placement, spread
from .model_type import source_type
from .opening import open_checkpoint
from .weights import (
    Recipe,
    WeightFiles,
    WeightPlan,
    construction,
    describe_problems,
    is_weight_file,
    load_weights,
    parameter_shapes,
    plan_problems,
)

logger = logging.getLogger(__name__)


class StrictPreTrainedModel(PreTrainedModel):
    """A ``PreTrainedModel`` that also loads foreign checkpoints, by a plan, and never leaves a weight random."""

    config_class: type[PretrainedConfig]
    source_model_types: tuple[str, ...] = ()
    """``model_type`` of foreign checkpoints that :meth:`from_pretrained` converts while loading."""
    tower_prefix: str | None = None
    """Pattern with which the names of this model's tensors begin in a larger checkpoint; all others are left there."""
    value_tensors: str | None = None
    """Pattern of small tensors of a foreign checkpoint whose numbers belong to the config, see :meth:`with_values`."""
    merger_prefix: str | None = None
    """That of the projector behind this tower, where the tower's does not cover it."""

    @classmethod
    def config_from_source(cls, source: dict, shapes: Mapping[str, tuple[int, ...]] | None = None) -> PretrainedConfig:
        """This model's config from the config.json of a foreign checkpoint (a ``source_model_types`` one).

        shapes: name and shape of its tensors, where they are known, for what a config may leave unsaid.
        """
        raise NotImplementedError

    @classmethod
    def with_values(cls, source: dict, files: WeightFiles) -> dict:
        """``source`` with the numbers of the ``value_tensors``, as nested lists under their names."""
        pattern = cls.value_tensors
        names = [name for name in files.shapes() if re.fullmatch(pattern, name)] if pattern is not None else []
        return {**source, **{name: files[name].tolist() for name in names}}

    @classmethod
    def read_config(
        cls, source: dict, shapes: Mapping[str, tuple[int, ...]] | None = None, where: object = "the checkpoint"
    ) -> PretrainedConfig:
        """This model's config from the content of a config.json, own or foreign, with values that can be.

        Raises ``ValueError`` that begins with ``where``.
        """
        own = source.get("model_type") == cls.config_class.model_type
        try:
            config = cls.config_class.from_dict(source) if own else cls.config_from_source(source, shapes)
        except Exception as error:  # transformers' own fields are read by its code, which checks none of them
            raise ValueError(f"{where}: its config cannot be used: {error}") from error
        layers = getattr(config, "num_hidden_layers", 0)
        if shapes is not None and isinstance(layers, int) and layers > len(shapes):
            raise ValueError(
                f"{where}: the config has {layers} layers, but the weights have only {len(shapes)} tensors"
            )
        check_config(config, where)
        return config

    @classmethod
    def plan_from_source(
        cls, source: dict, config: PretrainedConfig, shapes: Mapping[str, tuple[int, ...]]
    ) -> WeightPlan:
        """Recipes that fill this model from the tensors of a foreign checkpoint."""
        raise NotImplementedError

    def set_attention_backend(self, name: str) -> None:
        """Choose the attention implementation; ``ValueError`` for one that this model does not have."""
        raise NotImplementedError

    def set_compile(self, choice: bool | None) -> None:
        """The old name of :meth:`set_fused`: False means eager blocks. Models that fuse nothing ignore it."""

    def set_fused(self, choice: bool | None) -> None:
        """Run the blocks eager (False), fused (True), or as is best (None). Models that fuse nothing ignore it."""

    @classmethod
    def plan(
        cls,
        source: dict,
        shapes: Mapping[str, tuple[int, ...]],
        config: PretrainedConfig | None = None,
        where: object = "the checkpoint",
    ) -> tuple[PretrainedConfig, WeightPlan]:
        """Config and recipes for a checkpoint with this config.json content and these tensors.

        Raises ``ValueError`` for a ``model_type`` that this class does not load, or a config that cannot be true.
        """
        own_type = cls.config_class.model_type
        found = source_type(source, (own_type, *cls.source_model_types))
        if found != own_type and found not in cls.source_model_types:
            known = ", ".join((own_type, *cls.source_model_types))
            raise ValueError(f"{where}: model_type {found!r} is not one that {cls.__name__} loads ({known})")
        own = found == own_type
        if config is None:
            config = cls.read_config(source, shapes, where)
        check_config(config, where)
        plan = (
            WeightPlan({key: Recipe((key,)) for key in shapes}) if own else cls.plan_from_source(source, config, shapes)
        )
        return config, plan

    @classmethod
    def without_values(cls, config: PretrainedConfig, dtype: torch.dtype, where: object) -> StrictPreTrainedModel:
        """A model whose weights are yet to come, see :func:`weights.construction`.

        Raises ``ValueError`` that begins with ``where`` for a config that no model can be made from.
        """
        try:
            with construction(dtype):
                return cls(config)
        except (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError, AttributeError) as error:
            reason = str(error).partition("\n")[0]  # torch lists its signatures behind it
            raise ValueError(f"{where}: no model can be made from its config: {reason}") from error

    @classmethod
    def from_weights(
        cls,
        config: PretrainedConfig,
        plan: WeightPlan,
        files: WeightFiles,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> StrictPreTrainedModel:
        """A model in evaluation mode whose every parameter comes from ``files`` by ``plan``; else ``ValueError``."""
        model = cls.without_values(config, dtype, files.name / CONFIG_NAME if files.name.is_dir() else files.name)
        load_weights(model, plan, files, device)
        return model.eval()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        config: PretrainedConfig | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        device_map: torch.device | str | int | dict | None = None,
        attn_implementation: str | None = None,
        subfolder: str = "",
        use_safetensors: bool | None = None,
        output_loading_info: bool = False,
        **options: object,
    ) -> Any:
        """Load a checkpoint, or convert a known foreign one in memory. Strict: all tensors fit, or an error.

        Args:
            pretrained_model_name_or_path: local folder, hub id, or weight file of a known naming (``namings``).
            config: use this config in place of the one in the folder.
            dtype (or torch_dtype): of the weights; None is torch's default dtype, "auto" that of the file.
            device: where the weights go; None is the CPU.
            device_map: a device as transformers writes it (``"cuda"``, ``0``, ``{"": "cuda:0"}``), or a map of several,
                or ``auto``, ``balanced``, ``balanced_low_0``, ``sequential``: loaded on the CPU, then spread by
                accelerate.
            attn_implementation: attention backend, see :meth:`set_attention_backend`; None is ``auto``.
            subfolder: of the folder or hub repository.
            use_safetensors: True and False ask for this kind of file; None takes safetensors where there are any.
            output_loading_info: also return what transformers' method reports about the tensors. Nothing is ever
                missing or mis-shaped; ``unexpected_keys`` are the tensors of a foreign checkpoint that this model has
                no use for.
            options: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` go to huggingface_hub; what
                transformers' Auto classes add is accepted and has no effect; anything else is a ``TypeError``, with
                what to use instead where there is something.

        Returns:
            The model in evaluation mode; with ``output_loading_info`` a pair of it and that information.

        Raises:
            ValueError: no config, another model_type, or missing, unexpected, mis-shaped or non-float tensors; both
                ``device`` and ``device_map``; two different dtypes.
        """
        check_options(cls, options)
        if device is not None and device_map is not None:
            raise ValueError(f"device {device!r} and device_map {device_map!r} are alternatives: pass only one of them")
        if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
            raise ValueError(f"dtype {dtype!r} and torch_dtype {torch_dtype!r} differ: pass only one of them")
        hub = {key: value for key, value in options.items() if key in HUB_OPTIONS and value is not None}
        part = cls.tower_prefix
        opened = open_checkpoint(
            pretrained_model_name_or_path, subfolder, use_safetensors, part=lambda raw: part, **hub
        )
        folder, files, raw = opened.path, opened.files, cls.with_values(opened.raw, opened.files)
        dtype = torch_dtype if dtype is None else dtype
        if config is not None and options.keys() & AUTO_OPTIONS:
            # AutoModel moves attn_implementation into the config, and in transformers 4 dtype as well.
            dtype = _changed_dtype(config, raw) if dtype is None else dtype
            attn_implementation = attn_implementation or getattr(config, "_attn_implementation_internal", None)
            config._attn_implementation_internal = None  # transformers has other names for backends
        config, plan = cls.plan(raw, files.shapes(), config, opened.where)
        if (found := raw.get("model_type")) != cls.config_class.model_type:
            logger.warning("%s: a %s checkpoint, converted to %s in memory", folder, found, config.model_type)
        if files.left:
            count = len(set(files.left.values()))
            logger.info("%s: %d tensors that are not the tower's are left in %d files", folder, len(files.left), count)
        one, device_map = placement(device_map if device is None else device)
        model = cls.from_weights(config, plan, files, _as_dtype(dtype, files), one)
        model.set_attention_backend(attn_implementation or "auto")
        if device_map is not None:
            spread(model, device_map)
        if not output_loading_info:
            return model
        kind = list if transformers.__version__.startswith("4.") else set
        info = {
            "missing_keys": kind(),
            "unexpected_keys": kind(sorted((*plan.dropped, *files.left))),
            "mismatched_keys": kind(),
        }
        return model, {**info, "error_msgs": []}

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        save_function: object = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        safe_serialization: bool = True,
        variant: str | None = None,
        token: object = None,
        save_peft_format: bool = True,
        **options: object,
    ) -> None:
        """Write config.json and safetensors; weights of an earlier save that these replace are removed.

        Args:
            save_directory: made where it does not exist; other files in it stay.
            is_main_process: False writes nothing.
            state_dict: write these tensors (an average, or what accelerate gathered) in place of the model's own. An
                empty one, with which transformers' Trainer says that the weights are saved elsewhere, writes
                config.json alone.
            max_shard_size: largest file, bytes or a text such as "5GB".
            save_function, token, save_peft_format, and ``save_original_format`` in options: what transformers does with
                them (pickled files, uploads, adapters, other names) never happens here.

        Raises:
            ValueError: tensors that are not those of this model (missing, unexpected, mis-shaped or empty ones:
                adapters, quantized layers, ZeRO-3); ``safe_serialization=False``, ``variant`` or ``push_to_hub``.
            TypeError: another keyword.
        """
        if strange := set(options) - {"save_original_format"}:
            raise TypeError(f"{type(self).__name__}.save_pretrained() got unexpected arguments {sorted(strange)}")
        if not safe_serialization:
            raise ValueError("safe_serialization=False: weights are written as safetensors only; leave it out")
        if variant is not None:
            raise ValueError(f"variant={variant!r}: variants are not written; save into a folder of its own")
        if push_to_hub:
            raise ValueError("push_to_hub=True: save first, then upload the folder (huggingface_hub.upload_folder)")
        if Path(save_directory).is_file():
            raise ValueError(f"{save_directory} is a file; a model is saved into a folder")
        if not is_main_process:
            return
        tensors = self._tensors_to_save(state_dict)
        from huggingface_hub import save_torch_state_dict

        dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), self.dtype)
        with atomic_folder(save_directory, replaces=is_weight_file) as folder:
            write_json(config_content(type(self), self.config, dtype), folder / CONFIG_NAME)
            if tensors:
                save_torch_state_dict(tensors, folder, max_shard_size=max_shard_size, metadata={"format": "pt"})
            else:
                logger.warning("%s: the given state_dict is empty, only config.json is written", save_directory)

    def _tensors_to_save(self, state_dict: Mapping[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
        """Raises ``ValueError`` if :meth:`from_pretrained` could not load them again."""
        if state_dict is not None and not state_dict:
            return {}
        if state_dict is None and any(hasattr(p, "ds_id") for p in self.parameters()):
            raise ValueError(
                "the weights are partitioned by ZeRO-3: gather them on all ranks and pass them, "
                "save_pretrained(folder, state_dict=accelerator.get_state_dict(engine))"
            )
        tensors = dict(self.state_dict() if state_dict is None else state_dict)
        with torch.device("meta"):
            wanted = parameter_shapes(type(self)(self.config))
        plan = WeightPlan({key: Recipe((key,)) for key in tensors})
        if problems := plan_problems(plan, {key: tuple(t.shape) for key, t in tensors.items()}, wanted):
            raise ValueError(
                f"these tensors are not those of a {type(self).__name__} (adapters, quantized or partitioned weights? "
                f"Merge them, or save with the library that changed the model): {describe_problems(problems)}"
            )
        if meta := [key for key, tensor in tensors.items() if tensor.is_meta]:
            raise ValueError(f"{len(meta)} tensors have no values (offloaded by accelerate?), {meta[0]} for example")
        return {key: _on_its_own(tensor) for key, tensor in tensors.items()}

    def train(self, mode: bool = True) -> StrictPreTrainedModel:
        """As any module's; says if the config has a dropout, which is of no effect here."""
        rates = {name: rate for name in DROPOUTS if (rate := getattr(self.config, name, 0))}
        if mode and rates:
            said = ", ".join(f"{name} {rate}" for name, rate in rates.items())
            _warn_once(f"{type(self).__name__}: its config has {said}; the model is trained without dropout")
        return super().train(mode)

    def set_attn_implementation(self, attn_implementation: str | dict, *_: object, **__: object) -> None:
        """transformers' name for :meth:`set_attention_backend`. (A dict names sub-models; its key "" is this one.)"""
        if isinstance(attn_implementation, dict):
            if set(attn_implementation) != {""}:
                raise ValueError(f"this model has no sub-models to choose attention for, got {attn_implementation}")
            attn_implementation = str(attn_implementation[""])
        try:
            self.set_attention_backend(attn_implementation)
        except ValueError as error:
            raise ValueError(
                f'Specified `attn_implementation="{attn_implementation}"` is not supported: {error}'
            ) from error
        if attn_implementation in ("eager", "sdpa"):  # the names that any transformers takes when a model is made
            self.config._attn_implementation = attn_implementation


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning(text)


def _on_its_own(tensor: torch.Tensor) -> torch.Tensor:
    """The same values; a copy where the tensor is a part of a larger one, as what ZeRO-3 gathers is."""
    whole = tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
    return tensor if whole else tensor.clone()


def _changed_dtype(config: PretrainedConfig, raw: dict) -> torch.dtype | str | None:
    """The dtype of a config that was read from ``raw``, if it is not the one that stands there."""
    asked = getattr(config, "dtype", None)
    stated = raw.get("dtype", raw.get("torch_dtype"))
    same = asked is None or str(asked).removeprefix("torch.") == str(stated).removeprefix("torch.")
    return None if same else asked


def config_content(cls: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype) -> dict:
    """What config.json says of a model of this class with weights of this dtype."""
    # Without the settings of text generation that transformers gives to every config.
    common = PretrainedConfig().to_dict()
    own = {key: value for key, value in config.to_dict().items() if key not in common or value != common[key]}
    kept = {"model_type": config.model_type, "transformers_version": transformers.__version__}
    return {**own, **kept, "architectures": [cls.__name__], "dtype": str(dtype).removeprefix("torch.")}


def _as_dtype(dtype: torch.dtype | str | None, files: WeightFiles) -> torch.dtype:
    if dtype is None:
        return torch.get_default_dtype()
    if dtype == "auto":
        return next(t.dtype for t in (files[key] for key in files.shapes()) if t.is_floating_point())
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point torch dtype, its name, 'auto' or None, got {dtype!r}")
    return dtype
