"""Small packages with the layouts and signatures of LLaVA's forks: where each has what, what it is called and takes.

A language model of transformers with a tower and a projector in front of it is all that is in them; how a fork reads
lists of images, and what it makes of them, is written here in the shortest form that behaves alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from string import Template

ARCH = """
import torch
from torch import nn
from .multimodal_encoder.builder import $builders
from .multimodal_projector.builder import $projector
from $package.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX


class ${prefix}MetaModel:
    def __init__(self, config):
        super().__init__(config)
        if hasattr(config, "mm_$tower"):
            self.$tower = build_$tower(config, delay_load=$delay)
            self.mm_projector = $projector(config)

    def get_$tower(self):
        return getattr(self, "$tower", None)

    def initialize_vision_modules(self, model_args, fsdp=None):
        self.config.mm_$tower = model_args.$tower
        if self.get_$tower() is None:
            self.$tower = build_$tower(model_args)
        else:
            self.$tower.load_model()
        self.config.mm_hidden_size = self.$tower.hidden_size
        self.config.mm_vision_select_layer = model_args.mm_vision_select_layer
        self.config.mm_vision_select_feature = model_args.mm_vision_select_feature
        if getattr(self, "mm_projector", None) is None:
            self.mm_projector = $projector(self.config)


class ${prefix}MetaForCausalLM:
    def get_$tower(self):
        return self.get_model().get_$tower()

    def encode_images(self, images$encode_takes):
        features = self.get_model().get_$tower()(images$encode_gives)
        return self.get_model().mm_projector$forward(features)

    def prepare_inputs_labels_for_multimodal(self, $takes):
        tower = self.get_$tower()
        if tower is None or images is None or input_ids.shape[1] == 1:
            return $untouched
        $features
        width, rows, targets, number = self.config.hidden_size, [], [], 0
        given = labels if labels is not None else torch.full_like(input_ids, IGNORE_INDEX)
        there = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        for ids, wanted, mask in zip(input_ids, given, there.bool()):
            ids, wanted = ids[mask], wanted[mask]
            places = (ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()
            parts, said = [], []
            for start, end in zip([0, *[p + 1 for p in places]], [*places, len(ids)]):
                parts.append(self.get_model().embed_tokens(ids[start:end]))
                said.append(wanted[start:end])
                if end < len(ids):
                    parts.append(image_features[number])
                    said.append(torch.full((len(image_features[number]),), IGNORE_INDEX))
                    number += 1
            if not places:
                parts.append(image_features[number][:0])
                number += 1
            rows.append(torch.cat(parts))
            targets.append(torch.cat(said))
        longest = max(map(len, rows))
        embeds = torch.stack([nn.functional.pad(row, (0, 0, 0, longest - len(row))) for row in rows])
        new = torch.stack([nn.functional.pad(t, (0, longest - len(t)), value=IGNORE_INDEX) for t in targets])
        seen = torch.stack([torch.arange(longest) < len(row) for row in rows])
        attention_mask = None if attention_mask is None else seen.to(attention_mask.dtype)
        labels = None if labels is None else new
        return $returned
"""
BATCH_OR_LIST = """
        if type(images) is list or images.ndim == 5:
            pixels = torch.cat([image if image.ndim == 4 else image[None] for image in images])
            counts = [len(image) if image.ndim == 4 else 1 for image in images]
            image_features = [f.flatten(0, 1) for f in self.encode_images(pixels$passed).split(counts)]
        else:
            image_features = self.encode_images(images)$to_device
"""
SORTED = """
        single = [i for i, image in enumerate(images) if image.ndim == 3]
        stacked = torch.stack([images[i] for i in single])
        found = self.encode_images(stacked)
        image_features = [None] * len(images)
        for i, place in enumerate(single):
            image_features[place] = found[i].to(self.device)
"""
BUILDER = """
class CLIPVisionTower:
    def __init__(self, name, args, **kwargs):
        self.name = name

def build_$tower(${tower}_cfg, **kwargs):
    name = getattr(${tower}_cfg, "mm_$tower", getattr(${tower}_cfg, "$tower", None))
    if "clip" in name:
        return CLIPVisionTower(name, ${tower}_cfg, **kwargs)
    raise ValueError(f"Unknown vision tower: {name}")
"""
PROJECTOR = """
from torch import nn

class Projector(nn.Sequential):
    def forward_image(self, features):
        return self(features)

def $projector(config, delay_load=False, **kwargs):
    return Projector(nn.Linear(config.mm_hidden_size, config.hidden_size))
"""
MODEL = """
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, ${decoder}Config, ${decoder}ForCausalLM, ${decoder}Model
from transformers.modeling_outputs import CausalLMOutputWithPast
from ..$arch import ${prefix}MetaForCausalLM, ${prefix}MetaModel

class ${prefix}${word}Config(${decoder}Config):
    model_type = "$model_type"

class ${prefix}${word}Model(${prefix}MetaModel, ${decoder}Model):
    config_class = ${prefix}${word}Config

class ${prefix}${word}ForCausalLM(${decoder}ForCausalLM, ${prefix}MetaForCausalLM):
    config_class = ${prefix}${word}Config

    def __init__(self, config):
        super().__init__(config)
        self.model = ${prefix}${word}Model(config)
        self.post_init()

    def get_model(self):
        return self.model

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
                inputs_embeds=None, labels=None, use_cache=None, images=None$forward_takes):
        if inputs_embeds is None:
            $returned = self.prepare_inputs_labels_for_multimodal($untaken)
        $forward

