"""The checks of test_model_class.py, in a process of one host: ``model_class_checks.py FOLDER``. Prints the names."""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib import import_module
from pathlib import Path

from llava_checkpoints import edit, edit_config, load, make_decoder, make_llava, save_full, save_lora

# isort: split
import torch
from safetensors.torch import load_file, save_file

from llava_packing_tower.integrations.llava.inference import load_checkpoint
from llava_packing_tower.tools.demo.tiny_models import make_tower

NEXT = bool(os.environ.get("LLAVA_NEXT_DIR"))
# The words that LLaVA looks for must not help: "llama" and "yi" are even wrong ones.
PLACES = ("checkpoints/run1/", "verifying-llama-run")


def raises(text: str, *args: object) -> None:
    try:
        load(*args)
    except ValueError as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"loaded, without {text!r}")


def same(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    here = dict(model.named_parameters())
    assert here.keys() == tensors.keys(), here.keys() ^ tensors.keys()
    for name, value in tensors.items():  # transformers 5 may find more tokens in this tokenizer
        assert torch.equal(here[name][: len(value)].float(), value.to(here[name].dtype).float()), name


def check(word: str, root: Path, tower: Path) -> None:
    name = f"Llava{word}ForCausalLM"
    decoder = make_decoder(root / "decoder", word)
    model = make_llava(decoder, tower, word)
    wanted = {n: p.detach() for n, p in model.named_parameters()}
    full = save_full(model, decoder, root / "full")
    assert json.loads((full / "config.json").read_text())["model_type"] != "llava_llama"
    for place in PLACES:
        folder = root / place
        shutil.copytree(full, folder, dirs_exist_ok=True)
        loaded = load(f"{root}/{place}")
        assert type(loaded).__name__ == name and loaded.config._name_or_path == f"{root}/{place}"
        same(loaded, wanted)
        assert type(load_checkpoint(folder, "cpu").model).__name__ == name  # what `llava-packing eval` calls

    train = import_module("llava.train.train")  # whose paths may say "llama", too
    assert type(train.LlavaLlamaForCausalLM.from_pretrained(decoder)).__name__ == name

    alone = root / "projector"
    model.config.save_pretrained(alone)
    torch.save({n: p for n, p in wanted.items() if "mm_projector" in n}, alone / "mm_projector.bin")
    same(load(str(alone), str(decoder)), wanted)
    raises("holds only the projector: give model_base", str(alone))

    adapter, merged = save_lora(make_llava(decoder, tower, word), decoder, root / "runs" / "a")
    for base in (str(decoder), None):
        loaded = load(str(adapter), base)
        assert type(loaded).__name__ == name
        here = dict(loaded.named_parameters())
        assert here.keys() == merged.keys()
        for key, value in merged.items():
            assert (here[key][: len(value)].float() - value).abs().max() < 2e-3, key
    transformers_load = load(str(save_full(loaded, decoder, root / "runs" / "merged")))
    assert type(transformers_load).__name__ == name

    broken = root / "broken"
    shutil.copytree(full, broken)
    first = "model.layers.0.self_attn.q_proj.weight"
    edit(broken, lambda tensors: tensors.update({"model.layers.0.extra.weight": torch.ones(3)}))
    raises("in the files, but not in the model: model.layers.0.extra.weight", str(broken))
    edit(broken, lambda tensors: (tensors.pop("model.layers.0.extra.weight"), tensors.pop(first)))
    raises(f"missing from the files: {first}", str(broken))
    adapter_file = adapter / "adapter_model.safetensors"
    kept = load_file(adapter_file)
    some = next(iter(kept))
    save_file({key: value for key, value in kept.items() if key != some}, adapter_file)
    raises("1 missing from the files", str(adapter), str(decoder))
    save_file({**kept, some.replace("layers.0", "layers.9"): kept[some].clone()}, adapter_file)
    raises("1 in the files, but not in the model", str(adapter), str(decoder))
    edit_config(adapter.parent / "a", mm_vision_tower=str(tower))
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "/gone"}))
    raises("give model_base, the folder that it was trained on (/gone, which does not exist here)", str(adapter))


def main() -> None:
    root = Path(sys.argv[1])
    make_tower(root / "vit_packing", seed=2)
    for word in ("Qwen", "Mistral") if NEXT else ("Llama", "Mistral"):
        check(word, root / word, root / "vit_packing")
        print("checked", word)
    if not NEXT:  # a Qwen checkpoint would be a Llama without the biases of its attention
        stranger = root / "stranger"
        shutil.copytree(root / "Llama" / "full", stranger)
        edit_config(stranger, architectures=["LlavaQwenForCausalLM"], model_type="qwen2")
        raises(
            "config.json names the class LlavaQwenForCausalLM, which the installed LLaVA does not have", str(stranger)
        )
        print("checked refusal")


if __name__ == "__main__":
    main()
