"""Towers of several families trained in a real host, one after the other in one process:
``python family_trainings.py JOBS.json``.

A job has ``config`` (a YAML), ``words`` (``--key value``, with ``--output_dir``), ``device`` ("cpu" or "cuda") and
``reload``. ``told.json`` in its output says what its tower was and did, or under "error" how it failed.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import traceback
from importlib import import_module
from pathlib import Path

import warm
from host_runs import environment, importable


def start(jobs: list[dict], folder: Path, next_dir: str, timeout: float) -> dict[str, dict]:
    """What each job told, by its ``name``; or under "error" how the process itself came to an end."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs, default=str))
    helpers = Path(__file__).parent
    path = importable(helpers.parents[1], helpers, helpers.parent)  # (conftest, for host_runs)
    env = {**environment(next_dir), "PYTHONPATH": path}
    result = warm.execute([sys.executable, __file__, str(file)], env, timeout=timeout)
    files = {job["name"]: Path(job["output"], "told.json") for job in jobs}
    ended = {"error": f"exit status {result.returncode}\n{result.stdout[-3000:]}{result.stderr[-5000:]}"}
    return {name: json.loads(told.read_text()) if told.is_file() else ended for name, told in files.items()}


def job(name: str, config: Path, folder: Path, tower: str, device: str, reload: bool, **arguments: object) -> dict:
    """A job for the tower; ``arguments``: of the host. Its output is a folder of LLaVA's name below ``folder``."""
    output = folder / name / "llava_llama"
    output.mkdir(parents=True)
    given = {"mm_vision_tower": tower, "bf16": device == "cuda", **arguments, "output_dir": output}
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    made = {"name": name, "config": config, "words": words, "output": output, "device": device, "reload": reload}
    return {key: value if isinstance(value, (bool, list)) else str(value) for key, value in made.items()}


def _train(given: dict, told: dict) -> None:
    from llava_packing_tower.integrations.llava.packed_step import plan_of
    from llava_packing_tower.integrations.llava.patcher import Patches
    from llava_packing_tower.train import entrypoint
    from llava_packing_tower.train.launcher import make_plan, to_argv

    count = {"num_gpus": 1} if given["device"] == "cuda" else {"num_processes": 1}
    plan = make_plan(given["config"], given["words"], **count)
    sys.argv[1:] = to_argv(plan.values)
    os.environ.update(plan.environment)
    trainer = import_module("llava.train.train").LLaVATrainer
    training_step = trainer.training_step
    told["losses"] = []

    def step(self, model, *args, **kwargs):
        loss = training_step(self, model, *args, **kwargs)
        llava = getattr(model, "module", model)
        tower = llava.get_vision_tower()
        told["losses"].append(float(loss))
        told["tower"], told["family"] = type(tower).__name__, type(tower.vision_tower).__name__
        told["step"] = str(plan_of(llava, Patches()))
        told["paths"] = [part.vision_tower.encoder.last_plan.path for part in tower.encoders().values()]
        for name, parameter in tower.vision_tower.named_parameters():
            told.setdefault("gradients", {})[name] = None if parameter.grad is None else parameter.grad.norm().item()
        return loss

    trainer.training_step = step
    try:
        entrypoint.main()
    finally:
        trainer.training_step = training_step


def _reload(given: dict, told: dict) -> None:
    from llava_packing_tower.checkpoint.hashing import tensor_digest

    builder = import_module("llava.model.builder")
    v1 = "device" in inspect.signature(builder.load_pretrained_model).parameters
    how = {"device": "cpu", "device_map": "cpu"} if v1 else {"attn_implementation": "sdpa", "torch_dtype": "bfloat16"}
    _, model, processor, _ = builder.load_pretrained_model(given["output"], None, "llava_llama", **how)
    tower = model.get_vision_tower()
    told["reloaded"] = [type(tower.vision_tower).__name__, tower.hidden_size, tower.num_patches]
    told["processor"] = [processor.image_mean, processor.image_std, processor.resample, processor.patch_size]
    told["digests"] = {name: tensor_digest(value) for name, value in tower.vision_tower.state_dict().items()}


def main(jobs: list[dict]) -> None:
    from llava_packing_tower.integrations import llava as hosts
    from llava_packing_tower.train import callbacks

    hosts.apply()
    trainers: list = []
    install = callbacks.install

    def install_once(train, patches):
        trainers[:] = trainers or [install(train, patches)]
        return trainers[0]

    callbacks.install = install_once
    for given in jobs:
        told: dict = {}
        try:
            _train(given, told)
            if given["reload"]:
                _reload(given, told)
        except BaseException:
            told["error"] = traceback.format_exc()
        Path(given["output"], "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
