"""Images over ``mm_packing_max_patches`` in an evaluation's log; the weights of a checkpoint are read with progress."""

import os
from types import SimpleNamespace

import pytest
from PIL import Image

from llava_packing_tower.checkpoint.folder_hash import identity
from llava_packing_tower.data.smart_resize import SmartResize
from llava_packing_tower.eval import hf_inference
from llava_packing_tower.eval.reduced_images import ReducedImages
from llava_packing_tower.integrations.llava import batched_inference
from llava_packing_tower.integrations.llava.batched_inference import Question

RULE = SmartResize(patch_size=10, merge=(1, 1), min_patches=4, max_patches=24)
SIZES = [(60, 40), (120, 80), (58, 41), (12, 9), (40, 480)]  # kept, reduced, rounded, enlarged, reduced


def test_what_a_bound_does_to_an_image():
    found = [RULE.scaling(*size) for size in SIZES]
    assert found == [None, pytest.approx(9600 / 2400), None, pytest.approx(108 / 600), pytest.approx(19200 / 1600)]


def test_both_kinds_of_checkpoints_tell():
    processor = SimpleNamespace(rule=RULE)
    config = SimpleNamespace(image_aspect_ratio="native", mm_packing_max_patches=24)
    loaded = SimpleNamespace(model=SimpleNamespace(config=config), image_processor=processor)
    details = tuple({"size": size} for size in SIZES)
    question = Question(None, kinds=("image", "video", *["image"] * 3), details=details)
    expected = [RULE.scaling(*size) for size in SIZES]
    assert batched_inference.scalings(loaded, question) == [expected[0], *expected[2:]]
    config.image_aspect_ratio = "pad"
    assert batched_inference.scalings(loaded, question) == []
    settings = SimpleNamespace(is_native=True, rule=RULE)
    loaded = SimpleNamespace(processor=SimpleNamespace(image_processor=SimpleNamespace(settings=settings)))
    question = hf_inference.Question("", tuple(Image.new("L", size) for size in SIZES))
    assert hf_inference.scalings(loaded, question) == expected
    settings.is_native = False
    assert hf_inference.scalings(loaded, question) == []


def test_the_log_has_their_number_and_the_worst(capsys):
    reduced = ReducedImages()
    reduced.report()
    for document, size in enumerate([*SIZES, (90, 90), (1000, 7), (61, 61), (60, 40)]):
        reduced.note(RULE.scaling(*size), f"document {document}")
        reduced.note(RULE.scaling(*size), f"document {document}")  # in another round
    reduced.report()
    assert capsys.readouterr().err == (
        "llava_packing: over mm_packing_max_patches: 5 images, most of all document 4 to 1/12 of its pixels, "
        "document 5 to 1/5.06 of its pixels, document 1 to 1/4 of its pixels\n"
    )
    reduced.report()
    assert capsys.readouterr().err == ""


def test_weights_are_read_with_progress(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"x" * (9 << 20))
    (tmp_path / "notes.txt").write_text("not the model")
    (tmp_path / "folder.json").mkdir()
    seen = []
    word = identity(tmp_path, None, lambda done, count: seen.append((done, count)))
    assert word == identity(tmp_path) and {count for _, count in seen} == {(9 << 20) + 2}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen) and len(seen) == 4
    assert seen[-1] == ((9 << 20) + 2,) * 2
    os.symlink(tmp_path / "gone", tmp_path / "second.safetensors")
    with pytest.raises(ValueError, match=r"cannot read .*second\.safetensors: No such file"):
        identity(tmp_path)
