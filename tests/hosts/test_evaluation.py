"""Evaluation without a model: groups, generation arguments, results, reports, causes, what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from llava_packing_tower.checkpoint.folder_hash import identity
from llava_packing_tower.cli.eval_report import names_of
from llava_packing_tower.cli.main import main
from llava_packing_tower.data.sample_photos import PHOTOS
from llava_packing_tower.eval import preflight, results, runner, task_groups
from llava_packing_tower.eval.tasks import FOLDER
from llava_packing_tower.tools.demo.dataset import QUESTION
from llava_packing_tower.utils.errors import UsageError

REPOSITORY = Path(__file__).parents[2]


def test_groups_expand_in_order_and_once():
    assert task_groups.expand("smoke, mme,image")[:3] == ["smoke", "mme", "ai2d"]
    assert len(task_groups.expand("image,mme")) == 11 and len(task_groups.expand("video")) == 8
    with pytest.raises(ValueError, match="groups: image, video, smoke"):
        task_groups.expand(" , ")


def test_smoke_asks_about_the_photos_of_the_demo():
    lines = [json.loads(line) for line in (FOLDER / "smoke" / "photos.jsonl").read_text().splitlines()]
    assert lines == [{"photo": p.name, "question": QUESTION, "answer": p.answer} for p in PHOTOS]


def test_the_entry_point_is_light():
    """lmms-eval loads it for every model: no torch, no LLaVA."""
    code = "import sys; from llava_packing_tower import evaluation; print({'torch', 'llava'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_identity_sees_weights_configuration_and_base_but_no_training_files(tmp_path):
    for name in ("model", "base"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    model, base = tmp_path / "model", tmp_path / "base"
    seen = [identity(model)]
    (model / "trainer_state.json").write_text("{}")
    (model / "training_args.bin").write_bytes(b"x")
    assert identity(model) == seen[0] and seen[0].startswith("w")
    (model / "model.safetensors").write_bytes(b"weightz")
    seen.append(identity(model))
    (model / "config.json").write_text('{"a": 1}')
    seen += [identity(model), identity(model, base)]
    (base / "model.safetensors").write_bytes(b"other")
    seen.append(identity(model, base))
    assert len(set(seen)) == len(seen)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        identity(tmp_path)


# ---------------------------------------------------------------- generation arguments


@pytest.mark.parametrize(
    ("given", "options", "ends"),
    [
        ({}, {"max_new_tokens": 1024, "num_beams": 1, "do_sample": False}, []),
        (
            {"temperature": 0, "top_p": None, "do_sample": True, "until": ["\n\n", "A"]},
            {"max_new_tokens": 1024, "num_beams": 1, "do_sample": False},
            ["A"],
        ),
        (
            {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 5, "until": "x"},
            {"max_new_tokens": 5, "num_beams": 1, "do_sample": True, "top_p": 0.9, "temperature": 0.7},
            ["x"],
        ),
        ({"do_sample": True}, {"max_new_tokens": 1024, "num_beams": 1, "do_sample": True, "temperature": 1.0}, []),
        ({"num_beams": 3, "top_k": 4}, {"max_new_tokens": 1024, "num_beams": 3, "do_sample": False}, []),
    ],
)
def test_generation_arguments(given, options, ends):
    module = pytest.importorskip("llava_packing_tower.eval.models.llava_packing", exc_type=ImportError)
    assert module.generation_options(given) == (options, ends)
    assert module.cut("one two three", ["three", "tw"]) == "one " and module.cut("one", ["x"]) == "one"


# ---------------------------------------------------------------- results


def write(folder: Path, stamp: int, task_values: dict, counts: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"2026010{stamp}_000000_results.json"
    file.write_text(json.dumps({"results": task_values, "n-samples": counts}))
    os.utime(file, (stamp, stamp))
    return file


MME = {"mme_perception,none": 1480.25, "mme_perception_stderr,none": "N/A", "mme_cognition,none": 301.0, "alias": "m"}


def test_numbers_are_read_with_their_errors_and_counts(tmp_path):
    counts = {"mme": {"original": 2374, "effective": 100}, "a_sub": {"effective": 3}, "b_sub": {"effective": 4}}
    file = write(tmp_path, 1, {"mme": MME}, {"mme": counts["mme"]})
    result = results.read_task(file, "mme")
    assert result.metrics == {"mme_perception": (1480.25, None), "mme_cognition": (301.0, None)}
    assert result.samples == 100
    parts = {"a_sub": {"acc,none": 0.5, "acc_stderr,none": 0.1}, "b_sub": {"acc,strict": 1.0, "acc,none": float("nan")}}
    file = write(tmp_path, 2, {"group": {" ": " "}, **parts}, {k: counts[k] for k in ("a_sub", "b_sub")})
    result = results.read_task(file, "group")
    assert result.metrics == {"a_sub/acc": (0.5, 0.1), "b_sub/acc (strict)": (1.0, None)} and result.samples == 7


def test_reports_compare_folders_and_the_newest_result_counts(tmp_path, capsys):
    for run, value in (("a", 0.25), ("b", 0.75)):
        folder = tmp_path / run / "model"
        write(
            folder,
            3,
            {"smoke": {"exact_match,none": value, "exact_match_stderr,none": 0.1}},
            {"smoke": {"effective": 16}},
        )
        write(folder, 1, {"smoke": {"exact_match,none": 0.99}}, {"smoke": {"effective": 16}})
    write(tmp_path / "b", 2, {"mme": MME}, {"mme": {"effective": 9}})
    out = tmp_path / "both"
    assert main(["eval-report", str(tmp_path / "a"), str(tmp_path / "b"), "--output_path", str(out)]) == 0
    text = (out / "results.md").read_text()
    assert "| smoke | exact_match | 16 | 0.25 ± 0.1 | 0.75 ± 0.1 |" in text
    assert "| mme | mme_perception | 9 | - | 1480 |" in text
    assert text in capsys.readouterr().out
    with Image.open(out / "results.png") as chart:
        chart.load()
        assert chart.format == "PNG"
    assert main(["eval-report", str(out)]) == 2
    assert "has no results of lmms-eval" in capsys.readouterr().err


def test_runs_are_named_so_that_they_can_be_told_apart():
    assert names_of([Path("/x/a/run"), Path("/x/b/run")]) == ["a/run", "b/run"]
    with pytest.raises(UsageError, match="twice"):
        names_of([Path("a"), Path("a/")])


def test_failed_tasks_stand_in_the_table():
    run = {
        "x": results.TaskResult("x", error="ValueError: a|b\nc"),
        "y": results.TaskResult("y", {"m": (1.0, None)}, 2),
    }
    text = results.markdown({"run": run})
    assert "| x | - | - | FAILED |" in text and "x failed: ValueError: a|b c" in text and "| y | m | 2 | 1 |" in text


# ---------------------------------------------------------------- running


def test_the_cause_is_the_exception_itself():
    log = """Traceback (most recent call last):
