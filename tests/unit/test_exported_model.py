"""Exports as models of transformers: compiled, quantised, called in all the ways that users do. No LLaVA."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import export_samples as samples
import export_tiny as checks
import numpy as np
import pytest
import torch
import transformers
from families import TINY

from llava_packing_tower.export.code_bundle import PREFIX, write_code
from llava_packing_tower.export.content import auto_map
from llava_packing_tower.hf.auto import is_supported
from llava_packing_tower.utils.files import read_json, write_json

pytestmark = [
    pytest.mark.newest,
    pytest.mark.skipif(not is_supported(transformers.__version__), reason="exports need transformers 4.57"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checks.make_export(tmp_path_factory.mktemp("exported"))


@pytest.mark.long
def test_a_compiled_decoder_says_and_trains_the_same_without_a_graph_per_size(folder):
    checks.check_compiled(folder, "cpu", "aot_eager", 1e-5)


def test_torchao_quantises_all_parts_and_its_layers_are_called(folder):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    config = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    checks.check_quantised(folder, "cpu", config, checks.of_torchao, 1e-4)


@pytest.mark.parametrize(("bits", "tolerance"), [(4, 0.05), (8, 0.2)])  # with 8 bits activations are rounded, too
def test_bitsandbytes_quantises_all_parts_and_its_layers_are_called(folder, bits, tolerance):
    pytest.importorskip("bitsandbytes")
    config = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    checks.check_quantised(folder, "cpu", config, checks.of_bitsandbytes, tolerance, checks.BITSANDBYTES_KEEPS)


def test_bitsandbytes_leaves_out_what_is_named(folder):
    """As docs/export.md writes it."""
    pytest.importorskip("bitsandbytes")
    skipped = ["lm_head", "model.vision_tower", "model.mm_projector"]
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skipped)
    model, _ = samples.load(folder, quantization_config=config, device_map={"": "cpu"})
    assert {name.split(".")[1] for name in checks.quantised_layers(model, checks.of_bitsandbytes)} == {"language_model"}


def test_an_adapter_is_saved_and_loaded(folder, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    options = {"r": 2, "init_lora_weights": False, "modules_to_save": ["mm_projector"]}
    model, processor = samples.load(folder)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "qkv"], **options)).eval()
    inputs = samples.inputs_of(processor, *samples.samples(True))
    with torch.inference_mode():
        expected = adapted(**inputs).logits
        adapted.save_pretrained(tmp_path)
        plain, _ = samples.load(folder)
        assert not torch.equal(plain(**inputs).logits, expected)
        assert torch.equal(PeftModel.from_pretrained(plain, tmp_path).eval()(**inputs).logits, expected)


# ---------------------------------------------------------------- what a user calls it with


@pytest.fixture(scope="module")
def loaded(folder):
    return samples.load(folder)


def test_images_in_every_form_are_the_same_rows(loaded, tmp_path):
    """Arrays, tensors, paths, addresses, base64, several in one array."""
    _, processor = loaded
    (photo,) = samples.photographs((50, 31))
    photo.save(tmp_path / "a photo.png")
    (tmp_path / "a photo.png").rename(path := tmp_path / "a %20 photo.png")
    array = np.asarray(photo)
    tensor = torch.from_numpy(array.copy())
    content = base64.b64encode(path.read_bytes()).decode()
    wanted = processor(text="<image>?", images=photo, return_tensors="pt")
    forms = [array, array.transpose(2, 0, 1), tensor, tensor.permute(2, 0, 1), tensor[None], [photo], [[photo]]]
    forms += [str(path), path, path.as_uri(), f"data:image/png;base64,{content}", content]
    for form in forms:
        made = processor(text="<image>?", images=form, return_tensors="pt")
        assert all(torch.equal(made[name], wanted[name]) for name in wanted), form
    for part in ({"path": str(path)}, {"base64": content}, {"image": array}, {"url": path.as_uri()}):
        turn = {"role": "user", "content": [{"type": "image", **part}, {"type": "text", "text": "?"}]}
        made = processor.apply_chat_template([turn], tokenize=True, return_dict=True, return_tensors="pt")
        assert torch.equal(made["pixel_values"], wanted["pixel_values"]), part
    gray = processor(text="<image>?", images=array[..., 0], return_tensors="pt")
    assert torch.equal(gray["image_grid_thw"], wanted["image_grid_thw"])
    both = processor(text=["<image>?"] * 2, images=torch.stack([tensor, tensor]), return_tensors="pt")
    assert torch.equal(both["pixel_values"], wanted["pixel_values"].repeat(2, 1))


def test_what_does_not_fit_is_said(loaded, tmp_path):
    _, processor = loaded
    wide, tall, square = samples.photographs(*samples.SHAPES)
    two = ["<image>?", "<image><image>?"]
    assert len(processor(text=two, images=[[wide], [tall, square]])["image_grid_thw"]) == 3
    assert len(processor(text=["?", "<image>?"], images=[[], [wide]])["image_grid_thw"]) == 1
    refused = [
        (
            r"lists of \[2, 1\] images, but the texts have \[1, 2\] <image>",
            {"text": two, "images": [[wide, tall], [square]]},
        ),
        ("leaves", {"text": "<image>?", "images": wide, "truncation": True, "max_length": 5}),
        ("float32", {"text": "<image>?", "images": np.zeros((8, 8, 3), np.float32)}),
        ("nothing.png", {"text": "<image>?", "images": tmp_path / "nothing.png"}),
        ("cannot read the image http://127.0.0.1:9/", {"text": "<image>?", "images": "http://127.0.0.1:9/x.png"}),
        (
            "cannot read the image data:image/png;base64,abc",
            {"text": "<image>?", "images": "data:image/png;base64,abc"},
        ),
        ("one size", {"text": "<video>?", "videos": [[wide, tall]]}),
        ("without frames", {"text": "<video>?", "videos": [np.zeros((0, 8, 8, 3), np.uint8)]}),
        ("no audio", {"text": "?", "audio": [0.5]}),
    ]
    for words, given in refused:
        with pytest.raises(ValueError, match=words):
            processor(**given)
    with pytest.raises(TypeError, match=r"texts are strings, got \['Image'\]: call processor\(text="):
        processor("<image>?", [wide])


def test_generation_goes_on_with_a_cache_and_from_embeddings(loaded):
    model, processor = loaded
    inputs = samples.inputs_of(processor, samples.samples(True)[0])
    first = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, torch.tensor([[5, 6]])], dim=1)
    again = {**inputs, "input_ids": longer, "attention_mask": torch.ones_like(longer)}
    cached = model.generate(**again, past_key_values=first.past_key_values, max_new_tokens=3, do_sample=False)
    assert torch.equal(cached, model.generate(**again, max_new_tokens=3, do_sample=False))
    ids = torch.tensor([[1, 5, 6, 9]])
    made = model.generate(inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=3, do_sample=False)
    assert torch.equal(made, model.generate(ids, max_new_tokens=3, do_sample=False)[:, ids.shape[1] :])


def test_gradient_checkpointing_and_offload_change_no_number(folder, loaded, tmp_path):
    model, processor = loaded
    inputs = dict(samples.inputs_of(processor, *samples.samples(True)))
    parts = {"model.vision_tower": "disk", "model.mm_projector": "disk", "lm_head": "disk"}
    parts |= {"model.language_model": "cpu", "model.image_newline": "cpu"}
    offloaded, _ = samples.load(folder, device_map=parts, offload_folder=tmp_path)
    with torch.inference_mode():
        assert torch.equal(offloaded(**inputs).logits, model(**inputs).logits)
    plain, checkpointed = (samples.load(folder)[0].train() for _ in range(2))
    checkpointed.gradient_checkpointing_enable()
    (loss, grads), (other, others) = (checks.a_step(each, inputs) for each in (plain, checkpointed))
    assert loss == other and grads.keys() == others.keys()
    assert all(torch.equal(grads[name], others[name]) for name in grads)


# ---------------------------------------------------------------- the code in the folder

ALONE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("llava_packing_tower", "triton"):
            raise ImportError(name)

sys.meta_path.insert(0, Absent())
import json
import export_samples as samples
from transformers import AutoModelForImageTextToText, AutoProcessor

for folder in sys.argv[1:]:
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    print(json.dumps(samples.answers(model, samples.inputs_of(processor, *samples.samples(True)))))
"""


@pytest.mark.long
def test_the_code_of_every_family_stands_alone(tmp_path):
    """``--with_code``: loaded in a process that does not find this package."""
    folders = []
    for family, (cls, _) in TINY.items():
        folders.append(checks.make_export(tmp_path / family, family))
        write_code(folders[-1], cls)
        for name in ("config.json", "preprocessor_config.json", "processor_config.json"):
            content = read_json(folders[-1] / name)
            write_json({**content, "auto_map": auto_map(PREFIX)}, folders[-1] / name)
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": str(Path(checks.__file__).parent)}
    command = [sys.executable, "-c", ALONE, *map(str, folders)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    for folder, line in zip(folders, result.stdout.strip().splitlines()[-len(folders) :], strict=True):
        model, processor = samples.load(folder)
        assert json.loads(line) == samples.answers(model, samples.inputs_of(processor, *samples.samples(True))), folder
