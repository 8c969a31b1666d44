"""LLaVAction's models, which are LLaVA-NeXT's, with the packing tower: forward, backward, generate, save and reload."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from PIL import Image

from llava_packing_tower.checkpoint.hashing import tensor_digest
from llava_packing_tower.integrations.llava import install, registry
from llava_packing_tower.tools.demo.tiny_models import make_tower
from llava_packing_tower.towers.packing_tower import HEVCViTPackingVisionTower

# Found, not imported: with transformers 5 it can be imported only where the hook patches it.
pytestmark = [
    pytest.mark.newest,
    pytest.mark.skipif(importlib.util.find_spec("llavaction") is None, reason="llavaction is not installed"),
]
IMAGE = -200  # the host's IMAGE_TOKEN_INDEX


@pytest.fixture(scope="module")
def model_class():
    """The fork's own class, with the hook in place; all of it is taken back afterwards."""
    for name in [m for m in sys.modules if m.split(".")[0] == "llavaction"]:
        del sys.modules[name]
    install.undo()
    install.apply()
    yield importlib.import_module("llavaction.model").LlavaQwenForCausalLM
    install.undo()


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fork") / "vit_packing"
    make_tower(folder, seed=5)
    return folder


def make(model_class, **changes):
    torch.manual_seed(0)
    config = model_class.config_class(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        **{
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "mm_projector_type": "mlp2x_gelu",
            "mm_hidden_size": 128,
            "mm_patch_merge_type": "flat",
            "image_aspect_ratio": "pad",
            "tokenizer_model_max_length": 512,
            "attn_implementation": "eager",
            **changes,
        },
    )
    return model_class(config)


def inputs():
    ids = torch.tensor([[1, IMAGE, 5, 6, 7], [1, 9, IMAGE, 4, 3]])
    images = [torch.linspace(-1, 1, 3 * 112 * 112).view(3, 112, 112), torch.ones(3, 112, 112)]
    return {"input_ids": ids, "images": torch.stack(images), "image_sizes": [(112, 112), (60, 112)]}


def test_it_is_found():
    found = registry.find_host("llavaction")
    assert found.host.title == "LLaVAction" and found.version == "0.0.1"
    assert found.root == Path(importlib.util.find_spec("llavaction").submodule_search_locations[0])


def test_forward_backward_and_generate(model_class, tower):
    model = make(model_class, mm_vision_tower=str(tower))
    inside = model.get_vision_tower()
    assert type(inside) is HEVCViTPackingVisionTower and inside.is_loaded
    model.requires_grad_(True).train()
    batch = inputs()
    labels = batch["input_ids"].where(batch["input_ids"] != IMAGE, -100)
    loss = model(**batch, labels=labels, attention_mask=torch.ones_like(labels, dtype=torch.bool)).loss
    loss.backward()
    assert loss.isfinite() and loss > 0
    used = {n: p.grad for n, p in inside.named_parameters()}
    without = {n for n, grad in used.items() if grad is None or not grad.any()}
    # The selected layer is the one below the top: all but the top block is trained.
    assert len(used) > 20 and without and all(".layers.2." in n or "post" in n or "norm" in n for n in without), without
    assert all(p.grad.any() for p in model.get_model().mm_projector.parameters())

    model.eval()
    one = {"images": batch["images"][:1], "image_sizes": batch["image_sizes"][:1]}
    ids = batch["input_ids"][:1]
    answer = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0, **one)[0].tolist()
    words = []
    for _ in range(4):
        logits = model(
            input_ids=torch.cat([ids, torch.tensor([words], dtype=torch.long)], 1), use_cache=False, **one
        ).logits
        words.append(int(logits[0, -1].argmax()))
    assert answer[-4:] == words
    blank = model(input_ids=ids, images=torch.zeros(1, 3, 112, 112), image_sizes=[(112, 112)]).logits
    seen = model(input_ids=ids, **one).logits
    assert (blank[0, -1] - seen[0, -1]).abs().max() > 1e-4  # the image reaches the answer