AutoConfig.register("$model_type", ${prefix}${word}Config)
AutoModelForCausalLM.register(${prefix}${word}Config, ${prefix}${word}ForCausalLM)
"""
SUPER = """
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, labels=labels, use_cache=use_cache,
        )
"""
OWN_LOSS = """
        states = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values,
            inputs_embeds=inputs_embeds, use_cache=use_cache,
        )[0]
        logits, loss = self.lm_head(states), None
        if labels is not None:
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits)
"""
LOADER = """
import torch
from transformers import AutoTokenizer
from $package.model import *

def $loader(model_path, model_base, model_name$loader_takes, load_8bit=False, load_4bit=False, device_map="auto",
            device="cuda", **kwargs):
    $check
    if "$family" not in model_name.lower():
        raise ValueError(model_name)
    kwargs = {"device_map": {"": device}, "torch_dtype": torch.float16, **kwargs}
    tokenizer = AutoTokenizer.from_pretrained(model_path, use_fast=False)
    model = ${prefix}${word}ForCausalLM.from_pretrained(model_path, low_cpu_mem_usage=True, **kwargs)
    $tower = model.get_$tower()
    if not $tower.is_loaded:
        $tower.load_model()
    $tower.to(device=device, dtype=torch.float16)
    return tokenizer, model, $tower.image_processor, 2048
"""
TRAIN = """
from dataclasses import dataclass, field
from typing import Optional
from PIL import Image
import transformers
from torch.utils.data import Dataset
from $package.constants import IMAGE_TOKEN_INDEX
from $package.model import *
from $package.train.$trainer_file import $trainer
$data_import

@dataclass
class ModelArguments:
    $tower: Optional[str] = field(default=None)

@dataclass
class TrainingArguments(transformers.TrainingArguments):
    pass

def safe_save_model_for_hf_trainer(trainer, output_dir): pass
def get_peft_state_non_lora_maybe_zero_3(named_params, require_grad_only=True): return list(named_params)
def train(): pass
$data
"""
DATA = """
@dataclass
class DataArguments:
    image_folder: Optional[str] = field(default=None)

class LazySupervisedDataset(Dataset):
    def __init__(self, data_path, tokenizer, data_args): self.list_data_dict, self.data_args = data_path, data_args
    def __getitem__(self, i): return self.list_data_dict[i]

