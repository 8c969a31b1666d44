"""`llava-packing run`: LLaVA's own evaluation scripts, unchanged, on a checkpoint with a packing tower."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec

import pytest
from fork_layouts import LAYOUTS, write
from host_runs import REPOSITORY, environment, execute

from llava_packing_tower.cli.run import command
from llava_packing_tower.data.sample_photos import PHOTOS
from llava_packing_tower.tools.demo.dataset import QUESTION
from llava_packing_tower.utils.errors import UsageError

ENTRY = ["-m", "llava_packing_tower.run"]


def test_the_hook_goes_in_front_of_modules_and_scripts():
    here = sys.executable
    assert command(["--", "python", "-m", "llava.eval.model_vqa", "--x", "1"]) == [
        *(here, *ENTRY),
        *("-m", "llava.eval.model_vqa", "--x", "1"),
    ]
    assert command(["python3", "-u", "a.py", "-m"]) == [here, "-u", *ENTRY, "a.py", "-m"]
    assert command(["a.py"]) == [here, *ENTRY, "a.py"]
    assert command(["/opt/p/bin/python3.11", "a.py"]) == ["/opt/p/bin/python3.11", *ENTRY, "a.py"]


@pytest.mark.parametrize("words", [[], ["--"], ["bash", "a.sh"], ["python"], ["python", "-m"], ["python", "-c", "1"]])
def test_what_cannot_have_the_hook_is_refused(words):
    with pytest.raises(UsageError, match=r"llava\.eval\.model_vqa"):
        command(words)


def test_a_script_runs_as_main_with_its_arguments_and_status(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch, beside\nfrom llava_packing_tower.integrations import llava as hosts\n"
        "assert __name__ == '__main__' and hosts.is_active() and beside.HERE\n"
        "kept = torch.nn.Linear(1, 1).to('cuda:0', torch.float64)\n"
        "sent = torch.ones(2).to(device=torch.device('cuda'), dtype=torch.half, non_blocking=True)\n"
        "assert sent.device.type == 'cpu' and sent.dtype == torch.half\n"
        "assert kept.weight.device.type == 'cpu' and kept.weight.dtype == torch.float64\n"
        "assert torch.ones(1).to('meta').is_meta and torch.ones(1).to(torch.int8).dtype == torch.int8\n"
        "print(sys.argv[1:], torch.ones(2).cuda().sum().item())\nsys.exit(7)\n"
    )
    (tmp_path / "beside.py").write_text("HERE = True\n")
    words = ["run", "--", "python", str(script), "-m", "--flag", "x y"]
    result = execute([sys.executable, "-m", "llava_packing_tower", *words], environment(""))
    assert result.returncode == 7, result.stderr
    assert result.stdout.strip() == "['-m', '--flag', 'x y'] 2.0"
    result = execute([sys.executable, *ENTRY, str(tmp_path / "missing.py")], environment(""))
    assert result.returncode != 0 and "missing.py: no such file" in result.stderr


@pytest.mark.parametrize("module", [False, pytest.param(True, marks=pytest.mark.long)])
def test_the_llava_is_that_of_llava_next_dir(tmp_path, module):
    """Another one may be installed: the script would run with that, without a word."""
    clone, scripts = tmp_path / "LLaVA-NeXT", tmp_path / "scripts"
    write(LAYOUTS["llava_v1"], clone)
    scripts.mkdir()
    (scripts / "where.py").write_text("import llava\nprint(llava.__file__)\n")
    words = ["-m", "where"] if module else [str(scripts / "where.py")]
    env = {**environment(str(clone)), "PYTHONPATH": f"{REPOSITORY}:{scripts}"}
    result = execute([sys.executable, *ENTRY, *words], env)
    assert result.stdout.strip() == str(clone / "llava" / "__init__.py"), result.stderr


STARTED = """
def train():
    import sys
    from dataclasses import fields
    from types import SimpleNamespace
    from llava_packing_tower import PackingImageProcessor
    names = {field.name for field in fields(ModelArguments)}
    steps = LazySupervisedDataset.__init__._llava_packing_steps
    args = SimpleNamespace(image_processor=PackingImageProcessor(size=56), image_aspect_ratio="native")
    try:
        LazySupervisedDataset([{"id": 1, "image": "a.png", "positions_thw": "a.npy"}], None, args)
    except ValueError as error:
        print(error)
    print(__name__, sys.argv[1:], "mm_packing_attention" in names, bool(steps))

if __name__ == "__main__":
    train()
"""


@pytest.mark.parametrize("as_script", [False, True])
def test_a_train_file_of_a_fork_gets_the_arguments_and_steps(tmp_path, as_script):
    """Run as `__main__` it would train without them: the hook changes what is imported. Positions have no way in."""
    file = write(LAYOUTS["geochat"], tmp_path) / "train" / "train.py"
    file.write_text(file.read_text().replace("def train(): pass\n", "") + STARTED)
    words = [str(file)] if as_script else ["-m", "geochat.train.train"]
    command = [sys.executable, "-m", "llava_packing_tower", "run", "--", "python", *words, "--x", "1"]
    result = execute(command, {**environment(str(tmp_path)), "PYTHONPATH": str(REPOSITORY)})
    refused, printed = result.stdout.strip().splitlines()
    assert printed == "geochat.train.train ['--x', '1'] True True", result.stdout + result.stderr
    assert "1 of 1 samples have positions_thw" in refused and "the models of GeoChat have no argument for" in refused


@pytest.mark.timeout(900)
@pytest.mark.skipif(find_spec("llava") is None, reason="LLaVA is not installed")
@pytest.mark.skipif(
    find_spec("shortuuid") is None, reason="llava.eval.model_vqa imports shortuuid: requirements/eval.txt"
)
@pytest.mark.parametrize("script", ["model_vqa", pytest.param("model_vqa_loader", marks=pytest.mark.long)])
def test_llavas_own_scripts_answer_with_a_packing_tower(demo, tmp_path, script):
    """Unedited, and the checkpoint moved away from the folder of its tower."""
    checkpoint = tmp_path / "llava_llama_moved"
    shutil.copytree(demo.trained, checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    config["mm_vision_tower"] = str(tmp_path / "gone_packing")
    (checkpoint / "config.json").write_text(json.dumps(config))
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "out" / "answers.jsonl"
    lines = [{"question_id": photo.answer, "image": photo.name, "text": QUESTION} for photo in PHOTOS]
    questions.write_text("\n".join(map(json.dumps, lines)))
    words = ["-m", f"llava.eval.{script}", "--model-path", str(checkpoint), "--image-folder", str(demo.images)]
    words += ["--question-file", str(questions), "--answers-file", str(answers), "--conv-mode", "v1"]
    command = [sys.executable, "-m", "llava_packing_tower", "run", "--", "python", *words, "--temperature", "0"]
    result = execute(command, environment(""))
    assert result.returncode == 0, result.stdout + result.stderr
    given = {line["question_id"]: line["text"] for line in map(json.loads, answers.read_text().splitlines())}
    assert len(given) == len(PHOTOS)
    assert sum(text == name for name, text in given.items()) >= 13, given
