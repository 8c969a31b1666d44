"""lmms-eval's real command line on the demo's model: training to score, on the CPU and offline."""

from __future__ import annotations

import json
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from host_runs import environment, execute
from PIL import Image
from safetensors.torch import load_file, save_file

from llava_packing_tower.data.sample_photos import PHOTOS
from llava_packing_tower.tools.demo.dataset import QUESTION

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("lmms_eval") is None, reason="lmms-eval is not installed: requirements/eval.txt"),
    pytest.mark.skipif(find_spec("llava") is None, reason="LLaVA is not installed"),
]
CHANCE = 1 / len(PHOTOS)


def evaluate(checkpoint: Path, output: Path, *words: str):
    command = [sys.executable, "-m", "llava_packing_tower", "eval", str(checkpoint), "--output_path", str(output)]
    return execute([*command, *words], {**environment(""), "HF_DATASETS_OFFLINE": "1"}, timeout=400)


def newest(output: Path, kind: str) -> Path:
    return max((output / "smoke").rglob(f"*_{kind}"), key=lambda file: file.stat().st_mtime)


def score(output: Path) -> float:
    content = json.loads(newest(output, "results.json").read_text())
    assert content["n-samples"]["smoke"]["effective"] == len(PHOTOS)
    return content["results"]["smoke"]["exact_match,none"]


