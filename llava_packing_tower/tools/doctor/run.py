"""All checks in order, and how they are printed."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from importlib.util import find_spec

from ...utils.findings import ERROR, WARNING, Finding
from ...utils.versions import (
    NEWEST_RUN,
    Run,
    bucket_sizes_are_fractions,
    filelock,
    impossible,
    install_command,
    installed,
)
from . import checks

# What this package itself imports, by module.
NEEDED = {"einops": "einops", "safetensors": "safetensors", "PIL": "pillow", "numpy": "numpy", "yaml": "pyyaml"}
LOADED = ("torch", "transformers", "accelerate", "peft", "packages")  # topics without which nothing can be tried
PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "tokenizers",
    "huggingface_hub",
    "numpy",
    "peft",
    "flash-attn",
)


def examine(say: Callable[[str], None] = lambda line: None) -> dict[str, object]:
    """Everything, as JSON types. ``say`` gets a line for each part as it is done; about a minute on a CPU.

    Keys: python, versions, host, findings ([{level, topic, text, command}]), ok, and, unless something keeps the
    libraries from being loaded at all: gpus, attention, tower, training_step, collectives, patches, deepspeed.
    """
    report: dict[str, object] = {"python": platform.python_version(), "versions": {p: installed(p) for p in PACKAGES}}
    findings = [*_host(report), *impossible(Run()), *_packages()]
    say(f"host: {report['host'] or 'none'}")
    say("versions: " + ", ".join(f"{name} {v}" for name, v in report["versions"].items() if v))
    if any(
        f.level == ERROR and f.topic in ("transformers", "torch", "accelerate", "peft", "packages") for f in findings
    ):
        return _finished(report, findings)  # nothing could be imported

    findings += _gpus(report)
    say("GPUs: " + (", ".join(report["gpus"]) or "none"))
    backends, found = checks.attention_backends()
    findings += found
    report["attention"] = checks.as_json(backends)
    for backend in backends:
        say(f"attention {backend.name}: " + describe(backend))
    report["tower"], found = checks.tower()
    findings += found
    tower = report["tower"]
    say(f"tower: {tower['dtype']} on {tower['device']}")
    say(f"  inference: {tower['inference']}")
    say(f"  training: {tower['training']}")
    report["training_step"], found = checks.training_step()
    findings += found
    step = report["training_step"]
    say(f"packed decoder: {step['attention'] or 'off (' + step['decoder_reason'] + ')'}")
    say(f"liger-kernel: {step['liger_reason'] or 'RMSNorm, rotary, SwiGLU'}")
    report["collectives"], found = checks.collectives()
    findings += found
    joined = report["collectives"]
    say(f"{joined['backend']} over {joined['processes']} processes: {'works' if joined['works'] else 'FAILS'}")
    if report["host"]:
        result, found = checks.host()
        findings += found + _deepspeed(result, report["gpus"])
        report |= {"patches": result.get("patches", []), "deepspeed": result.get("deepspeed")}
        if result:
            engine = result.get("deepspeed")
            say(f"DeepSpeed: {engine['version']} on {engine['accelerator']}" if engine else "DeepSpeed: not installed")
        for patch in report["patches"]:
            issue = f" ({patch['issue']})" if patch["issue"] else ""
            off = "" if patch["applied"] else " (switched off)"
            say(f"compat patch {patch['name']}{off}: {patch['reason']}{issue}")
    return _finished(report, findings)


def describe(backend: checks.Backend) -> str:
    if not backend.runs:
        return f"not available: {backend.reason}"
    return f"runs{'' if backend.backward else ', forward only'} (differs from eager by {backend.error:.0e})"


def _finished(report: dict[str, object], findings: list[Finding]) -> dict[str, object]:
    report["findings"] = [vars(finding) for finding in findings]
    report["ok"] = not any(finding.level == ERROR for finding in findings)
    return report


def _host(report: dict[str, object]) -> list[Finding]:
    from ...integrations.llava.registry import find_host

    try:
        report["host"] = str(find_host())
    except ValueError as error:
        report["host"] = None
        return [Finding(ERROR, "host", str(error), "pip install --no-deps llava-torch==1.2.2.post1")]
    return []


def _packages() -> list[Finding]:
    from packaging.version import Version

    findings = [
        Finding(ERROR, "packages", f"{name} is not installed", f"pip install {name}")
        for module, name in NEEDED.items()
        if find_spec(module) is None
    ]
    if installed("torch") is None:
        findings.append(Finding(ERROR, "torch", "torch is not installed", "pip install torch"))
    here = installed("transformers")
    if here and Version(here).release[:2] > Version(NEWEST_RUN).release:
        text = f"transformers {here} is newer than {NEWEST_RUN}, the newest tested version"
        findings.append(Finding(WARNING, "versions", text, f"pip install 'transformers<={NEWEST_RUN}.99'"))
    if find_spec("deepspeed") is None:
        text = "DeepSpeed is not installed: no ZeRO"
        findings.append(Finding(WARNING, "deepspeed", text, install_command("deepspeed")))
    elif bucket_sizes_are_fractions():
        text = (
            f"DeepSpeed {installed('deepspeed')} does not accept the bucket sizes that transformers {here} computes "
            "for `auto` under ZeRO-3"
        )
        findings.append(Finding(WARNING, "deepspeed", text, install_command("deepspeed")))
    if find_spec("deepspeed") and installed("accelerate") and Version(installed("accelerate")) >= Version("1.13"):
        text = f"accelerate {installed('accelerate')} cannot run DeepSpeed in several processes on the CPU (GPUs can)"
        findings.append(Finding(WARNING, "accelerate", text, install_command("accelerate")))
    return findings + filelock()


def _gpus(report: dict[str, object]) -> list[Finding]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    report["gpus"] = [torch.cuda.get_device_name(index) for index in range(count)]
    if not count and shutil.which("nvidia-smi"):
        text = (
            f"this machine has nvidia-smi, but torch {torch.__version__} sees no GPU (a CPU build, or another driver)"
        )
        return [Finding(ERROR, "gpu", text, "pip install --force-reinstall torch")]
    return []


def _deepspeed(result: dict[str, object], gpus: list[str]) -> list[Finding]:
    engine = result.get("deepspeed")
    if not engine or not gpus or engine["accelerator"] == "cuda":
        return []
    text = f"DeepSpeed runs on {engine['accelerator']} though there are GPUs"
    return [Finding(ERROR, "deepspeed", text, "unset DS_ACCELERATOR")]
