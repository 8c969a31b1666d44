"""Loading and saving that all models of this package share: every tensor fits, or nothing is loaded."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from .config_check import check_config
from .loading import (
    CONFIG_NAME,
    Recipe,
    WeightFiles,
    WeightPlan,
    atomic_folder,
    construction,
    load_weights,
    read_json,
    resolve_folder,
    write_json,
)

logger = logging.getLogger(__name__)

HUB_OPTIONS = {"revision", "token", "cache_dir", "local_files_only", "force_download"}
AUTO_OPTIONS = {
    "adapter_kwargs",
    "trust_remote_code",
    "low_cpu_mem_usage",
    "use_safetensors",
    "_from_auto",
    "_commit_hash",
}


class StrictPreTrainedModel(PreTrainedModel):
    """A ``PreTrainedModel`` that also loads foreign checkpoints, by a plan, and never leaves a weight random."""

    config_class: type[PretrainedConfig]
    source_model_types: tuple[str, ...] = ()
    """``model_type`` of foreign checkpoints that :meth:`from_pretrained` converts while loading."""

    @classmethod
    def config_from_source(cls, source: dict, shapes: Mapping[str, tuple[int, ...]] | None = None) -> PretrainedConfig:
        """This model's config from the config.json of a foreign checkpoint (a ``source_model_types`` one).

        shapes: name and shape of its tensors, where they are known, for what a config may leave unsaid.
        """
        raise NotImplementedError

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
        """Compile the blocks: True, False, or None for the default. Models that compile nothing ignore it."""

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
        own_type, found = cls.config_class.model_type, source.get("model_type")
        if found != own_type and found not in cls.source_model_types:
            known = ", ".join((own_type, *cls.source_model_types))
            raise ValueError(f"{where}: model_type {found!r} is not one that {cls.__name__} loads ({known})")
        own = found == own_type
        try:
            config = config or (cls.config_class.from_dict(source) if own else cls.config_from_source(source, shapes))
        except (TypeError, ArithmeticError, LookupError, AttributeError) as error:
            raise ValueError(f"{where}: its config cannot be used: {error}") from error
        check_config(config, where)
        plan = (
            WeightPlan({key: Recipe((key,)) for key in shapes}) if own else cls.plan_from_source(source, config, shapes)
        )
        layers = getattr(config, "num_hidden_layers", 0)
        if layers > len(shapes):  # before a model of that many layers is built
            raise ValueError(f"{where}: the config claims {layers} layers, the weights have {len(shapes)} tensors")
        return config, plan

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
        with construction(dtype):
            model = cls(config)
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
        device: torch.device | str = "cpu",
        attn_implementation: str = "auto",
        **options: object,
    ) -> StrictPreTrainedModel:
        """Load a checkpoint, or convert a known foreign one in memory. Strict: all tensors fit, or an error.

        Args:
            pretrained_model_name_or_path: local folder or hub id.
            config: use this config in place of the one in the folder.
            dtype (or torch_dtype): of the weights; None is torch's default dtype, "auto" that of the file.
            device: where the weights go.
            attn_implementation: attention backend, see :meth:`set_attention_backend`.
            options: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` go to huggingface_hub; what
                transformers' Auto classes add is accepted and has no effect; anything else is a ``TypeError``.

        Returns:
            The model in evaluation mode.

        Raises:
            ValueError: no config, another model_type, or missing, unexpected, mis-shaped or non-float tensors.
        """
        if strange := set(options) - HUB_OPTIONS - AUTO_OPTIONS:
            raise TypeError(f"{cls.__name__}.from_pretrained() got unexpected arguments {', '.join(sorted(strange))}")
        hub = {key: value for key, value in options.items() if key in HUB_OPTIONS and value is not None}
        folder = resolve_folder(pretrained_model_name_or_path, **hub)
        raw = read_json(folder / CONFIG_NAME)
        files = WeightFiles(folder)
        config, plan = cls.plan(raw, files.shapes(), config, folder)
        if (found := raw.get("model_type")) != cls.config_class.model_type:
            logger.warning("%s: a %s checkpoint, converted to %s in memory", folder, found, config.model_type)
        model = cls.from_weights(
            config, plan, files, _as_dtype(dtype if dtype is not None else torch_dtype, files), device
        )
        model.set_attention_backend(attn_implementation)
        return model

    def save_pretrained(self, save_directory: str | os.PathLike, *, max_shard_size: str = "5GB", **_: object) -> None:
        """Write config.json and safetensors; the files appear whole, by rename. Other keyword arguments of
        transformers' method (``safe_serialization`` ...) are accepted and have no effect."""
        from huggingface_hub import save_torch_state_dict

        with atomic_folder(save_directory) as folder:
            write_json(config_content(type(self), self.config, self.dtype), folder / CONFIG_NAME)
            save_torch_state_dict(self.state_dict(), folder, max_shard_size=max_shard_size, metadata={"format": "pt"})


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
