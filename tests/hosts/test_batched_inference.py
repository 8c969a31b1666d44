"""Batches of questions through a real LLaVA: each answer is the one that the host's own `generate` gives alone."""

from __future__ import annotations

import copy
import inspect
import json
import shutil
from fractions import Fraction
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from llava_packing_tower.integrations.llava import batched_inference, install
from llava_packing_tower.integrations.llava.inference import build_prompt, load_checkpoint

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("llava") is None, reason="LLaVA is not installed"),
]
NEW_TOKENS = 10
FRAMES = 5


@pytest.fixture(scope="module")
def loaded(demo):
    """The untrained model in float32: its answers are long and differ with everything that it sees."""
    install.apply()
    checkpoint = load_checkpoint(demo.untrained)
    checkpoint.model.float()
    with torch.no_grad():
        for parameter in checkpoint.model.get_model().mm_projector.parameters():
            parameter *= 8  # what is seen weighs as much as what is read
    return checkpoint


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two videos of other sizes and lengths."""
    av = pytest.importorskip("av")
    folder, paths = tmp_path_factory.mktemp("videos"), []
    for number, (width, height, count) in enumerate([(96, 64, 9), (64, 128, 14)]):
        paths.append(str(folder / f"{number}.mp4"))
        with av.open(paths[-1], "w") as container:
            stream = container.add_stream("mpeg4", rate=Fraction(5))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for index in range(count):
                pixels = np.full((height, width, 3), 20 * number, np.uint8)
                pixels[:, : (index + 1) * width // count] = (250, 10 * index, 90)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
    return paths


def photo(number: int, width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(number)
    return Image.fromarray(noise.integers(0, 255, (height, width, 3), dtype=np.uint8))


def takes_videos(loaded) -> bool:
    return "modalities" in inspect.signature(loaded.model.generate).parameters


def in_mode(loaded, mode: str):
    """The same checkpoint, as if it had been trained with another ``image_aspect_ratio``."""
    if mode == "native":
        return loaded
    model = copy.deepcopy(loaded.model)
    model.config.image_aspect_ratio = mode
    model.config.image_grid_pinpoints = [[112, 224], [224, 112], [224, 224]]
    tower = model.get_vision_tower()
    tower.set_native(None)
    return loaded._replace(model=model, image_processor=tower.image_processor)


def alone(loaded, text: str, pixels, **more: object) -> list[int]:
    """One question as the host's own scripts ask it."""
    utilities, constants = import_module("llava.mm_utils"), import_module("llava.constants")
    prompt = build_prompt("v1", text)
    index = constants.IMAGE_TOKEN_INDEX
    ids = utilities.tokenizer_image_token(prompt, loaded.tokenizer, index, return_tensors="pt")[None]
    with torch.inference_mode():
        output = loaded.model.generate(ids, images=pixels, do_sample=False, max_new_tokens=NEW_TOKENS, **more)
    return [token for token in output[0].tolist() if token != loaded.model.generation_config.eos_token_id]


def process(loaded, images: list[Image.Image]):
    return import_module("llava.mm_utils").process_images(images, loaded.image_processor, loaded.model.config)


def batched(loaded, asked) -> list[list[int]]:
    questions = [batched_inference.prepare(loaded, text, visuals, "v1", FRAMES) for text, visuals in asked]
    return batched_inference.generate(loaded, questions, do_sample=False, max_new_tokens=NEW_TOKENS)


@pytest.mark.parametrize("mode", ["native", "pad", "anyres"])
def test_images_and_several_images_and_text_in_one_batch(loaded, mode):
    loaded = in_mode(loaded, mode)
    a, b, c, d = photo(0, 90, 200), photo(1, 300, 100), photo(2, 64, 64), photo(3, 130, 170)
    asked = [
        ("What does this photo show?", [a]),
        ("A much longer question: which of these photos is the larger one, the first or the second?", [b, c]),
        ("No photo at all?", []),
        ("Short", [d]),
        ("First <image> then <image> now", [d, a]),
    ]
    together = batched(loaded, asked)
    several = in_mode(loaded, "pad") if mode == "anyres" else loaded
    apart = [
        alone(loaded, f"<image>\n{asked[0][0]}", process(loaded, [a]), image_sizes=[a.size]),
        alone(several, f"<image> <image>\n{asked[1][0]}", process(several, [b, c]), image_sizes=[b.size, c.size]),
        alone(loaded, asked[2][0], None),
        alone(loaded, f"<image>\n{asked[3][0]}", process(loaded, [d]), image_sizes=[d.size]),
        alone(several, asked[4][0], process(several, [d, a]), image_sizes=[d.size, a.size]),
    ]
    assert together == apart
    assert len({tuple(answer) for answer in apart}) >= 4, "the answers must tell the questions apart"
    assert batched(loaded, asked[::-1]) == apart[::-1]