def answers(output: Path) -> dict[int, str]:
    lines = map(json.loads, newest(output, "samples_smoke.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["doc_id"]: line["filtered_resps"] for line in lines}


def hits(output: Path) -> tuple[int, int]:
    """Answers from the response cache, and those that were not in it."""
    log = (output / "smoke" / "log.txt").read_text(encoding="utf-8")
    return tuple(int(re.findall(rf"(\d+) {word}", log)[-1]) for word in ("hits", "misses"))


def moved(demo, tmp_path) -> Path:
    """A copy of the trained checkpoint, without the folder of its tower."""
    checkpoint = tmp_path / "moved_elsewhere"
    shutil.copytree(demo.trained, checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    config["mm_vision_tower"] = str(tmp_path / "gone_packing")
    (checkpoint / "config.json").write_text(json.dumps(config))
    return checkpoint


def assert_scored(output: Path) -> None:
    """A first run of the task: its score, nothing from a cache, its log and its picture."""
    assert score(output) >= 0.8, answers(output)
    assert hits(output) == (0, 16)
    log = (output / "smoke" / "log.txt").read_text(encoding="utf-8")
    assert "reading the weights: 100%" in log and re.search(r"over mm_packing_max_patches: 16 images.*task smoke", log)
    with Image.open(output / "results.png") as chart:
        assert chart.format == "PNG"


def test_from_training_to_score(demo, tmp_path):
    """One story, its chapters in processes: the folder moved, done is done, other weights on two processes."""
    checkpoint, output = moved(demo, tmp_path), tmp_path / "out"
    cache = ("--use_cache", str(tmp_path / "cache"), "--log_samples")
    result = evaluate(checkpoint, output, "--tasks", "smoke", *cache)
    assert result.returncode == 0, result.stdout + result.stderr
    assert_scored(output)

    # Done for these weights: nothing runs.
    result = evaluate(checkpoint, output, "--tasks", "smoke", *cache)
    assert result.returncode == 0 and "already completed" in result.stdout, result.stdout + result.stderr

    # Other weights at the same path: run again, and nothing of the cache is theirs.
    shutil.copyfile(demo.untrained / "model.safetensors", checkpoint / "model.safetensors")
    result = evaluate(checkpoint, output, "--tasks", "smoke", "--num_processes", "2", *cache)
    assert result.returncode == 0, result.stdout + result.stderr
    log = (output / "smoke" / "log.txt").read_text(encoding="utf-8")
    assert "rank 0 of 2" in log and "rank 1 of 2" in log and score(output) <= 3 * CHANCE


@pytest.mark.long
def test_a_task_that_fails_a_cache_and_two_processes(demo, tmp_path):
    checkpoint, output = moved(demo, tmp_path), tmp_path / "out"
    cache = ("--use_cache", str(tmp_path / "cache"), "--log_samples")

    # A task whose data cannot be had does not take the other with it, and is named with its cause.
    result = evaluate(checkpoint, output, "--tasks", "realworldqa,smoke", *cache)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "realworldqa: FAILED" in result.stdout
    said = r"realworldqa: \S*(Error|Exception)\S*: .*\(exit status.*\n1 of 2 tasks failed: realworldqa"
    assert re.search(said, result.stderr), result.stderr
    table = (output / "results.md").read_text()
    assert "| realworldqa | - | - | FAILED |" in table and "realworldqa failed: " in table
    assert_scored(output)
    trained = answers(output)

    # Asked to run again: every answer is in the cache.
    result = evaluate(checkpoint, output, "--tasks", "smoke", "--force", *cache)
    assert result.returncode == 0 and "already completed" not in result.stdout, result.stdout + result.stderr
    assert hits(output) == (16, 0) and answers(output) == trained

    # Two processes with batches of one answer as one process did.
    two = tmp_path / "two"
    words = ("--tasks", "smoke", "--log_samples", "--num_processes", "2", "--batch_size", "1")
    result = evaluate(demo.trained, two, *words)
    assert result.returncode == 0, result.stdout + result.stderr
    log = (two / "smoke" / "log.txt").read_text(encoding="utf-8")
    assert "rank 0 of 2" in log and "rank 1 of 2" in log and "batches of 1" in log
    assert answers(two) == trained and score(two) >= 0.8

    from llava_packing_tower.cli.main import main

    assert main(["eval-report", str(output), str(two), "--output_path", str(tmp_path)]) == 0
    assert "| task | metric | samples | out | two |" in (tmp_path / "results.md").read_text()


# ---------------------------------------------------------------- the model behind lmms-eval, in this process


@pytest.fixture(scope="module")
def model(demo):
    from llava_packing_tower.eval.models.llava_packing import LlavaPacking

    return LlavaPacking(str(demo.trained), batch_size="3")


def request(document: object, arguments: object, text: str = QUESTION, **metadata: object) -> SimpleNamespace:
    args = (text, arguments, lambda visuals: visuals, document, "task", "test")
    return SimpleNamespace(args=args, metadata=metadata)


def opened(demo, number: int) -> Image.Image:
    return Image.open(demo.images / PHOTOS[number].name).convert("RGB")


def test_answers_keep_their_order_and_requests_their_arguments(model, demo):
    model.task_dict = {"task": {"test": [[opened(demo, i)] for i in range(len(PHOTOS))]}}
    short, long = {"max_new_tokens": 16, "until": ["\n\n"]}, {"max_new_tokens": 16, "until": ["o"], "temperature": 0}
    requests = [request(i, short if i % 3 else long, QUESTION + " " * (i % 4)) for i in range(8)]
    found = model.generate_until(requests)
    assert short == {"max_new_tokens": 16, "until": ["\n\n"]}, "lmms-eval stores answers under these arguments"
    wanted = [photo.answer if i % 3 else photo.answer.split("o")[0] for i, photo in enumerate(PHOTOS[:8])]
    assert sum(a == b for a, b in zip(found, wanted)) >= 6, (found, wanted)


def test_the_right_choice_has_the_smallest_loss(model, demo):
    """As lmms-eval's `multiple_choice` asks, which takes the smallest; and a continuation without context."""
    model.task_dict = {"task": {"test": [[opened(demo, i)] for i in range(4)]}}
    choices = [photo.answer for photo in PHOTOS[:4]]
    found = model.loglikelihood([request(i, f" {choice}".strip()) for i in range(4) for choice in choices])
    losses = np.array([loss for loss, _ in found]).reshape(4, 4)
    assert losses.argmin(1).tolist() == [0, 1, 2, 3] and (losses > 0).all()
    assert all(found[5 * i][1] for i in range(4)) and not found[1][1]
    (loss, _), (again, _) = model.loglikelihood(
        [SimpleNamespace(args=("", "moon"), metadata=None), request(0, lambda document: choices[0])]
    )
    assert loss > 0 and again == pytest.approx(losses[0, 0], abs=1e-2)


def test_questions_of_several_rounds_go_on_until_the_task_ends_them(model, demo):
    """Document i has i + 1 rounds, each with another photo; the task sees the answers so far, and its own note."""
    documents = [[opened(demo, (i + 3 * j) % 16) for j in range(i + 1)] for i in range(4)]
    model.task_dict = {"task": {"test": documents}}
    calls = []

    def to_text(document, previous_output, round_idx, previous_round_info):
        calls.append((len(document), round_idx, list(previous_output), previous_round_info))
        note = (previous_round_info or 0) + 10
        if round_idx == len(document):
            return None, None, True, [f"kept {answer}" for answer in previous_output], note
        return [document[round_idx]], QUESTION, False, previous_output, note

    settings = {"max_new_tokens": 16, "until": ["\n\n"], "temperature": 0}
    show = lambda document: document[:1]  # noqa: E731
    args = [(QUESTION, settings, show, to_text, i, "task", "test") for i in range(4)]
    found = model.generate_until_multi_round([SimpleNamespace(args=each, metadata={}) for each in args])
    assert settings == {"max_new_tokens": 16, "until": ["\n\n"], "temperature": 0}
    # lmms-eval makes one string of anything but a list.
    assert [len(answers) for answers in found] == [1, 2, 3, 4] and all(isinstance(each, list) for each in found)
    # Each answer is the one that its photo gets alone.
    model.task_dict = {"task": {"test": [[image] for document in documents for image in document]}}
    alone = iter(model.generate_until([request(i, dict(settings)) for i in range(10)]))
    single = [[next(alone) for _ in document] for document in documents]
    assert found == [[f"kept {answer}" for answer in answers] for answers in single]
    assert len({answer for answers in single for answer in answers}) >= 6
    assert [call[:2] for call in calls if call[0] == 3] == [(3, 1), (3, 2), (3, 3)]
    assert [call[2:] for call in calls if call[0] == 3] == [(single[2][:n], 10 * (n - 1) or None) for n in (1, 2, 3)]
    assert model.generate_until_multi_round([]) == []


def test_frames_of_a_task_are_one_video(model, demo):
    frames = [Image.new("RGB", (60, 40), (20 * i, 99, 0)) for i in range(9)]
    model.task_dict = {"task": {"test": [frames]}}
    asked = request(0, {"max_new_tokens": 4}, "?", task_type="video", sample_frames=4)
    question = model._prepare(asked, "?", asked.args[2], 0, "task", "test")
    assert question.kinds == ("video",) and len(question.pixels[0]) == 4
    assert isinstance(model.generate_until([asked])[0], str)
    with pytest.raises(ValueError, match=r"task task, document 0: .* 2 <image>, but 9"):
        model.generate_until([request(0, {}, "<image> <image>")])


def test_checkpoints_without_their_tower_are_refused(demo, tmp_path):
    from llava_packing_tower.eval.models.llava_packing import LlavaPacking
    from llava_packing_tower.eval.preflight import check_checkpoint

    for name, kept in (("one", 1), ("all", 0)):
        folder = tmp_path / name
        shutil.copytree(demo.trained, folder)
        tensors = load_file(folder / "model.safetensors")
        tower = sorted(key for key in tensors if "vision_tower." in key)
        for key in tower[kept:] if kept == 0 else tower[:kept]:
            del tensors[key]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"not in the checkpoint"):
            LlavaPacking(str(folder))
    check_checkpoint(demo.trained, None)
    with pytest.raises(ValueError, match="none of its files has a vision_tower tensor"):
        check_checkpoint(tmp_path / "all", None)
    with pytest.raises(ValueError, match="is not a checkpoint"):
        check_checkpoint(tmp_path, None)
    (tmp_path / "config.json").write_text('{"mm_vision_tower": "openai/clip"}')
    with pytest.raises(ValueError, match="has no packing tower"):
        check_checkpoint(tmp_path, None)


def test_an_image_that_cannot_be_read_ends_the_task_by_name(model, demo, tmp_path):
    """Truncated, whatever somebody has told Pillow; an error of the task itself; an image above the cap."""
    from PIL import ImageFile

    cut = tmp_path / "cut.png"
    cut.write_bytes((demo.images / PHOTOS[0].name).read_bytes()[:5000])
    whole = opened(demo, 1)
    for damaged, said in (
        (lambda: [Image.open(cut)], "truncated"),
        (lambda: [Image.open(cut).convert("RGB")], "truncated"),
        (lambda: {}["image"], "KeyError: 'image'"),
        (lambda: [Image.new("L", (20_000, 9_000))], "mm_packing_max_pixels 178000000"),
    ):
        model.task_dict = {"task": {"test": [lambda: [whole], damaged, lambda: [whole]]}}
        requests = [request(i, {"max_new_tokens": 2}) for i in range(3)]
        for each in requests:
            each.args = (*each.args[:2], lambda make: make(), *each.args[3:])
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        with pytest.raises(ValueError, match=f"task task, document 1: .*{said}"):
            model.generate_until(requests)
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        scored = [SimpleNamespace(args=(QUESTION, "a", *each.args[2:]), metadata={}) for each in requests]
        with pytest.raises(ValueError, match=f"task task, document 1: .*{said}"):
            model.loglikelihood(scored)


def test_the_cache_is_refused_without_the_identity_of_the_weights(demo, monkeypatch):
    from llava_packing_tower.checkpoint.folder_hash import identity
    from llava_packing_tower.eval.models.llava_packing import LlavaPacking

    monkeypatch.setattr(sys, "argv", ["lmms_eval", "--use_cache", "somewhere"])
    with pytest.raises(ValueError, match=f"Add weights={identity(demo.trained)} to --model_args"):
        LlavaPacking(str(demo.trained))
    with pytest.raises(ValueError, match="it has changed"):
        LlavaPacking(str(demo.trained), weights="w0123456789abcdef")
    LlavaPacking(str(demo.trained), weights=identity(demo.trained))


def test_lmms_eval_finds_the_model_by_both_of_its_ways(monkeypatch):
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    from llava_packing_tower import eval
    from llava_packing_tower.eval import models
    from llava_packing_tower.eval.models.llava_packing import LlavaPacking

    registry = ModelRegistryV2()
    for manifest in eval.manifests():
        registry.register_manifest(manifest)
    assert registry.get_model_class("llava_packing") is LlavaPacking
    assert {"llava_packing": LlavaPacking.__name__} == models.AVAILABLE_MODELS
    monkeypatch.setitem(sys.modules, "lmms_eval.models.registry_v2", None)  # as in 0.5
    assert eval.manifests() == []


def test_every_task_of_the_groups_is_registered():
    from llava_packing_tower.eval.task_groups import GROUPS, check_known, registered

    known = registered()
    for tasks in GROUPS.values():
        check_known(tasks, known)
    with pytest.raises(ValueError, match=r"videmme \(did you mean .*videomme"):
        check_known(["smoke", "videmme"], known)
