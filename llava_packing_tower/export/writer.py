"""`llava-packing export`: a LLaVA checkpoint to a Hugging Face folder, complete or absent."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.weights import WeightFiles, check_finite, is_weight_file
from ..hf import INFO, ORIGIN
from ..hf.visual_settings import VisualSettings
from ..integrations.llava import install
from ..integrations.llava.batched_inference import conversation_name
from ..integrations.llava.checkpoint_files import ADAPTER, LORA_EXTRAS, PROJECTOR, has_weights
from ..integrations.llava.inference import Checkpoint, host_module, load_checkpoint
from ..towers.names import NAME_PREFIX, strip_prefix
from ..utils.files import CONFIG_NAME, atomic_folder, check_free, write_json
from ..utils.progress import Bar, counted, growing, silent
from . import content
from .chat_template import Marks, Turns, check_chat_template, make_chat_template, probes
from .model_card import model_card
from .names import HEAD, exported_name
from .plan import Source, read_source
from .tokenizer import MadeTokenizer, check_tokenizer, make_tokenizer, write_tokenizer

logger = logging.getLogger(__name__)

EMBEDDINGS = "model.embed_tokens.weight"
DTYPES = ("float32", "bfloat16", "float16")
NOT_COPIED = (ADAPTER, LORA_EXTRAS, PROJECTOR, "adapter_model", "training_args", "packing_")
COPIED = (".json", ".model", ".txt", ".jinja")


@dataclass(frozen=True)
class Exported:
    """What was written: its folder, number of parameters, dtype and conversation template."""

    folder: Path
    parameters: int
    dtype: str
    conversation: str


@dataclass(frozen=True)
class Options:
    """How a checkpoint is exported.

    dtype: of the weights; None is the checkpoint's own. base: what a LoRA or a projector was trained on. conversation:
    LLaVA's template; None is the one of the training. with_code: add the code of the model, for those who have not
    installed this package. max_shard_size: of a weight file. bar: shows how far it is.

    Raises ``ValueError`` for an unknown dtype.
    """

    dtype: str | None = None
    base: Path | None = None
    conversation: str | None = None
    with_code: bool = False
    max_shard_size: str = "5GB"
    bar: Bar = silent

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r}; it is one of {', '.join(DTYPES)}")


def export(checkpoint: Path, output: Path, **options: Any) -> Exported:
    """Write the export of a checkpoint.

    options: the fields of :class:`Options`.
    Raises ``ValueError`` for one that cannot be exported, or an output folder that has files; nothing is written.
    """
    check_free(output)
    chosen = Options(**options)
    with atomic_folder(output, is_new=True) as folder:
        return replace(_export_into(folder, checkpoint, chosen), folder=output)


def _export_into(folder: Path, checkpoint: Path, options: Options) -> Exported:
    install.apply()
    source = read_source(checkpoint, options.base)
    try:
        loaded = load_checkpoint(source.folder, "cpu", source.base)
    except (OSError, RuntimeError, TypeError, ArithmeticError, LookupError, AttributeError, ValueError) as error:
        reason = str(error) if isinstance(error, OSError | RuntimeError | ValueError) else repr(error)
        raise ValueError(f"LLaVA cannot load {source.folder}: {reason}") from error
    parts = Parts.of(source, loaded, options.conversation)
    target = parts.dtype if options.dtype is None else getattr(torch, options.dtype)
    tensors = parts.tensors()
    with options.bar("checking the weights") as moved:
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        check_finite(counted(tensors.items(), moved, nbytes), source.folder)
    tensors = {name: tensor.to(target) for name, tensor in tensors.items()}
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{source.folder}: {key} has values too large for {target}")
    name = str(target).removeprefix("torch.")
    from huggingface_hub import save_torch_state_dict

    parts.write(folder, name, options.with_code, {key: list(tensor.shape) for key, tensor in tensors.items()})
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    with options.bar("writing the weights") as moved, growing(folder, moved, nbytes):
        save_torch_state_dict(tensors, folder, max_shard_size=options.max_shard_size, metadata={"format": "pt"})
    return Exported(folder, sum(tensor.numel() for tensor in tensors.values()), name, parts.conversation)


@dataclass(frozen=True)
class Parts:
    """A loaded checkpoint, and all that was found out and proved about it; nothing of it is on disk yet."""

    source: Source
    loaded: Checkpoint
    conversation: str
    template: str
    tokenizer: MadeTokenizer

    @classmethod
    def of(cls, source: Source, loaded: Checkpoint, asked: str | None) -> Parts:
        """Raises ``ValueError`` where tokens, prompts or tiles would differ from LLaVA's."""
        config = loaded.model.config
        name = conversation_name(config, asked)
        check_tiles(config, loaded.model.get_vision_tower(), source)
        made = make_tokenizer(loaded.tokenizer, embedding_rows(source, loaded.model))
        try:
            marks = proved_marks(made, loaded, name)
            template = proved_template(name, first_token(loaded.tokenizer), marks)
        except ValueError as error:
            raise ValueError(f"{source.folder} cannot be exported: the conversation {name}: {error}") from error
        return cls(source, loaded, name, template, made)

    @property
    def dtype(self) -> torch.dtype:
        return self.loaded.model.dtype

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the export by name, on the CPU."""
        state = self.loaded.model.state_dict()
        if state[HEAD].data_ptr() == state[EMBEDDINGS].data_ptr():
            del state[HEAD]  # tied
        state = {name: tensor for name, tensor in state.items() if not name.endswith("rotary_emb.inv_freq")}
        state.update(uncut(self.source, state))
        return {exported_name(name): tensor.detach().cpu().contiguous() for name, tensor in state.items()}

    def write(self, folder: Path, dtype: str, with_code: bool, shapes: Mapping[str, list[int]]) -> None:
        """Everything but the weights, whose ``shapes`` are noted for an import."""
        model = self.loaded.model
        backend, tokenizer_config, ids = self.tokenizer
        rows = embedding_rows(self.source, model)
        text = content.text_config(model.config, self.source.decoder, rows)
        pad = backend.token_to_id(str(tokenizer_config["pad_token"]))
        files: dict[str, dict[str, Any]] = {
            CONFIG_NAME: content.model_config(model, text, ids, dtype),
            "preprocessor_config.json": content.processor_content(model),
            "processor_config.json": {"processor_class": "LlavaPackingProcessor"},
            "generation_config.json": content.generation_content(model, pad),
        }
        if with_code:
            from .code_bundle import PREFIX, write_code

            write_code(folder, type(model.get_vision_tower().vision_tower))
            for name in (CONFIG_NAME, "preprocessor_config.json", "processor_config.json"):
                files[name]["auto_map"] = content.auto_map(PREFIX)
        for name, values in files.items():
            write_json(values, folder / name)
        write_tokenizer(folder, backend, {**tokenizer_config, "processor_class": "LlavaPackingProcessor"})
        (folder / "chat_template.jinja").write_text(self.template, encoding="utf-8")
        card = model_card(self.source, files[CONFIG_NAME], self.conversation, dtype, with_code)
        (folder / "README.md").write_text(card, encoding="utf-8")
        self._write_origin(folder / ORIGIN, dtype, shapes)

    def _write_origin(self, folder: Path, dtype: str, shapes: Mapping[str, list[int]]) -> None:
        """What `llava-packing import` needs: the config, the tokenizer and the like, without paths of this machine."""
        folder.mkdir()
        for file in self.source.folder.iterdir():
            copied = file.suffix in COPIED and not file.name.startswith(NOT_COPIED) and not is_weight_file(file.name)
            if file.is_file() and copied and file.name != CONFIG_NAME:
                shutil.copyfile(file, folder / file.name)
        if self.source.base is not None:
            self.loaded.tokenizer.save_pretrained(folder)
        write_json(origin_config(self.source, self.loaded.model), folder / CONFIG_NAME)
        merged = (self.source.folder / ADAPTER).is_file()
        info = {"host": self.source.host.name, "merged": merged, "source_dtype": str(self.dtype).removeprefix("torch.")}
        info |= {"dtype": dtype, "conversation": self.conversation, "tensors": shapes}
        write_json(info, folder / INFO)


def uncut(source: Source, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Embeddings as they are in the files: LLaVA cuts off the rows beyond its tokenizer when it loads them."""
    if source.base is not None or not has_weights(source.folder):
        return {}
    files = WeightFiles(source.folder)
    names = files.shapes().keys() & {EMBEDDINGS, HEAD} & state.keys()
    return {name: files[name].to(state[name].dtype) for name in names}


