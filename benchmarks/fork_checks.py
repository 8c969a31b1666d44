"""What attaches to one LLaVA, in a process of its own: `python benchmarks/fork_checks.py FOLDER CLONE`.

Its last line is a JSON object. Every part of the hook is tried with a tiny model of the fork's own class:
  - builder: the fork's own `initialize_vision_modules` builds a packing tower,
  - native resolution: a ragged batch, in which each image has the tokens that it has alone,
  - text-only batches: a batch of text gives the tower gradients,
  - packed decoder: what its training step is, or why it stays the fork's own; the loss is that of the padded batch,
  - training step: a ragged batch forward and backward; gradients reach the tower, and a step of an optimizer helps,
  - reload: saved by `save_pretrained`, loaded by the fork's own loader, without the tower's folder, bit for bit,
  - training: its train.py is imported, and what is added to its dataset, trainer and saving; its trainer makes a step.
A LLaVA with signatures that are not known is left as it is: its own builder is called, and builds its own towers.
Packages that the fork imports and that are not installed here are replaced by empty ones, and named.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import FunctionType, SimpleNamespace

import torch
from fork_stubs import Stubs

from llava_packing_tower.data.native_config import asks_for_native
from llava_packing_tower.integrations.llava import find_host, install
from llava_packing_tower.integrations.llava.host import Host
from llava_packing_tower.integrations.llava.methods import STEPS
from llava_packing_tower.tools.demo.tiny_models import DECODER, make_tokenizer, make_tower
from llava_packing_tower.towers.packing_tower import HEVCViTPackingVisionTower

PROMPT = "A chat between a curious user and an artificial intelligence assistant. USER: What is it? ASSISTANT:"
IMAGE = -200
SIZES = ((42, 70), (84, 28), (56, 56))
OWN_BUILDERS: tuple[tuple[str, str, Callable], ...] = (
    ("llava", "model.multimodal_encoder.builder", lambda module, name, config: module.build_vision_tower(name, config)),
    ("tinyllava", "model.vision_tower", lambda module, name, config: module.VisionTowerFactory("clip")(config)),
)
"""Of LLaVAs that are left alone: the package, the module that builds towers, and how."""
# The decoders that are tried, in this order: the first one that the fork has.
CLASSES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "QwenForCausalLM", "Qwen1_5ForCausalLM", "MistralForCausalLM")


def attached(owner: object) -> dict[str, list[str]]:
    """The steps of each method or function that a class or module has."""
    found = {}
    for name, value in list(vars(owner).items()):
        if isinstance(value, FunctionType) and "_llava_packing_steps" in vars(value):
            found[name] = sorted(value._llava_packing_steps)
        elif isinstance(value, FunctionType) and "_llava_packing_original" in vars(value):
            found[name] = ["wrapped"]
    return found


def attempt(report: dict, name: str, check: Callable[[], object]) -> object:
    try:
        result = check()
        report[name] = "yes" if result is None or isinstance(result, torch.nn.Module) else result
        return result
    except Exception as error:
        report[name] = f"{type(error).__name__}: {error}"[:400]
        traceback.print_exc()
        return None


def make_model(host: Host, tower: Path, vocabulary: int, native: bool = True) -> torch.nn.Module:
    """The fork's own class with a tiny decoder, its tower and projector made as its train.py makes them."""
    models = import_module(host.module(host.models))
    names = [f"{host.class_prefix}{word}" for word in CLASSES]
    cls = next(getattr(models, name) for name in names if hasattr(models, name))
    torch.manual_seed(0)
    config = cls.config_class(vocab_size=vocabulary, bos_token_id=1, eos_token_id=2, **DECODER)
    config.num_key_value_heads = 2
    config._attn_implementation = "sdpa"
    model = cls(config)
    in_arguments = host.tower_settings[1]
    arguments = SimpleNamespace(
        **{
            "image_tower": None,
            "video_tower": None,
            in_arguments: str(tower),
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "pretrain_mm_mlp_adapter": None,
            "mm_projector_type": "mlp2x_gelu",
            "image_projector_type": "mlp2x_gelu",
            "video_projector_type": None,
            "video_global_proj": False,
            "video_temproal_proj": False,
            "video_spatial_proj": False,
            "mm_patch_merge_type": "flat",
            "mm_resampler_type": None,
            "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
            "add_faster_video": False,
            "siglip": False,
            "s2": False,
            "feature_outs": None,
            "img_size": None,
            "vision_backbone": None,
            "segtok_posembed": None,
            "image_aspect_ratio": "native" if native else "pad",
            "mm_packing_min_patches": 4,
            "mm_packing_max_patches": 64,
            "mm_packing_video": "frames",
        }
    )
    model.get_model().initialize_vision_modules(arguments)
    config.image_aspect_ratio = arguments.image_aspect_ratio
    config.mm_use_im_start_end = config.mm_use_im_patch_token = False
    config.tokenizer_padding_side = "right"
    config.tokenizer_model_max_length = 512
    return model.float().requires_grad_(True)


