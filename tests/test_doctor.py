"""`llava-packing doctor`, and what the launcher says, before anything loads, of versions that cannot work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_launch import files, need_a_host  # noqa: F401  (files is a fixture)

from llava_packing_tower import attention, launch
from llava_packing_tower.cli import UsageError, main
from llava_packing_tower.doctor import ERROR, WARNING, examination, probes, versions
from llava_packing_tower.doctor.versions import Run, impossible

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def pretend(monkeypatch):
    """Other versions than the installed ones: ``pretend(accelerate="1.13.0", transformers=None)``."""
    real, fake = versions.version, {}

    def version(distribution: str) -> str:
        if distribution not in fake:
            return real(distribution)
        if fake[distribution] is None:
            raise versions.PackageNotFoundError(distribution)
        return fake[distribution]

    monkeypatch.setattr(versions, "version", version)
    return fake.update


def texts(run: Run = Run()) -> str:  # noqa: B008
    assert all(finding.level == ERROR and finding.command for finding in impossible(run))
    return "\n".join(finding.text for finding in impossible(run))


# ---------------------------------------------------------------- versions


def test_the_versions_of_this_environment_work():
    assert impossible(Run(zero_stage=3, on_cpu=True, processes=2, attention="sdpa")) == []


def test_what_transformers_needs_is_what_is_installed(pretend, monkeypatch):
    needs = ["tokenizers>=0.19,<0.20", "huggingface-hub<1.0", "accelerate>=0.21; extra == 'torch'", "absent>=2"]
    needs += ["numpy<1; python_version < '3'", "deepspeed>=9; extra == 'deepspeed'"]
    monkeypatch.setattr(versions, "requires", lambda distribution: needs)
    pretend(transformers="4.40.2", tokenizers="0.19.1", accelerate="0.34.2", deepspeed="0.14.4", absent=None)
    pretend(**{"huggingface-hub": "0.36.2"})
    assert impossible(Run()) == []
    pretend(**{"huggingface-hub": "1.33.0"})
    assert texts() == "transformers 4.40.2 needs huggingface-hub<1.0, and 1.33.0 is installed"
    assert impossible(Run())[0].command == "pip install 'huggingface-hub<1.0'"
    pretend(accelerate="0.20")
    assert "accelerate>=0.21, and 0.20" in texts()
    assert "deepspeed" not in texts() and "deepspeed>=9, and 0.14.4" in texts(Run(zero_stage=2))


def test_transformers_too_old_or_missing(pretend):
    pretend(transformers="4.37.2")
    assert "transformers 4.37.2 is too old: 4.40 or newer" in texts()
    pretend(transformers=None)
    assert "transformers is not installed" in texts()


def test_a_transformers_that_nobody_tried_is_warned_of(pretend):
    def warned() -> list[str]:
        return [finding.text for finding in examination._packages() if finding.topic == "versions"]

    pretend(transformers=f"{versions.NEWEST_RUN}.7")
    assert warned() == []
    major, minor = versions.NEWEST_RUN.split(".")
    pretend(transformers=f"{major}.{int(minor) + 1}.0")
    assert warned() == [
        f"transformers {major}.{int(minor) + 1}.0 is newer than {versions.NEWEST_RUN}, the newest that was tried"
    ]


def test_the_newest_that_was_tried_is_what_the_matrix_and_the_second_environment_have():
    results = sorted((REPOSITORY / "benchmarks" / "results").glob("host_matrix_*.json"))
    stages: dict[str, set[tuple[str, str]]] = {}
    for cell in json.loads(results[-1].read_text()).values():
        if cell["result"] == "pass":
            stages.setdefault(cell["versions"]["transformers"], set()).add((cell["host"], cell["stage"]))
    newest = max(stages, key=lambda version: [int(part) for part in version.split(".")])
    assert newest.rpartition(".")[0] == versions.NEWEST_RUN and len(stages[newest]) == 6
    pinned = (REPOSITORY / "requirements" / "newest.txt").read_text().splitlines()
    assert any(line.startswith(f"transformers=={newest};") for line in pinned)


def test_accelerate_on_cpu(pretend, monkeypatch):
    monkeypatch.setattr(versions, "requires", lambda distribution: [])
    pretend(accelerate="1.13.0")
    broken = Run(zero_stage=2, on_cpu=True, processes=2)
    assert "accelerate 1.13.0 cannot run DeepSpeed in several processes on the CPU" in texts(broken)
    for fine in ({"on_cpu": False}, {"processes": 1}, {"zero_stage": None}):
        assert impossible(Run(**{**vars(broken), **fine})) == []
    pretend(accelerate="1.12.0")
    assert impossible(broken) == []


@pytest.mark.parametrize(
    ("formula", "rounds", "hidden", "asked", "stage", "wrong"),
    [
        ("0.9 * hidden_size * hidden_size", False, 64, "auto", 3, True),
        ("0.9 * hidden_size * hidden_size", False, 5120, "auto", 3, False),  # 23592960, a whole number
        ("0.9 * hidden_size * hidden_size", False, None, "auto", 3, False),
        ("0.9 * hidden_size * hidden_size", False, 64, 3686, 3, False),
        ("0.9 * hidden_size * hidden_size", False, 64, "auto", 2, False),
        ("0.9 * hidden_size * hidden_size", True, 64, "auto", 3, False),
        ("int(0.9 * hidden_size * hidden_size)", False, 64, "auto", 3, False),
    ],
)
def test_automatic_bucket_size(tmp_path, monkeypatch, formula, rounds, hidden, asked, stage, wrong):
    (tmp_path / "transformers" / "integrations").mkdir(parents=True)
    (tmp_path / "transformers" / "integrations" / "deepspeed.py").write_text(formula)
    (tmp_path / "deepspeed").mkdir()
    if rounds:
        (tmp_path / "deepspeed" / "pydantic_v1.py").write_text("")
    monkeypatch.setattr(versions, "_folder", lambda package: tmp_path / package)
    config = {"zero_optimization": {"stage": stage, "stage3_prefetch_bucket_size": asked}}
    found = versions._automatic_bucket_sizes(Run(zero_stage=stage, deepspeed=config, hidden_size=hidden))
    assert bool(found) == wrong
    if wrong:
        assert "into 3686.4" in found[0].text and "Give 3686" in found[0].text


def test_flash_attention_of_the_decoder(monkeypatch):
    here = {}
    monkeypatch.setattr(versions, "find_spec", here.get)
    assert "flash_attention_2 needs the flash-attn package" in texts(Run(attention="flash_attention_2"))
    here["flash_attn"] = SimpleNamespace(origin=None)  # flash-attn-4 alone
    assert impossible(Run(attention="flash_attention_2"))
    here["flash_attn"] = SimpleNamespace(origin="flash_attn/__init__.py")
    assert impossible(Run(attention="flash_attention_2")) == []
    assert impossible(Run(attention="sdpa")) == []


def test_the_launcher_refuses_before_anything_loads(files, pretend, monkeypatch):  # noqa: F811
    monkeypatch.setattr(launch, "_gpus", lambda: 0)
    monkeypatch.setattr(versions, "find_spec", lambda name: None)
    file = files(attn_implementation="flash_attention_2")
    with pytest.raises(UsageError, match=r"cannot run this:\n.*flash-attn[\s\S]*mended by: pip install flash-attn"):
        launch.make_plan(file, num_processes=2)
    plan = launch.make_plan(file, ["--attn_implementation", "sdpa"], num_processes=2)
    assert plan.zero_stage == 2
    pretend(accelerate="1.15.0")
    with pytest.raises(UsageError, match=r"accelerate 1\.15\.0 cannot run DeepSpeed"):
        launch.make_plan(files(), num_processes=2)
    assert launch.make_plan(files(deepspeed="-"), num_processes=2).zero_stage is None


def test_the_launcher_imports_nothing_to_tell(files):  # noqa: F811
    file = files(attn_implementation="flash_attention_2")
    script = (
        "import sys\nfrom llava_packing_tower.cli import main\n"
        "from llava_packing_tower import launch\nfrom llava_packing_tower.doctor import versions\n"
        "launch._gpus = lambda: 0\nversions.find_spec = lambda name: None\n"
        f"status = main(['train', {str(file)!r}, '--num_processes', '2'])\n"
        "print(status, [m for m in ('torch', 'transformers', 'llava', 'deepspeed') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY)
    assert result.stdout.strip() == "2 []" and "flash-attn" in result.stderr, result.stdout + result.stderr


# ---------------------------------------------------------------- trying things out


def test_backends_are_run_and_compared(monkeypatch):
    results, findings = probes.attention_backends()
    by_name = {result.name: result for result in results}
    assert list(by_name) == list(attention.BACKENDS)
    assert by_name["sdpa"].runs and by_name["sdpa"].backward and by_name["sdpa"].error < 1e-4 and not findings
    if not torch.cuda.is_available():
        assert not by_name["cudnn"].runs and by_name["cudnn"].reason == "needs a CUDA GPU"

    real = attention.backend_module("sdpa").attend
    monkeypatch.setattr(attention.backend_module("sdpa"), "attend", lambda *args: real(*args) + 0.3)
    results, findings = probes.attention_backends()
    assert [f.text for f in findings] == [
        "attention backend sdpa does not work here: its results differ from eager by 3.0e-01"
    ]
    assert not next(r for r in results if r.name == "sdpa").runs

    def crash(*args):
        raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setattr(attention.backend_module("sdpa"), "attend", crash)
    results, findings = probes.attention_backends()
    assert findings[0].level == ERROR and "RuntimeError: no kernel image is available" in findings[0].text


def test_a_backward_that_is_wrong_is_seen(monkeypatch):
    real = attention.backend_module("sdpa").attend

    def no_gradient_for_k(q, k, v, segments, scale):
        return real(q, k.detach(), v, segments, scale) + 0 * k

    monkeypatch.setattr(attention.backend_module("sdpa"), "attend", no_gradient_for_k)
    _, findings = probes.attention_backends()
    assert findings and "differ from eager" in findings[0].text


def test_a_build_without_float16_is_a_warning(monkeypatch):
    real = attention.backend_module("sdpa").attend
    turned = lambda q, *rest: real(q.flip(0) if q.dtype == torch.float16 else q, *rest)  # noqa: E731
    monkeypatch.setattr(attention.backend_module("sdpa"), "attend", turned)
    monkeypatch.setattr(probes, "_device", lambda: (torch.device("cpu"), torch.bfloat16))
    results, findings = probes.attention_backends()
    assert next(r for r in results if r.name == "sdpa").runs
    (finding,) = findings
    assert finding.level == WARNING and "sdpa does not work here in float16: its results differ" in finding.text


def test_a_compile_that_fails_is_a_warning(monkeypatch):
    from llava_packing_tower import compiling

    monkeypatch.setattr(compiling, "_failed", ["no C++ compiler\nin sight"])
    result, findings = probes.tower()
    assert result["blocks"] == "eager" and findings[0].command == "export LLAVA_PACKING_COMPILE=0"
    assert findings[0].text.endswith("run eager: no C++ compiler")


def test_an_import_that_fails_names_the_package():
    finding = probes._import_failure("ModuleNotFoundError: No module named 'datasets.arrow'")
    assert finding.command == "pip install --no-deps datasets" and "datasets.arrow" in finding.text
    assert probes._import_failure("ImportError: cannot import name 'x'").command is None


# ---------------------------------------------------------------- the command


def quick(monkeypatch, findings=(), host="LLaVA 1.2.2 (somewhere)"):
    """The slow parts replaced by what they would report."""
    collectives = {"backend": "gloo", "processes": 2, "works": True}
    mend = {"name": "cure", "reason": "it is sick", "issue": "a/b#1", "applied": True}
    monkeypatch.setattr(probes, "collectives", lambda: (collectives, []))
    monkeypatch.setattr(probes, "host", lambda: ({"mends": [mend], "deepspeed": None}, list(findings)))
    monkeypatch.setattr(examination, "impossible", lambda run: [])
    monkeypatch.setattr(examination, "_host", lambda report: report.update(host=host) or [])


def test_exit_status_and_the_command_of_each_finding(monkeypatch, capsys):
    quick(monkeypatch)
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "nothing is in the way" in shown and "mend cure: it is sick (a/b#1)" in shown
    assert "attention sdpa: runs (differs from eager by" in shown
    quick(monkeypatch, [versions.Finding("warning", "x", "slow", "make it fast")])
    assert main(["doctor"]) == 0 and "WARNING x: slow\n  mended by: make it fast" in capsys.readouterr().out
    quick(monkeypatch, [versions.Finding(ERROR, "x", "broken", "mend it")])
    assert main(["doctor"]) == 1 and "ERROR x: broken\n  mended by: mend it" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    finding = {"level": "error", "topic": "x", "text": "broken", "command": "mend it"}
    assert report["ok"] is False and finding in report["findings"] and report["mends"][0]["name"] == "cure"


def test_nothing_is_imported_where_versions_forbid_it(monkeypatch, capsys):
    quick(monkeypatch)
    bad = versions.Finding(ERROR, "transformers", "too old", "pip install transformers==4.40.2")
    monkeypatch.setattr(examination, "impossible", lambda run: [bad])
    monkeypatch.setattr(probes, "attention_backends", lambda: pytest.fail("tried"))
    assert main(["doctor"]) == 1 and "too old" in capsys.readouterr().out


def test_no_host(monkeypatch, capsys):
    from llava_packing_tower import hosts

    def nothing():
        raise ValueError("no LLaVA is installed")

    monkeypatch.setattr(hosts, "find_host", nothing)
    report = {}
    assert "no LLaVA is installed" in examination._host(report)[0].text and report["host"] is None


def test_the_real_machine(monkeypatch, capsys):
    """All of it, with the host imported and its defects found; one mend is switched off."""
    need_a_host()
    monkeypatch.setenv("LLAVA_PACKING_DISABLE_MENDS", "fwd_kw,cuda_sync,inner_loop")
    status = main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert status == int(not report["ok"]) == 0, report["findings"]
    assert report["collectives"]["works"] and report["tower"]["finite"] and "llava" in report["host"].lower()
    found = {mend["name"]: mend["applied"] for mend in report["mends"]}
    off = {name for name, applied in found.items() if not applied}
    assert off and off <= {"fwd_kw", "cuda_sync", "inner_loop"} and found["empty_groups"]
    warned = {f["text"].split()[0] for f in report["findings"] if f["topic"] == "mends"}
    assert warned == off