def test_videos_and_images_in_one_batch(loaded, videos):
    from llava_packing_tower.data.video import read_clip

    image = photo(5, 80, 120)
    frames = [photo(20 + i, 70, 50) for i in range(3)]
    asked = [("What happens?", [videos[0]]), ("And what is this?", [image]), ("Then?", [videos[1]]), ("?", [frames])]
    together = batched(loaded, asked)

    def video(text: str, clip, indices, total) -> list[int]:
        pixels = loaded.image_processor.preprocess(clip, return_tensors="pt")["pixel_values"]
        detail = {"modality": "video", "frame_indices": torch.tensor(indices), "total_frames": total}
        names = {"modalities": ["video"]} if takes_videos(loaded) else {}
        return alone(loaded, f"<image>\n{text}", [torch.as_tensor(pixels)], image_sizes=[detail], **names)

    clips = [read_clip(path, upbound=FRAMES, force=True) for path in videos]
    assert clips[1].indices == [0, 3, 6, 9, 13]
    still = np.stack([np.asarray(frame) for frame in frames])
    apart = [
        video("What happens?", clips[0].frames, clips[0].indices, 9),
        alone(loaded, "<image>\nAnd what is this?", process(loaded, [image]), image_sizes=[image.size]),
        video("Then?", clips[1].frames, clips[1].indices, 14),
        video("?", still, [0, 1, 2], 3),
    ]
    assert together == apart
    # Time matters: the same frames in reverse are another video.
    shown = [Image.fromarray(frame) for frame in clips[1].frames]
    orders = [
        batched_inference.prepare(loaded, "Then?", [order], "v1", answer="moon") for order in (shown, shown[::-1])
    ]
    (forwards, _), (backwards, _) = batched_inference.losses(loaded, orders)
    assert abs(forwards - backwards) > 1e-4


def test_losses_are_those_of_the_hosts_own_forward(loaded):
    utilities, constants = import_module("llava.mm_utils"), import_module("llava.constants")
    asked = [("What?", [photo(0, 90, 200)], "moon"), ("A longer one?", [photo(1, 200, 60)], "a cup of coffee")]
    asked.append(("Without?", [], "cat"))
    questions = [
        batched_inference.prepare(loaded, text, visuals, "v1", answer=answer) for text, visuals, answer in asked
    ]
    found = batched_inference.losses(loaded, questions)
    for (text, visuals, answer), (loss, greedy) in zip(asked, found):
        text = f"<image>\n{text}" if visuals else text
        question, whole = build_prompt("v1", text), build_prompt("v1", text, answer)
        index = constants.IMAGE_TOKEN_INDEX
        ids = utilities.tokenizer_image_token(whole, loaded.tokenizer, index, return_tensors="pt")[None]
        labels = ids.clone()
        labels[:, : len(utilities.tokenizer_image_token(question, loaded.tokenizer, index))] = constants.IGNORE_INDEX
        pixels = process(loaded, visuals) if visuals else None
        with torch.inference_mode():
            wanted = loaded.model(input_ids=ids, labels=labels, images=pixels).loss.item()
        assert loss == pytest.approx(wanted, abs=1e-4) and not greedy
    assert len({round(loss, 3) for loss, _ in found}) == 3


def test_a_trained_model_is_greedy_about_what_it_learned(demo):
    from llava_packing_tower.data.sample_photos import PHOTOS
    from llava_packing_tower.tools.demo.dataset import QUESTION

    install.apply()
    loaded = load_checkpoint(demo.trained)
    image = Image.open(demo.images / PHOTOS[0].name)
    answers = (PHOTOS[0].answer, PHOTOS[1].answer)
    questions = [batched_inference.prepare(loaded, QUESTION, [image], "v1", answer=answer) for answer in answers]
    (right, greedy), (wrong, other) = batched_inference.losses(loaded, questions)
    assert right < wrong and greedy and not other


def test_what_cannot_be_asked_is_refused(loaded, videos):
    with pytest.raises(ValueError, match="has 2 <image>, but 1 images"):
        batched_inference.prepare(loaded, "<image> and <image>", [photo(0, 30, 30)], "v1")
    with pytest.raises(ValueError, match="no conversation template 'v9'"):
        batched_inference.conversation_name(loaded.model.config, "v9")
    with pytest.raises(ValueError, match="one size"):
        batched_inference.prepare(loaded, "?", [[photo(0, 30, 30), photo(1, 30, 40)]], "v1")
    with pytest.raises(ValueError, match=r"nothing\.mp4"):
        batched_inference.prepare(loaded, "?", ["nothing.mp4"], "v1")
    if not takes_videos(loaded):
        with pytest.raises(ValueError, match="takes videos only from"):
            batched_inference.prepare(in_mode(loaded, "pad"), "?", [videos[0]], "v1")


def test_the_conversation_is_the_trainings_or_the_decoders(demo, loaded):
    config = copy.copy(loaded.model.config)
    assert batched_inference.conversation_name(config, "plain") == "plain"
    config.mm_packing_conversation = "llava_llama_2"
    assert batched_inference.conversation_name(config) == "llava_llama_2"
    config.mm_packing_conversation = None
    assert batched_inference.conversation_name(config) == "v1"
    config.architectures = ["LlavaMistralForCausalLM"]  # LLaVA-NeXT's configs say model_type qwen2, mistral ...
    assert batched_inference.conversation_name(config) == "mistral_instruct"


def test_a_frozen_towers_folder_may_be_gone_where_the_checkpoint_has_its_weights(demo, tmp_path, caplog):
    """What training with a frozen tower leaves behind, moved to a machine without the tower's folder."""
    folder = tmp_path / "frozen"
    shutil.copytree(demo.trained, folder)
    config = json.loads((folder / "config.json").read_text())
    config["mm_vision_tower"] = str(tmp_path / "gone_packing")
    config["mm_packing_config"].update(weights="folder", fingerprint="0" * 64)
    config["mm_tunable_parts"] = "mm_mlp_adapter,mm_language_model"
    (folder / "config.json").write_text(json.dumps(config))
    install.apply()
    found = load_checkpoint(folder).model.get_vision_tower().state_dict()
    assert "does not exist here" in caplog.text
    saved = load_file(folder / "model.safetensors")
    wanted = {key.split("vision_tower.", 1)[1]: saved[key] for key in saved if "vision_tower." in key}
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert json.loads((folder / "config.json").read_text()) == config
    kept = {key: tensor for key, tensor in saved.items() if "vision_tower." not in key}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="gone_packing"):
        load_checkpoint(folder)