def make_supervised_data_module(tokenizer, data_args$data_takes): return {"data_collator": None}
"""


MM_UTILS = "def get_model_name_from_path(p): return p.rstrip('/').split('/')[-1]\n"
VISUAL = ("images", "image_sizes", "modalities", "grid_thw", "patch_positions")
INSTEAD = {"input_ids": "None", "position_ids": "None", "inputs_embeds": "embeds"}


@dataclass(frozen=True)
class Layout:
    """What one fork has, and where: in the words of the fork itself."""

    package: str
    prefix: str = "Llava"
    arch: str = "llava_arch"
    tower: str = "vision_tower"
    takes: str = "input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes=None"
    encode_takes: str = ""
    encode_gives: str = ""
    passed: str = ""
    features: str = BATCH_OR_LIST
    to_device: str = ""
    forward: str = SUPER
    forward_takes: str = ", image_sizes=None"
    projector: str = "build_vision_projector"
    projector_call: str = ""
    projector_file: str = PROJECTOR
    decoder: str = "Llama"
    word: str = "Llama"
    model_file: str = "llava_llama"
    model_type: str = ""
    loader: str = "load_pretrained_model"
    loader_takes: str = ""
    check: str = "pass"
    delay: str = "True"
    mm_utils: str = "mm_utils"
    trainer: str = "LLaVATrainer"
    trainer_file: str = "llava_trainer"
    data_file: str | None = None
    data_takes: str = ""
    inits: tuple[str, ...] = ("", "model")
    files: dict[str, str] = field(default_factory=dict)
    """Further files, by their paths below the package."""
    has_training: bool = True


def write(layout: Layout, clone: Path) -> Path:
    """Write the package of a layout into the folder of a clone; returns the package's folder."""
    root = clone.joinpath(*layout.package.split("."))
    names = [name.strip().split("=")[0] for name in layout.takes.split(",")]
    back = [
        name for name in names if name not in ("images", "image_sizes", "modalities", "grid_thw", "patch_positions")
    ]
    after = back.index("past_key_values") + 1
    returned = [*back[:after], "inputs_embeds", *back[after:]]
    words = {
        **vars(layout),
        "builders": f"build_{layout.tower}",
        "family": layout.prefix.lower(),
        "model_type": layout.model_type or f"{layout.package.split('.')[-1]}_test_{layout.word.lower()}",
        "untouched": ", ".join(["None" if name == "inputs_embeds" else name for name in returned]),
        "returned": ", ".join(
            {"input_ids": "None", "position_ids": "None", "inputs_embeds": "embeds"}.get(name, name)
            for name in returned
        ),
        "untaken": ", ".join(names[:5] + [f"{name}={name}" for name in names[5:]]),
    }
    words["features"] = Template(layout.features).substitute(words).strip()
    words["encode"] = ""
    arch = Template(ARCH).substitute({**words, "forward": layout.projector_call})
    words["forward"] = layout.forward.strip()
    words["returned"] = ", ".join(returned)
    trained = Template(DATA).substitute(words)
    header = "\n".join(Template(TRAIN).template.strip().split("\n")[:7])
    data_import = "" if layout.data_file is None else f"from {layout.package}.{layout.data_file} import *"
    words["data"], words["data_import"] = ("" if layout.data_file else trained), data_import
    files = {
        "constants.py": "IGNORE_INDEX = -100\nIMAGE_TOKEN_INDEX = -200\nDEFAULT_IMAGE_TOKEN = '<image>'\n",
        f"{layout.mm_utils.replace('.', '/')}.py": MM_UTILS,
        f"model/{layout.arch}.py": arch,
        "model/multimodal_encoder/builder.py": Template(BUILDER).substitute(words),
        "model/multimodal_projector/builder.py": Template(layout.projector_file).substitute(words),
        f"model/language_model/{layout.model_file}.py": Template(MODEL).substitute(words),
        "model/builder.py": Template(LOADER).substitute(words),
    }
    if layout.has_training:
        files["train/train.py"] = Template(TRAIN).substitute(words)
        files[f"train/{layout.trainer_file}.py"] = (
            f"from transformers import Trainer\nclass {layout.trainer}(Trainer):\n    pass\n"
        )
        if layout.data_file is not None:
            top = [line for line in header.split("\n") if "$" not in line]
            place = f"{layout.data_file.replace('.', '/')}.py"
            constants = f"from {layout.package}.constants import IMAGE_TOKEN_INDEX"
            files[place] = "\n".join([*top, "from torch.utils.data import Dataset", constants, trained])
    names = f"{layout.prefix}{layout.word}ForCausalLM"
    for folder in layout.inits:
        inside = f"from .language_model.{layout.model_file} import {names}\n" if folder == "model" else ""
        files[f"{folder}/__init__.py".lstrip("/")] = inside
    for name, text in {**files, **layout.files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


ONEVISION = Layout(
    package="llava",
    takes=(
        "input_ids, position_ids, attention_mask, past_key_values, labels, images, modalities=['image'], "
        "image_sizes=None, grid_thw=None, patch_positions=None"
    ),
    encode_takes=", grid_thw=None, patch_positions=None",
    encode_gives=", grid_thw=grid_thw, patch_positions=patch_positions",
    passed=", grid_thw=grid_thw, patch_positions=patch_positions",
    forward_takes=", modalities=['image'], image_sizes=None, grid_thw=None, patch_positions=None",
    decoder="Qwen2",
    word="Qwen",
    model_file="llava_qwen",
    model_type="llava_qwen",
    delay="False",
    files={
        "model/multimodal_encoder/onevision_encoder.py": "class OneVisionEncoderTower: pass\n",
        "model/multimodal_resampler/builder.py": "",
        "mm_utils.py": """
def get_model_name_from_path(p): return p.rstrip("/").split("/")[-1]

def process_native_image(image, processor):
    image = image.resize((image.width // 14 * 14, image.height // 14 * 14))
    pixels = processor.preprocess(image, return_tensors="pt", do_resize=False, do_center_crop=False)["pixel_values"]
    return {"pixel_values": pixels, "grid_thw": [1, image.height // 14, image.width // 14]}

def process_anyres_image(image, processor, grid_pinpoints):
    width, height = grid_pinpoints[0]
    pixels = processor.preprocess(image.resize((width, height)), return_tensors="pt", do_resize=False)["pixel_values"]
    return {"pixel_values": pixels, "grid_thw": [1, height // 14, width // 14]}
""",
    },
)
PLAIN = "input_ids, position_ids, attention_mask, past_key_values, labels, images"
LAYOUTS = {
    "onevision": ONEVISION,
    "llava_v1": Layout("llava", model_type="llava_llama"),
    "llava_med": Layout(
        "llava",
        decoder="Mistral",
        word="Mistral",
        model_file="llava_mistral",
        model_type="llava_mistral",
        to_device=".to(self.device)",
        has_training=False,
    ),
    "llava_more": Layout("src.llava", model_type="llava_llama"),
    "geochat": Layout(
        "geochat",
        "GeoChat",
        "geochat_arch",
        takes="input_ids, attention_mask, past_key_values, labels, images",
        forward=OWN_LOSS,
        forward_takes="",
        model_file="geochat_llama",
        model_type="geochat",
        trainer="GeoChatTrainer",
        trainer_file="geochat_trainer",
    ),
    "bunny": Layout(
        "bunny",
        "Bunny",
        "bunny_arch",
        takes=PLAIN,
        forward_takes="",
        to_device=".to(self.device)",
        decoder="Qwen2",
        word="Qwen2",
        model_file="bunny_qwen",
        model_type="bunny-qwen2",
        loader_takes=", model_type",
        check='assert model_type == "qwen1.5-1.8b", model_type',
        mm_utils="util.mm_utils",
        trainer="BunnyTrainer",
        trainer_file="bunny_trainer",
        data_file="util.data_utils",
        inits=("model",),
    ),
    "eagle": Layout(
        "eagle",
        "Eagle",
        "eagle_arch",
        model_file="eagle_llama",
        model_type="eagle_llama",
        trainer="EagleTrainer",
        trainer_file="eagle_trainer",
        has_training=False,
    ),
    "videollava": Layout(
        "videollava",
        tower="image_tower",
        takes=PLAIN,
        features=SORTED,
        forward_takes="",
        model_type="llava",
    ),
    "moellava": Layout(
        "moellava",
        tower="image_tower",
        takes=PLAIN,
        features=SORTED,
        forward_takes="",
        decoder="Qwen2",
        word="Qwen1_5",
        model_file="llava_qwen1_5",
        model_type="llava_qwen1_5",
        projector="build_projector",
        projector_call=".forward_image",
        projector_file="""
from torch import nn

def build_image_projector(config, delay_load=False, **kwargs):
    return nn.Linear(config.mm_hidden_size, config.hidden_size)

class build_projector(nn.Module):
    def __init__(self, config):
        super(build_projector, self).__init__()
        self.image_spatial_proj = build_image_projector(config)

    def forward_image(self, image_feature):
        return self.image_spatial_proj(image_feature)
""",
        check='assert "qwen1.5" in model_name, model_name',
    ),
}
VILA = {
    "llava/__init__.py": "from .entry import *\nfrom .media import *\n",
    "llava/entry.py": "",
    "llava/media.py": "",
    "llava/model/__init__.py": "",
    "llava/model/llava_arch.py": """
from .multimodal_encoder.builder import build_vision_tower

class LlavaMetaModel:
    def init_vlm(self, config, *args, **kwargs):
        self.vision_tower = build_vision_tower(config.vision_tower_cfg, config)
    def encode_images(self, images, block_sizes=None): return self.vision_tower(images)

class LlavaMetaForCausalLM:
    pass
""",
    "llava/model/multimodal_encoder/builder.py": """
class SiglipVisionTower:
    def __init__(self, name, config): self.name = name

def build_vision_tower(model_name_or_path: str, config):
    if model_name_or_path is None:
        return None
    if "siglip" in model_name_or_path:
        return SiglipVisionTower(model_name_or_path, config)
    raise ValueError(f"Unknown vision tower: {model_name_or_path}")
""",
    "llava/model/builder.py": "def load_pretrained_model(model_path, model_name, model_base=None): pass\n",
    "llava/train/train.py": "def train(): pass\n",
}
"""Its builder takes a name and a config, and its classes have other methods: nothing of it is known here."""

TINYLLAVA = {
    "tinyllava/__init__.py": "",
    "tinyllava/model/__init__.py": "from .modeling_tinyllava import TinyLlavaForConditionalGeneration\n",
    "tinyllava/model/modeling_tinyllava.py": """
from torch import nn
from .vision_tower import VisionTowerFactory

class TinyLlavaForConditionalGeneration(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.vision_tower = VisionTowerFactory(config.vision_model_name_or_path)(config.vision_config)
""",
    "tinyllava/model/vision_tower/__init__.py": """
VISION_TOWER_FACTORY = {}

def VisionTowerFactory(vision_tower_name):
    name = vision_tower_name.split(":")[0]
    found = [cls for key, cls in VISION_TOWER_FACTORY.items() if key in name]
    assert found, f"{name} is not registered"
    return found[-1]

def register_vision_tower(name):
    return lambda cls: VISION_TOWER_FACTORY.setdefault(name, cls)

from . import clip
""",
    "tinyllava/model/vision_tower/clip.py": """
from . import register_vision_tower

@register_vision_tower("clip")
class CLIPVisionTower:
    def __init__(self, config): self.config = config
""",
}
"""Its towers come from a registry, its model has no mixin: no host can describe it."""


def write_files(files: dict[str, str], clone: Path) -> None:
    for name, text in files.items():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text(text)
