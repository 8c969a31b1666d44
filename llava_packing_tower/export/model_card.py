"""README.md of an export: what it is, how it was trained, how it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import __version__
from ..towers.names import strip_prefix
from ..utils.files import read_json
from .plan import Source

STATE = "trainer_state.json"

_CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- llava
- llava_packing
---

# {title}

A LLaVA with a packed vision tower, exported by `llava-packing export` (llava-packing-tower {version}).

| | |
|---|---|
{rows}

## Use

```python
{imports}from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("{title}"{remote})
model = AutoModelForImageTextToText.from_pretrained("{title}"{remote}, dtype="auto", device_map="auto")
content = [{{"type": "image", "path": "photo.jpg"}}, {{"type": "text", "text": "What is this?"}}]
messages = [{{"role": "user", "content": content}}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(model.device)
output = model.generate(**inputs, max_new_tokens=64)
print(processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])
```
"""


def model_card(source: Source, config: Mapping[str, Any], conversation: str, dtype: str, with_code: bool) -> str:
    """The text of README.md."""
    text, vision = config["text_config"], config["vision_config"]
    facts = {
        "decoder": f"{text['model_type']}, {text['num_hidden_layers']} layers of width {text['hidden_size']}",
        "vision tower": (
            f"{strip_prefix(str(source.config.get('mm_vision_tower'))).rstrip('/').split('/')[-1]} "
            f"({vision['model_type']}, {vision['num_hidden_layers']} layers of width {vision['hidden_size']}, "
            f"patches of {vision['patch_size']} pixels)"
        ),
        "projector": config["mm_projector_type"],
        "images": describe_images(config),
        "conversation": conversation,
        "weights": f"{dtype}{', LoRA merged' if (source.folder / 'adapter_config.json').is_file() else ''}",
        **training_facts(source),
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return _CARD.format(
        title=source.folder.resolve().name,
        version=__version__,
        rows=rows,
        imports="" if with_code else "import llava_packing_tower  # registers the classes\n",
        remote=", trust_remote_code=True" if with_code else "",
    )


def describe_images(config: Mapping[str, Any]) -> str:
    ratio = config["image_aspect_ratio"]
    if ratio == "native":
        return (
            f"native resolution, {config['mm_packing_min_patches']} to {config['mm_packing_max_patches']} patches, "
            f"videos as {config['mm_packing_video']}"
        )
    side = config["vision_config"]["image_size"]
    return f"{ratio}, {config['mm_patch_merge_type']}, tiles of {side} pixels"


def training_facts(source: Source) -> dict[str, str]:
    """What trainer_state.json tells, if there is one."""
    file = source.folder / STATE
    if not file.is_file():
        return {}
    state = read_json(file)
    try:
        losses = [float(entry["loss"]) for entry in state.get("log_history", ()) if "loss" in entry]
        facts = {"training": f"{state.get('global_step')} steps, {float(state.get('epoch') or 0):.2f} epochs"}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if losses:
        facts["loss"] = f"{losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last"
    return facts
