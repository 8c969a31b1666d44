"""LLaVA-NeXT's train_dpo, as `trainer: dpo` of `llava-packing train`, at native resolution."""

from __future__ import annotations

import json
import re

import pytest
from host_runs import NEEDS_NEXT, NEXT
from host_runs import train as train_ranks
from native_runs import make_workspace, reload, train
from safetensors.torch import load_file

from llava_packing_tower.checkpoint.hashing import tensor_digest
from llava_packing_tower.data.samples import check_pairs
from llava_packing_tower.integrations.llava.hosts.llava_next import HOST
from llava_packing_tower.integrations.llava.hosts.llava_v1 import HOST as LLAVA_V1
from llava_packing_tower.train.launcher import make_plan
from llava_packing_tower.utils.errors import UsageError


def with_pairs(folder, **options):
    """The workspace of native runs, with pairs of answers for its photos."""
    config = make_workspace(folder, trainer="dpo", data_path=str(folder / "pairs.json"), **options)
    pairs = [
        {"id": str(n), "image": f"{n}.png", "prompt": "What is in the photo?", "chosen": "cat", "rejected": word}
        for n, word in enumerate(("moon", "cup", "moon", "cup", "moon"))
    ]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    return config


@pytest.mark.parametrize("next_dir", [pytest.param(NEXT, id="llava_next", marks=NEEDS_NEXT)])
def test_train_save_reload_generate(tmp_path, next_dir):
    options = {"mm_packing_min_patches": 8, "mm_packing_max_patches": 40, "per_device_train_batch_size": 2}
    printed = train(with_pairs(tmp_path, learning_rate=1e-3, **options), next_dir)
    losses = [float(loss) for loss in re.findall(r"^step +\d+/2  loss (\S+)", printed, re.MULTILINE)]
    # Before the first step policy and reference are one: the loss is ln 2 and that of the chosen answers.
    assert len(losses) == 2 and losses[0] > 0.69 and losses[1] < losses[0], printed
    output = tmp_path / "llava_llama_packing_native"
    saved = json.loads((output / "config.json").read_text())
    assert saved["image_aspect_ratio"] == "native" and saved["mm_packing_max_patches"] == 40
    result = reload(output, [tmp_path / "0.png", tmp_path / "6.png"], next_dir)
    assert result["shapes"] == [[3, 56, 84], [3, 112, 56]]
    assert result["answers"] == result["without cache"]
    assert result["tensors"] == json.loads((output / "packing_tower.json").read_text())["tensors"]
    start = load_file(tmp_path / "vit_packing" / "model.safetensors")
    tuned = load_file(output / "model.safetensors")
    moved = [n for n in start if not start[n].equal(tuned[f"model.vision_tower.vision_tower.{n}"].float())]
    assert len(moved) > 20  # the tower is trained by pairs, too


@pytest.mark.long
@pytest.mark.parametrize("next_dir", [pytest.param(NEXT, id="llava_next", marks=NEEDS_NEXT)])
def test_two_ranks(tmp_path, next_dir):
    """DDP from a decoder; from its checkpoint ZeRO-2 and ZeRO-3, where the reference is loaded: one first loss."""
    limits = {"mm_packing_min_patches": 8, "mm_packing_max_patches": 40, "per_device_train_batch_size": 1}
    config = with_pairs(tmp_path, learning_rate=1e-3, **limits)
    start = tmp_path / "llava_llama_packing_ddp"
    first = {}
    for kind in ("ddp", "zero2", "zero3"):
        output = tmp_path / f"llava_llama_packing_{kind}"
        words = [] if kind == "ddp" else ["--deepspeed", f"{kind}.json", "--model_name_or_path", str(start)]
        printed = train_ranks(config, output, next_dir, *words)
        engine = "DistributedDataParallel" if kind == "ddp" else f"DeepSpeedEngine, ZeRO stage {kind[-1]}"
        assert f"engine: {engine}, world size 2, backend gloo" in printed, printed
        steps = json.loads((output / "trainer_state.json").read_text())["log_history"]
        first[kind] = steps[0]["loss"]
        assert steps[0]["rewards/chosen"] == steps[0]["rewards/rejected"] == 0  # policy and reference are one
        assert steps[1]["rewards/chosen"] != 0
        trained = json.loads((output / "packing_tower.json").read_text())["tensors"]  # in memory at the end
        saved = load_file(output / "model.safetensors")
        word = "model.vision_tower.vision_tower."
        digests = {n.removeprefix(word): tensor_digest(t) for n, t in saved.items() if n.startswith(word)}
        assert digests == trained
        before = load_file(start / "model.safetensors" if kind != "ddp" else tmp_path / "vit_packing/model.safetensors")
        before = {name.removeprefix(word): tensor for name, tensor in before.items()}
        moved = [n for n in trained if not before[n].bfloat16().equal(saved[word + n].bfloat16())]
        assert len(moved) > 20
    assert first["zero2"] == pytest.approx(first["zero3"], abs=1e-3)


@pytest.mark.parametrize("next_dir", [pytest.param(NEXT, id="llava_next", marks=NEEDS_NEXT)])
def test_a_reference_with_a_projector_of_its_own_is_refused(tmp_path, next_dir, monkeypatch):
    """Under ZeRO-3 LLaVA-NeXT loads the reference by itself: a decoder without a projector gives it another one."""
    monkeypatch.setenv("LLAVA_NEXT_DIR", next_dir)
    config = with_pairs(tmp_path)
    with pytest.raises(UsageError, match=r"llama_tiny has no projector: each would get random weights"):
        make_plan(config, ["--deepspeed", "zero3.json"], num_processes=2)
    assert make_plan(config, ["--deepspeed", "zero2.json"], num_processes=2).zero_stage == 2


@pytest.mark.parametrize("next_dir", [pytest.param(NEXT, id="llava_next", marks=NEEDS_NEXT)])
def test_data_that_are_no_pairs_are_refused_before_the_run(tmp_path, next_dir, monkeypatch):
    monkeypatch.setenv("LLAVA_NEXT_DIR", next_dir)
    config = with_pairs(tmp_path)
    with pytest.raises(UsageError, match=r"data\.json: 8 of 8 samples are no pairs of answers"):
        make_plan(config, ["--data_path", str(tmp_path / "data.json")])
    with pytest.raises(UsageError, match="mm_packing_batch_tokens 300 cannot be kept with trainer: dpo"):
        make_plan(config, ["--mm_packing_batch_tokens", "300"])
    plan = make_plan(config)
    assert plan.environment["LLAVA_PACKING_TRAINER"] == "dpo" and "trainer" not in plan.values


def test_what_is_a_pair():
    pair = {"prompt": "?", "chosen": "yes", "rejected": "no", "image": "a.png"}
    check_pairs([pair, {**pair, "image": ["a.png"]}])
    for change, message in (
        ({"rejected": None}, "sample 1: no text under rejected"),
        ({"image": ["a.png", "b.png"]}, "sample 1: 2 images, and one <image>"),
        ({"image": None}, "sample 1: 0 images"),
    ):
        with pytest.raises(ValueError, match=message):
            check_pairs([pair, {**pair, **change}])


def test_only_llava_next_has_it():
    dpo = HOST.with_trainer("dpo")
    assert (dpo.train, dpo.dataset, dpo.trainer.name) == ("train.train_dpo", "DPODataset", "LLaVADPOTrainer")
    assert dpo.refused == () and HOST.with_trainer("sft") == HOST
    with pytest.raises(ValueError, match="LLaVA has no trainer 'dpo', but sft"):
        LLAVA_V1.with_trainer("dpo")