def ragged() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(3, *size, generator=generator) for size in SIZES]


def prompts() -> torch.Tensor:
    return torch.tensor([[1, IMAGE, 7, 8, 9, 11], [1, 5, 6, IMAGE, 7, 2], [1, 9, IMAGE, 5, 3, 2]])


def check_builder(model: torch.nn.Module) -> None:
    tower = model.get_vision_tower()
    assert type(tower) is HEVCViTPackingVisionTower and tower.is_loaded, type(tower)
    assert model.config.mm_packing_config["weights"] == "checkpoint"


def check_native(model: torch.nn.Module) -> None:
    """In a batch with a mask, labels and other images, each sample gives what it gives alone."""
    assert asks_for_native(model.config)
    model.eval()
    ids, images = prompts(), ragged()
    labels = ids.where(ids != IMAGE, -100)
    given = {"attention_mask": torch.ones_like(ids), "labels": labels, "images": images}
    with torch.no_grad():
        together = model(input_ids=ids.clone(), **given)  # Bunny writes into its ids
        for index, (height, width) in enumerate(SIZES):
            one = {name: value[index : index + 1] for name, value in given.items()}
            alone = model(input_ids=ids[index : index + 1].clone(), **one).logits
            patches = height * width // 14**2
            assert alone.shape[1] == ids.shape[1] - 1 + patches, (alone.shape, patches)
            here = together.logits[index, : alone.shape[1]]
            assert torch.allclose(here, alone[0], atol=2e-5), (here - alone[0]).abs().max()
            blank = {**one, "images": [torch.zeros_like(images[index])]}
            seen = model(input_ids=ids[index : index + 1].clone(), **blank).logits
            assert (seen[0, -1] - alone[0, -1]).abs().max() > 1e-4, "the image does not reach the answer"


def check_text_only(model: torch.nn.Module) -> None:
    model.train()
    model.zero_grad()
    ids = torch.tensor([[1, 5, 6, 7], [1, 9, 8, 2]])
    model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids), images=None).loss.backward()
    tower = dict(model.get_vision_tower().named_parameters())
    used = [name for name, p in tower.items() if p.grad is not None]
    assert len(used) > 20 and all(p.grad is not None for p in model.get_model().mm_projector.parameters()), len(used)
    model.zero_grad()


def check_decoder(model: torch.nn.Module) -> str:
    """What the training step is; where it is packed, its loss and gradients are those of the padded batch."""
    from llava_packing_tower.integrations.llava.packed_step import forget_plan, make_plan, plan_of
    from llava_packing_tower.integrations.llava.patcher import Patches

    plan = make_plan(model)
    if plan.decoder_reason is not None:
        return f"no: {plan.decoder_reason}"
    ids = prompts()
    given = {"labels": ids.where(ids != IMAGE, -100), "attention_mask": torch.ones_like(ids), "images": ragged()}
    model.train()
    results = []
    for packed in (True, False):
        forget_plan(model)
        model.config.mm_packing_decoder = packed
        assert (plan_of(model, Patches()).decoder_reason is None) == packed
        model.zero_grad()
        loss = model(input_ids=ids.clone(), **given).loss
        loss.backward()
        gradient = next(p for n, p in model.named_parameters() if "q_proj" in n and "tower" not in n).grad.clone()
        results.append((loss.detach(), gradient))
    del model.config.mm_packing_decoder
    forget_plan(model)
    model.zero_grad()
    (loss, gradient), (padded, reference) = results
    assert torch.allclose(loss, padded, atol=1e-5), (loss, padded)
    assert torch.allclose(gradient, reference, atol=1e-5), (gradient - reference).abs().max()
    return "yes"