def embedding_rows(source: Source, model: torch.nn.Module) -> int:
    """The size of the decoder's vocabulary."""
    state = model.state_dict()
    return {**state, **uncut(source, state)}[EMBEDDINGS].shape[0]


def origin_config(source: Source, model: torch.nn.Module) -> dict[str, Any]:
    """config.json of the LLaVA checkpoint that an import writes: its own, but that its files hold the tower's weights.

    Local paths are left out: a folder that is published should not tell of the machine it was made on.
    """
    own = dict(source.config)
    tower = model.get_vision_tower()
    typed = strip_prefix(str(own["mm_vision_tower"]))
    own["mm_vision_tower"] = NAME_PREFIX + (Path(typed).name if Path(typed).is_absolute() else typed)
    own["mm_packing_config"] = tower.packing_config("checkpoint")
    # LLaVA 1.x then leaves the tower to the checkpoint's files.
    own["unfreeze_mm_vision_tower"] = True
    own["architectures"] = [source.class_name]
    if model.config.model_type.startswith("llava"):
        own["model_type"] = model.config.model_type
    own.pop("_name_or_path", None)
    return own


def check_tiles(config: object, tower: torch.nn.Module, source: Source) -> None:
    """Raises ``ValueError`` where the tiles of ``anyres`` are not the tower's nominal images."""
    settings = VisualSettings.read(config, tower.config.patch_size, tower.config.image_size)
    if not settings.is_anyres:
        return
    processor = tower.image_processor
    sides = {processor.crop_size["height"], processor.size["shortest_edge"], settings.image_size}
    if len(sides) > 1:
        raise ValueError(
            f"{source.folder} cannot be exported: with anyres the image processor's size and crop_size and the tower's "
            f"image_size must be one number, got {sorted(sides)}"
        )
    if settings.mm_patch_merge_type != "flat" and settings.image_size // settings.patch_size % settings.merge[0]:
        raise ValueError(
            f"{source.folder} cannot be exported: tiles of {settings.image_size // settings.patch_size} patches a side "
            f"do not divide by the projector's {settings.merge[0]}, and LLaVA cannot put them together"
        )