def test_a_tuned_tower_survives_without_its_folder(model_class, tower, tmp_path):
    model = make(model_class, mm_vision_tower=str(tower), mm_tunable_parts="mm_vision_tower")
    inside = model.get_vision_tower()
    with torch.no_grad():
        for parameter in inside.parameters():
            parameter.add_(0.5)
    model.config.mm_packing_config = inside.packing_config("checkpoint")
    model.config.mm_vision_tower = str(tmp_path / "gone_packing")
    model.save_pretrained(tmp_path / "saved")
    again = model_class.from_pretrained(tmp_path / "saved").get_vision_tower()
    kept = {n: tensor_digest(p) for n, p in again.named_parameters()}
    assert kept == {n: tensor_digest(p) for n, p in inside.named_parameters()} and len(kept) > 20


def test_a_frozen_tower_comes_from_its_folder_though_no_file_has_it(model_class, tower, tmp_path):
    """As with a LoRA, whose base is the plain decoder: transformers would make the tower's weights anew."""
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    saved = tmp_path / "llava_qwen_frozen"
    model = make(model_class, mm_vision_tower=str(tower))
    model.config.mm_packing_config = model.get_vision_tower().packing_config("folder")
    model.config.mm_use_im_patch_token = False
    model.save_pretrained(saved)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(saved)
    tensors = load_file(saved / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "vision_tower" not in name}
    assert len(tensors) - len(kept) > 20
    save_file(kept, saved / "model.safetensors", metadata={"format": "pt"})
    load = importlib.import_module("llavaction.model.builder").load_pretrained_model
    _, loaded, _, _ = load(str(saved), None, saved.name, attn_implementation="eager")
    folder = load_file(tower / "model.safetensors")
    state = loaded.get_vision_tower().vision_tower.state_dict()
    assert state.keys() == folder.keys()
    assert [name for name in folder if not torch.equal(folder[name].to(state[name].dtype), state[name])] == []

    folder["layernorm_pre.bias"][3] += 1
    changed = tmp_path / "vit_packing"
    shutil.copytree(tower, changed)
    save_file(folder, changed / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "mm_vision_tower": str(changed)}))
    with pytest.raises(ValueError, match="has changed since"):
        load(str(saved), None, saved.name, attn_implementation="eager")


# ---------------------------------------------------------------- LLaVA's own CLIP


@pytest.mark.parametrize("pinpoints", ["(1x1),...,(2x2)", [[224, 448], [448, 224]]])
def test_anyres_with_the_processor_of_clip(model_class, pinpoints):
    """Tiles and whole image as the processor of the installed transformers makes them, whatever its size is."""
    utils = sys.modules["llavaction.mm_utils"]
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 224}, crop_size=224)
    pixels = torch.randint(0, 255, (300, 180, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    image = Image.fromarray(pixels.numpy())
    tiles = utils.process_anyres_image(image, processor, pinpoints)
    whole = image.resize((224, 224))
    best = utils.resize_and_pad_image(image, (224, 448))
    parts = [whole, best.crop((0, 0, 224, 224)), best.crop((0, 224, 224, 448))]
    expected = [processor.preprocess(part, return_tensors="pt")["pixel_values"][0] for part in parts]
    assert torch.equal(tiles, torch.stack(expected))
    config = SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=pinpoints)
    assert torch.equal(utils.process_images([image], processor, config)[0], tiles)


def test_its_own_loss_stays_its_own(model_class, tower):
    """Its forward adds losses of its own to the cross entropy: the step is not packed, and the plan says so."""
    from llava_packing_tower.integrations.llava.packed_step import make_plan

    model = make(model_class, mm_vision_tower=str(tower))
    plan = make_plan(model)
    assert plan.attention is None and plan.decoder_reason == "LlavaQwenForCausalLM computes its loss itself"
    assert plan.head_reason == plan.liger_reason == plan.decoder_reason and not plan.fused