def check_step(model: torch.nn.Module) -> None:
    """Every weight of the tower below the selected layer has a gradient, and with a step along it the loss is less."""
    ids, rate = prompts(), 1e-3
    given = {"labels": ids.where(ids != IMAGE, -100), "attention_mask": torch.ones_like(ids), "images": ragged()}
    model.train()
    model.zero_grad()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    before = model(input_ids=ids.clone(), **given).loss
    before.backward()
    tower = dict(model.get_vision_tower().named_parameters())
    out = [name for name, p in tower.items() if p.grad is None or not p.grad.any()]
    above = [name for name in out if "layers.2." in name or "post" in name]  # of 3 layers, the last one is not selected
    assert len(tower) - len(out) > 20 and out == above, out
    optimizer.step()
    with torch.no_grad():
        after = model(input_ids=ids.clone(), **given).loss
    assert after < before, (before, after)
    model.zero_grad()


def check_reload(model: torch.nn.Module, folder: Path, tower: Path, tokenizer: object) -> None:
    """A tuned tower comes back from the checkpoint, though its folder is gone."""
    from llava_packing_tower.integrations.llava.inference import load_checkpoint

    with torch.no_grad():
        for p in model.get_vision_tower().parameters():
            p.add_(0.25)
    saved = folder / "run1"
    model.config.torch_dtype = torch.float32
    model.save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    shutil.rmtree(tower)
    loaded = load_checkpoint(saved, "cpu").model
    assert type(loaded) is type(model), type(loaded)
    here, there = model.state_dict(), loaded.state_dict()
    wrong = [n for n, p in here.items() if n not in there or not torch.equal(p.to(there[n].dtype), there[n][: len(p)])]
    assert not wrong and here.keys() == there.keys(), (wrong[:3], here.keys() ^ there.keys())
    assert len([n for n in here if "tower." in n]) > 20


def run_trainer(trainer: type, arguments: type, model: torch.nn.Module, folder: Path) -> str:
    """One step of the fork's own trainer with a ragged batch, which moves the tower."""
    given = arguments(
        output_dir=str(folder / "trained"),
        per_device_train_batch_size=len(SIZES),
        max_steps=1,
        learning_rate=1e-2,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
    )

    def collate(samples: list[tuple]) -> dict:
        ids = torch.stack([ids for ids, _ in samples])
        labels = ids.where(ids != IMAGE, -100)
        return {"input_ids": ids, "labels": labels, "attention_mask": ids > -300, "images": [i for _, i in samples]}

    samples = list(zip(prompts(), ragged(), strict=True))
    before = next(iter(model.get_vision_tower().parameters())).detach().clone()
    made = trainer(model=model, args=given, train_dataset=samples, data_collator=collate)
    made.train()
    moved = (next(iter(model.get_vision_tower().parameters())) - before).abs().max()
    assert made.state.global_step == 1 and moved > 1e-3, moved
    return "yes"


def check_training(host: Host, model: torch.nn.Module | None, folder: Path) -> dict:
    if not find_host().file(host.train).is_file():
        return {"none": "it has no train.py here"}
    train = import_module(host.module(host.train))
    trainer = getattr(train, host.trainer.name)
    data = import_module(host.module(host.data or host.train))
    found: dict[str, object] = {
        "train": sorted(attached(train)),
        "trainer": sorted(attached(trainer)),
        "dataset": sorted(attached(getattr(data, host.dataset))),
    }
    if model is not None:
        attempt(found, "step", lambda: run_trainer(trainer, train.TrainingArguments, model, folder))
    return found


