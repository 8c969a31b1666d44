"""The demo: its data, its small models, its report, and that its checks can fail."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from llava_packing_tower.checkpoint.hashing import differing, tensor_digest
from llava_packing_tower.cli.main import main
from llava_packing_tower.data.sample_photos import PHOTOS, Photo, source_of
from llava_packing_tower.integrations.llava.hosts.llava_v1 import HOST
from llava_packing_tower.tools.demo import pipeline, report, train_process
from llava_packing_tower.tools.demo.dataset import QUESTION, write_dataset
from llava_packing_tower.tools.demo.train_process import Engine
from llava_packing_tower.utils.errors import UsageError

REPOSITORY = Path(__file__).parents[2]


# ---------------------------------------------------------------- data


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the demo went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_dataset_is_made_of_real_photos_of_many_sizes_without_a_download(tmp_path, offline):
    made = write_dataset(tmp_path / "data" / "photos.json", tmp_path / "pictures")
    entries = json.loads((tmp_path / "data" / "photos.json").read_text())
    assert len(made) == len(entries) >= 10
    assert len({size for _, size in made}) >= 10
    ratios = [width / height for _, (width, height) in made]
    assert min(ratios) < 0.9 and max(ratios) > 2.5
    for entry, (photo, size) in zip(entries, made):
        assert entry["image"] == photo.name
        with Image.open(tmp_path / "pictures" / entry["image"]) as image:
            assert image.size == size
            # A photograph, not a drawing or a flat area: many grey levels.
            assert len(np.unique(np.asarray(image.convert("L")))) > 100
        human, gpt = entry["conversations"]
        assert human == {"from": "human", "value": f"<image>\n{QUESTION}"}
        assert gpt == {"from": "gpt", "value": photo.answer}


def test_answers_are_single_distinct_words():
    answers = [photo.answer for photo in PHOTOS]
    assert len(set(answers)) == len(answers) == len({photo.name for photo in PHOTOS})
    assert all(answer.isalpha() and answer.islower() for answer in answers)


def test_missing_package_and_missing_photo_are_named():
    with pytest.raises(FileNotFoundError, match="no_such_package is not installed"):
        source_of(Photo("no_such_package", "data/cat.png", "cat"))
    with pytest.raises(FileNotFoundError, match=r"does not contain nothing\.png"):
        source_of(Photo("skimage", "data/nothing.png", "nothing"))


def test_a_failed_copy_leaves_nothing(tmp_path, monkeypatch):
    def half(source, target):
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("llava_packing_tower.tools.demo.dataset.shutil.copyfile", half)
    with pytest.raises(OSError, match="disk full"):
        write_dataset(tmp_path / "photos.json", tmp_path / "images")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# ---------------------------------------------------------------- models


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    models = pytest.importorskip("llava_packing_tower.tools.demo.tiny_models")
    prompts = [f"A chat. USER: \n{QUESTION} ASSISTANT: {photo.answer}</s>" for photo in PHOTOS]
    return models.make_tokenizer(tmp_path_factory.mktemp("tokenizer"), prompts, [photo.answer for photo in PHOTOS])


def test_tokenizer_has_one_token_per_answer_and_reads_anything(tokenizer):
    answers = [tokenizer.tokenize(photo.answer) for photo in PHOTOS]
    assert all(len(tokens) == 1 for tokens in answers), answers
    text = "Привет, ~{}^ 你好"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True).strip() == text


def test_token_counts_add_up_as_llava_counts_them(tokenizer):
    """LLaVA masks the question with len(tokens up to the answer) - 2 and drops samples where its sums do not fit."""
    for photo in PHOTOS:
        question = f"A chat. USER: \n{QUESTION} ASSISTANT: "
        whole = tokenizer(question + photo.answer).input_ids
        start = 1 + len(tokenizer(question).input_ids) - 2
        assert tokenizer.convert_ids_to_tokens(whole[start:]) == ["▁" + photo.answer]


def test_models_are_random_by_seed_and_the_tower_has_no_untrained_part(tmp_path):
    from safetensors.torch import load_file

    from llava_packing_tower.tools.demo.tiny_models import make_decoder, make_tower

    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        make_tower(tmp_path / f"tower_{name}", seed)
        make_decoder(tmp_path / f"llama_{name}", 512, seed)
    for kind in ("tower", "llama"):
        a, b, c = (load_file(tmp_path / f"{kind}_{name}" / "model.safetensors") for name in "abc")
        assert all(torch.equal(a[key], b[key]) for key in a)
        assert not all(torch.equal(a[key], c[key]) for key in a)
    # Nothing after the last hidden state: LLaVA does not read it, so it would never be trained.
    assert not [
        key
        for key in load_file(tmp_path / "tower_a" / "model.safetensors")
        if key.startswith(("head", "layernorm_post"))
    ]


# ---------------------------------------------------------------- checks that can fail


def digests(**tensors):
    return {name: tensor_digest(tensor) for name, tensor in tensors.items()}


def flipped(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor with the lowest bit of its last element flipped."""
    copy = tensor.clone()
    copy.view(torch.int16).view(-1)[-1] ^= 1
    return copy