# ---------------------------------------------------------------- proofs


def proved_marks(made: MadeTokenizer, loaded: Checkpoint, name: str) -> Marks:
    """What stands for an image, so that prompts have LLaVA's ids. Raises ``ValueError`` where nothing gives these."""
    marks = Marks()
    if getattr(loaded.model.config, "mm_use_im_start_end", False):
        constants = host_module("constants", loaded.model)
        marks = Marks(constants.DEFAULT_IM_START_TOKEN, constants.DEFAULT_IM_END_TOKEN)
    try:
        prove_tokenizer(made, loaded, name, marks)
        return marks
    except ValueError as error:
        spaced = replace(marks, gap=" ")
        try:
            prove_tokenizer(made, loaded, name, spaced)
            return spaced
        except ValueError:
            raise error from None


def prompts_of(name: str) -> tuple[Callable[[Turns], str], str]:
    """Turns to LLaVA's prompt in a conversation template, and the name of the template's style."""
    conversation = host_module("conversation").conv_templates[name]

    def prompt_of(turns: Turns) -> str:
        made = conversation.copy()
        for question, answer in turns:
            made.append_message(made.roles[0], question)
            made.append_message(made.roles[1], answer)
        return made.get_prompt()

    return prompt_of, conversation.sep_style.name


def first_token(tokenizer: object) -> str:
    """The token with which a tokenizer begins every text; nothing where it has none."""
    return tokenizer.bos_token if tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] else ""


def proved_template(name: str, bos: str, marks: Marks) -> str:
    """The chat template of a conversation. Raises ``ValueError`` where it would differ from LLaVA's own prompts."""
    template = make_chat_template(host_module("conversation").conv_templates[name], bool(bos), marks)
    prompt_of, style = prompts_of(name)
    check_chat_template(template, prompt_of, bos, marks, style)
    return template


def prove_tokenizer(made: MadeTokenizer, loaded: Checkpoint, name: str, marks: Marks) -> None:
    """Raises ``ValueError`` where prompts of the conversation have other ids than in LLaVA."""
    utilities, constants = host_module("mm_utils", loaded.model), host_module("constants", loaded.model)
    prompt_of, style = prompts_of(name)
    bos = first_token(loaded.tokenizer)
    check_tokenizer(
        made[0],
        made[2],
        lambda prompt: utilities.tokenizer_image_token(prompt, loaded.tokenizer, constants.IMAGE_TOKEN_INDEX),
        [prompt_of(turns) for turns, _ in probes(style)],
        marks,
        bos + marks.lead(style) if bos else "",
        constants.IMAGE_TOKEN_INDEX,
    )