datasets.exceptions.DatasetNotFoundError: Dataset 'x' doesn't exist on the Hub
The above exception was the direct cause
tenacity.RetryError: RetryError[<Future at 0x7f state=finished raised DatasetNotFoundError>]
\x1b[31mERROR   Error during evaluation: RetryError[<Future>]. Please set `--verbosity=DEBUG` to get more information.
"""
    assert runner.cause(log) == "datasets.exceptions.DatasetNotFoundError: Dataset 'x' doesn't exist on the Hub"
    log = "[rank1]: ValueError: the tower:\n[rank1]:   2 not in the checkpoint: a, b\ntorch...ChildFailedError: \n"
    assert runner.cause(log) == "ValueError: the tower:; 2 not in the checkpoint: a, b"
    assert runner.cause("ImportError: \n\nX needs Y\nand more\n") == "ImportError: X needs Y"
    assert runner.cause("nothing known\nlast words\n") == "last words" and runner.cause("") == "no output"


class Pretended(runner.Evaluation):
    """An evaluation whose lmms-eval is a script."""

    def command(self, task: str) -> list[str]:
        return [sys.executable, "-c", self.rest[0], str(self.output / task)]


WRITES = """
import json, os, sys
os.makedirs(sys.argv[1] + "/m", exist_ok=True)
values = {"smoke": {"exact_match,none": 0.5}}
json.dump({"results": values, "n-samples": {"smoke": {"effective": 2}}}, open(sys.argv[1] + "/m/1_results.json", "w"))
"""


def test_only_a_fresh_result_counts_whatever_the_exit_status(tmp_path):
    pytest.importorskip("lmms_eval")
    console, arguments = Console(quiet=True), {"pretrained": "x", "weights": "w1"}
    good = runner.run_task(Pretended(arguments, tmp_path, rest=(WRITES,)), "smoke", console)
    assert good.error is None and good.headline() == "exact_match 0.5, 2 samples"
    lies = Pretended(arguments, tmp_path, rest=("print('KeyError: 3')",))
    again = runner.run_task(lies, "smoke", console)
    assert again.error.startswith("KeyError: 3 (exit status 0") and not again.metrics
    # The old result lies there still, but is no longer taken for this run's.
    assert not (tmp_path / "smoke" / results.DONE).exists()
    empty = WRITES.replace("1_results", "2_results").replace('"exact_match,none": 0.5', "")
    assert "has no number" in runner.run_task(Pretended(arguments, tmp_path, rest=(empty,)), "smoke", console).error


def test_done_is_what_has_the_same_weights_task_options_and_versions(tmp_path, monkeypatch):
    def key(**changes: object) -> str:
        values = {"weights": "w1", "limit": None, "rest": (), "task": "smoke", **changes}
        arguments = {"pretrained": values.get("path", "x"), "weights": values["weights"]}
        return runner.Evaluation(arguments, tmp_path, limit=values["limit"], rest=values["rest"]).key(values["task"])

    same = key()
    assert key(path="elsewhere") == same
    changed = [key(weights="w2"), key(limit="3"), key(rest=("--gen_kwargs", "a=1")), key(task="mme")]
    monkeypatch.setattr(runner, "installed", lambda name: "9")
    changed.append(key())
    assert len({same, *changed}) == 6
    with pytest.raises(ValueError, match="comma or an equals sign"):
        runner.Evaluation({"pretrained": "a,b"}, tmp_path)


def test_processes_and_own_tasks_are_in_the_command(tmp_path):
    evaluation = runner.Evaluation({"pretrained": "x"}, tmp_path, processes=2, on_cpu=True, include="mine", limit="4")
    words = " ".join(evaluation.command("smoke"))
    assert "--nproc_per_node=2" in words and "-m lmms_eval --model llava_packing --model_args pretrained=x" in words
    assert f"--include_path {FOLDER}" in words and "--device cpu" in words and "--limit 4" in words
    assert "--include_path mine" in " ".join(evaluation.command("other"))


def test_what_is_missing_is_named_with_its_installation(monkeypatch):
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps lmms-eval=="):
        preflight.check_installation()
    monkeypatch.setattr(preflight, "find_spec", lambda name: None if name == "pytablewriter" else object())
    monkeypatch.setattr(preflight, "unmet", lambda name: [("transformers>=4.50", "4.40.2"), ("numpy<1", "2.0")])
    monkeypatch.setattr(preflight, "impossible", lambda run: ["accelerate is too new:\n  pip install accelerate==1"])
    monkeypatch.setattr(preflight, "filelock", lambda: ["filelock is too new"])
    with pytest.raises(ValueError) as caught:
        preflight.check_installation()
    text = str(caught.value)
    assert "pip install pytablewriter" in text and "pip install 'transformers>=4.50'" in text
    assert "accelerate is too new" in text and "filelock is too new" in text and "numpy" not in text


def test_lmms_eval_without_entry_points_gets_the_plugin_variable(monkeypatch):
    monkeypatch.setenv("LMMS_EVAL_PLUGINS", "theirs")
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    assert preflight.plugin_environment() == {"LMMS_EVAL_PLUGINS": "theirs,llava_packing_tower.eval"}


def test_wrong_words_cost_nothing(tmp_path, capsys):
    for words, message in (
        (["--tasks", "smoke", "--model", "llava"], "--model is set by this command"),
        (["--tasks", "smoke", "--num_gpus", "1", "--num_processes", "2"], "for runs on the CPU"),
        (["--tasks", "smoke", "--num_gpus", "99"], "this machine has"),
        (["--tasks", "smoke", "--batch_size", "0"], "must be at least 1"),
        (["--tasks", ","], "no task is given"),
    ):
        assert main(["eval", str(tmp_path), *words]) == 2
        assert message in capsys.readouterr().err


def test_the_script_names_its_usage_and_fills_in_the_tasks(tmp_path):
    script = REPOSITORY / "train_scripts" / "eval_lmms.sh"
    (tmp_path / "llava-packing").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "llava-packing").chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}

    def run(*words: str, **more: str) -> subprocess.CompletedProcess:
        return subprocess.run(["bash", script, *words], env={**env, **more}, capture_output=True, text=True)

    assert run().returncode == 2 and "CHECKPOINT" in run().stderr
    assert run("ck", "--limit", "3").stdout.split() == ["eval", "ck", "--tasks", "image", "--limit", "3"]
    assert run("ck", TASKS="a,b").stdout.split() == ["eval", "ck", "--tasks", "a,b"]
    assert run("ck", "--tasks", "video").stdout.split() == ["eval", "ck", "--tasks", "video"]