@pytest.fixture
def tower():
    torch.manual_seed(0)
    return {"a": torch.randn(5, 3).bfloat16(), "b": torch.randn(7).bfloat16()}


def test_digest_sees_one_bit_the_dtype_the_shape_and_the_sign_of_zero(tower):
    a = tower["a"]
    assert tensor_digest(a) == tensor_digest(a.t().contiguous().t())
    others = [flipped(a), a.view(torch.int16), a.reshape(3, 5), a.float()]
    assert len({tensor_digest(tensor) for tensor in [a, *others]}) == 5
    assert tensor_digest(torch.tensor(0.0)) != tensor_digest(torch.tensor(-0.0))
    assert differing(digests(a=a, b=a), digests(a=a, c=a)) == ["b", "c"]


def test_reload_check_fails_for_one_bit_a_missing_an_extra_or_no_tensor(tower):
    trained = digests(**tower)
    assert report.check_reload(trained, digests(**tower)).passed
    bad = report.check_reload(trained, digests(a=tower["a"], b=flipped(tower["b"])))
    assert not bad.passed and "1 of 2" in bad.detail and "e.g. b" in bad.detail
    assert not report.check_reload(trained, digests(a=tower["a"])).passed
    assert not report.check_reload(trained, digests(**tower, c=tower["a"])).passed
    assert not report.check_reload({}, {}).passed


def test_trained_check_fails_where_a_tensor_stood_still(tower):
    moved = digests(a=flipped(tower["a"]), b=flipped(tower["b"]))
    assert report.check_trained(digests(**tower), moved).passed
    half = report.check_trained(digests(**tower), digests(a=tower["a"], b=flipped(tower["b"])))
    assert not half.passed and "1 of 2" in half.detail and "e.g. a" in half.detail
    assert not report.check_trained(digests(a=tower["a"]), moved).passed
    assert not report.check_trained({}, {}).passed


def rows(right: int, wrong: int) -> list[report.Row]:
    answers = [f"word{i}" for i in range(right + wrong)]
    said = answers[:right] + ["something else"] * wrong
    return [report.Row(f"{a}.png", 30 + i, 20, (2, 3), 6, a, "?", s) for i, (a, s) in enumerate(zip(answers, said))]


@pytest.mark.parametrize(
    ("right", "wrong", "passed"), [(16, 0, True), (13, 3, True), (12, 4, False), (4, 1, True), (0, 0, False)]
)
def test_four_fifths_of_the_answers_must_be_right(right, wrong, passed):
    assert report.check_answers(rows(right, wrong)).passed is passed


def test_what_counts_as_the_same_answer():
    assert report.same_answer(" Moon.\n", "moon")
    assert not report.same_answer("moon rocket", "moon")
    assert not report.same_answer("", "moon")


def test_engine_check_needs_deepspeed_its_stage_and_every_process():
    wanted = Engine("DeepSpeedEngine", 2, 2)
    real = train_process.read_engine("engine: DeepSpeedEngine, ZeRO stage 2, world size 2, backend gloo\n")
    assert report.check_engine(real, wanted).passed
    for line in (
        "engine: DistributedDataParallel, world size 2, backend gloo",
        "engine: DeepSpeedEngine, ZeRO stage 3, world size 2, backend gloo",
        "engine: DeepSpeedEngine, ZeRO stage 2, world size 1, backend gloo",
        "",
    ):
        assert not report.check_engine(train_process.read_engine(line), wanted).passed


def test_engine_line_is_the_one_that_training_prints():
    from llava_packing_tower.train.callbacks import check_engine

    line = check_engine(torch.nn.Linear(1, 1), None)
    assert train_process.read_engine(line) == Engine("Linear", None, 1)


# ---------------------------------------------------------------- running the launcher