def check_list(host: Host, tower: Path) -> None:
    """One of several towers is a packing tower; another number of tokens than it has is refused."""
    part = host.tower_builders[0]
    arch, builder = (import_module(host.module(name)) for name in (host.arch, part.module))
    build = getattr(builder, part.name)
    assert getattr(arch, part.name) is build and part.lengths is not None
    names, lengths = part.settings[0], part.lengths[0]
    config = SimpleNamespace(mm_vision_select_layer=-2, **{names: [str(tower)] * 2, lengths: [64, 64]})
    towers = build(config)
    assert [type(t) for t in towers] == [HEVCViTPackingVisionTower] * 2
    assert towers[1](torch.randn(2, 3, 112, 112)).shape == (2, 64, 128)
    setattr(config, lengths, [64, 576])
    try:
        build(config)
    except ValueError as error:
        assert "has 64 tokens, not 576" in str(error), error
    else:
        raise AssertionError("576 tokens were promised and 64 built")


def check_left_alone(clone: Path) -> dict:
    """Nothing of it is wrapped, it is named once, and its builder builds a tower of its own."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("llava_packing_tower.integrations.llava.registry").addHandler(handler)
    sys.path.insert(0, str(clone))
    install.apply()
    package, where, build = next(own for own in OWN_BUILDERS if (clone / own[0]).is_dir())
    stubs = Stubs(package)
    sys.meta_path.append(stubs)
    builder = import_module(f"{package}.{where}")
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == package:
            owners = [module, *(value for value in vars(module).values() if isinstance(value, type))]
            assert not any(attached(owner) for owner in owners), name
    folder = clone.parent / "a_clip"
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    CLIPVisionModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28).save_pretrained(folder)
    config.resume_path, config.ps3, config.mm_vision_select_layer = None, False, -2
    config.mm_vision_select_feature, config.model_dtype = "patch", "torch.float32"
    config.model_name_or_path = str(folder)
    tower = build(builder, str(folder), config)
    features = tower(torch.randn(2, 3, 28, 28))
    assert features.shape == (2, 4, 32) and len(said) == 1, (features.shape, said)
    return {"tower": type(tower).__name__, "stubs": sorted(stubs.names)}


def main() -> None:
    folder, clone = Path(sys.argv[1]), Path(sys.argv[2]).resolve()
    report: dict[str, object] = {}
    os.environ["LLAVA_DIR"] = str(clone)
    try:
        found = find_host()
    except ValueError as error:
        del os.environ["LLAVA_DIR"]
        report["reason"] = str(error).split(". Known are:")[0].split(" is left as it is: ")[-1].replace(str(clone), "")
        copy = folder / "clone"  # its own name must not select one of its towers
        copy.symlink_to(clone)
        attempt(report, "left alone", lambda: check_left_alone(copy))
        print(json.dumps(report))
        return
    install.apply()
    host = found.host
    report["host"] = host.title
    stubs = Stubs(host.package)
    sys.meta_path.append(stubs)
    tower = folder / "vit_packing"
    make_tower(tower, seed=1)
    tokenizer = make_tokenizer(folder / "words", [__doc__, PROMPT], ("cat", "moon", "cup"))
    if host.native_reason is not None:
        attempt(report, "builder", lambda: check_list(host, tower))
        report["reason"] = host.native_reason
        report["stubs"] = sorted(stubs.names)
        print(json.dumps(report))
        return
    model = attempt(report, "builder", lambda: make_model(host, tower, len(tokenizer)))
    if model is not None:
        report["class"] = type(model).__name__
        attempt(report, "builder", lambda: check_builder(model))
        attempt(report, "native resolution", lambda: check_native(model))
        attempt(report, "text-only batches", lambda: check_text_only(model))
        attempt(report, "packed decoder", lambda: check_decoder(model))
        attempt(report, "training step", lambda: check_step(model))
        attempt(report, "reload", lambda: check_reload(model, folder, tower, tokenizer))
    attempt(report, "training", lambda: check_training(host, model, folder))
    report["stubs"] = sorted(stubs.names)
    report["steps"] = len(STEPS)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