def test_progress_lines_are_the_ones_that_training_prints(capsys):
    from llava_packing_tower.train.callbacks import Progress

    progress = Progress()
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=120)
    progress.on_train_begin(None, state, None)
    state.global_step = 7
    progress.on_log(None, state, None, logs={"loss": 3.0241, "learning_rate": 1.9e-3})
    assert train_process.read_step(capsys.readouterr().out) == (7, 3.0241)
    assert train_process.read_step("{'loss': 3.0241, 'epoch': 7.0}") is None


def script(tmp_path: Path, text: str) -> list[str]:
    file = tmp_path / "launcher.py"
    file.write_text(text)
    return [sys.executable, "-u", str(file)]


def quiet():
    return Console(file=io.StringIO())


ENGINE = "print('engine: DeepSpeedEngine, ZeRO stage 2, world size 2, backend gloo')\n"


def test_launch_collects_steps_and_engine_and_keeps_the_log(tmp_path):
    code = ENGINE + "for i in range(1, 4): print(f'step {i}/3  loss {4 / i:.4f}  lr 1.0e-03  0:01 left')"
    done = train_process.launch(script(tmp_path, code), 3, tmp_path / "logs" / "train.log", quiet())
    assert done == ([(1, 4.0), (2, 2.0), (3, 1.3333)], Engine("DeepSpeedEngine", 2, 2))
    assert (tmp_path / "logs" / "train.log").read_text().count("\n") == 4


def test_launch_fails_with_the_cause_or_when_steps_are_missing(tmp_path):
    code = "import sys\nprint('[rank1]: ValueError: 1 is wrong')\nprint('torchrun says a lot')\nsys.exit(3)"
    with pytest.raises(train_process.TrainingFailed, match=r"(?s)exit status 3.*ValueError: 1 is wrong") as caught:
        train_process.launch(script(tmp_path, code), 3, tmp_path / "log", quiet())
    assert "torchrun" not in str(caught.value)
    one = "print('step 1/3  loss 2.0')"
    with pytest.raises(train_process.TrainingFailed, match="3 steps were requested, 1 were reported"):
        train_process.launch(script(tmp_path, one), 3, tmp_path / "log", quiet())


@pytest.mark.parametrize(("words", "seed"), [(["--seed", "7"], 7), (["--seed=9"], 9), ([], 42)])
def test_the_seed_is_set_before_the_host_makes_its_projector(monkeypatch, words, seed):
    from llava_packing_tower.integrations.llava import install, registry
    from llava_packing_tower.train import entrypoint

    seen = []

    class Trainer:
        def _save_checkpoint(self):
            pass

        def train(self):
            pass

    host = SimpleNamespace(
        __name__="llava.train.train",
        LLaVATrainer=Trainer,
        train=lambda attn_implementation: seen.append(torch.initial_seed()),
    )
    monkeypatch.setattr(install, "apply", lambda: None)
    monkeypatch.setattr(registry, "find_host", lambda *_: SimpleNamespace(host=HOST))
    monkeypatch.setattr(entrypoint, "import_module", lambda name: host)
    monkeypatch.setattr(sys, "argv", ["train", *words])
    torch.manual_seed(0)
    entrypoint.main()
    assert seen == [seed]


# ---------------------------------------------------------------- plan and output folder


def plan_for(output: str, *words: str) -> pipeline.Plan:
    return pipeline.make_plan(REPOSITORY / "configs" / "demo.yaml", Path(output), words)


def test_config_selects_the_packing_tower_and_trains_it_under_zero_2():
    plan = plan_for("demo_output")
    assert "packing" in plan.values["vision_tower"]
    assert "mm_vision_tower" in plan.values["mm_tunable_parts"].split(",")
    assert plan.engine == Engine("DeepSpeedEngine", 2, plan.processes)
    assert plan.overrides == ()


def test_other_output_folder_moves_every_path(tmp_path):
    plan = plan_for(str(tmp_path), "--max_steps", "7", "--seed=5")
    assert all(plan.path(name).is_relative_to(tmp_path) for name in pipeline.PATHS)
    command = plan.train_command()
    assert command[command.index("--data_path") + 1] == str(tmp_path / "data" / "photos.json")
    assert (plan.steps, plan.seed) == (7, 5)


def test_paths_elsewhere_and_folders_of_others_are_refused(tmp_path):
    with pytest.raises(UsageError, match="output_dir: elsewhere must be inside"):
        plan_for(str(tmp_path), "--output_dir", "elsewhere")
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(UsageError, match="was not made by this demo"):
        pipeline.clear(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "dear"


@pytest.mark.skipif(find_spec("llava") is None, reason="LLaVA is not installed")
@pytest.mark.parametrize(
    ("words", "said"), [(["--max_steps", "x"], "max_steps: expected"), (["--nope", "3"], "'nope'")]
)
def test_mistakes_are_said_before_anything_is_written(tmp_path, capsys, words, said):
    assert main(["demo", "--output", str(tmp_path / "out"), *words]) == 2
    assert said in (text := capsys.readouterr().err) and text.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_own_output_folder_is_emptied(tmp_path):
    folder = tmp_path / "out"
    pipeline.clear(folder)
    (folder / "table.md").write_text("stale")
    pipeline.clear(folder)
    assert [path.name for path in folder.iterdir()] == [pipeline.MARK]


# ---------------------------------------------------------------- tables and pictures


def test_tables_hold_every_photo_check_and_fact(tmp_path):
    table = rows(2, 1)
    table[2] = report.Row("odd.png", 448, 172, (3, 8), 24, "word2", "a|b\n[red]\x1b[0m", "x" * 50)
    checks = [report.check_answers(table), report.Check("reload", True, "fine")]
    report.write_tables(tmp_path, table, checks, {"host": "LLaVA 9"})
    content = json.loads((tmp_path / "table.json").read_text())
    assert [photo["right"] for photo in content["photos"]] == [True, True, False]
    assert content["photos"][2]["patches"] == 24 and content["photos"][2]["after"] == "x" * 50
    text = (tmp_path / "table.md").read_text()
    assert "FAILED: answers: 2 of 3 right" in text and "passed: reload: fine" in text and "host: LLaVA 9" in text
    line = next(line for line in text.splitlines() if "448x172" in line)
    assert (
        "| 3x8=24 | 24 |" in line
        and "\x1b" not in line
        and line.replace("\\|", "").count("|") == len(report.COLUMNS) + 1
    )


def test_rich_table_prints_what_models_write_as_text():
    console = Console(width=80, record=True, file=io.StringIO())
    row = report.Row("hubble_deep_field.png", 1411, 1411, (5, 11), 55, "photographer", "[/x] [red]", "[bold] and so on")
    console.print(report.rich_table([row]))
    text = console.export_text()
    assert "[/x] [..." in text and "[bold] an..." in text and "photographer" in text
    assert "hubble_deep_field" in text and "1411x1411" in text and "5x11=55" in text and " 55 " in text


def test_apart_keeps_every_patch_in_its_place():
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    canvas = report.apart(pixels, 2, gap=1)
    assert canvas.shape == (5, 8, 3)
    assert (canvas[3:5, 6:8] == pixels[2:4, 4:6]).all() and (canvas[0:2, 3:5] == pixels[0:2, 2:4]).all()
    assert (canvas[2] == 255).all() and (canvas[:, 5] == 255).all()


def test_pictures_are_pngs_and_bad_input_is_refused(tmp_path):
    report.draw_loss(tmp_path / "loss.png", [(1, 4.0), (2, 2.0)])
    pixels = np.random.default_rng(0).integers(0, 255, (28, 42, 3), dtype=np.uint8)
    report.draw_grid(tmp_path / "grid.png", Image.new("L", (90, 60)), pixels, 14, "photo")
    for name in ("loss.png", "grid.png"):
        with Image.open(tmp_path / name) as image:
            image.load()
            assert image.format == "PNG" and min(image.size) > 300
    with pytest.raises(ValueError, match="28 x 41"):
        report.draw_grid(tmp_path / "no.png", Image.new("L", (9, 6)), pixels[:, :41], 14, "photo")
    with pytest.raises(ValueError, match="no step"):
        report.draw_loss(tmp_path / "no.png", [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "loss.png"]


def test_the_hub_is_off_before_its_library_is_imported(monkeypatch):
    """LLaVA-NeXT's conversations ask it for a tokenizer, when they are imported, with five retries."""
    seen = []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(pipeline, "run_demo", lambda *_: seen.append(os.environ.get("HF_HUB_OFFLINE")) or 0)
    assert main(["demo"]) == 0 and seen == ["1"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert main(["demo"]) == 0 and seen == ["1", "0"]
    code = "import sys, llava_packing_tower.cli.main, llava_packing_tower.cli.demo as demo\n"
    code += "print('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
