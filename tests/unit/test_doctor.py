"""`llava-packing doctor`, and what the launcher says, before anything loads, of versions that cannot work."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launch_files import need_a_host

from llava_packing_tower.attention import dispatch
from llava_packing_tower.cli.main import main
from llava_packing_tower.tools.doctor import checks
from llava_packing_tower.tools.doctor import run as examination
from llava_packing_tower.train import launcher as launch
from llava_packing_tower.utils import versions
from llava_packing_tower.utils.errors import UsageError
from llava_packing_tower.utils.findings import ERROR, WARNING
from llava_packing_tower.utils.versions import Run, impossible

REPOSITORY = Path(__file__).parents[2]


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
        f"transformers {major}.{int(minor) + 1}.0 is newer than {versions.NEWEST_RUN}, the newest tested version"
    ]


def test_the_newest_that_was_tried_is_what_the_matrix_and_the_second_environment_have():
    results = sorted((REPOSITORY / "benchmarks" / "results").glob("shipped_configs_*.json"))
    configs: dict[str, set[str]] = {}
    for cell in json.loads(results[-1].read_text()).values():
        if cell["result"] == "pass":
            configs.setdefault(cell["versions"]["transformers"], set()).add(cell["config"])
    newest = max(configs, key=lambda version: [int(part) for part in version.split(".")])
    assert newest.rpartition(".")[0] == versions.NEWEST_RUN and len(configs[newest]) == 9
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
    ("transformers", "deepspeed", "hidden", "asked", "stage", "wrong"),
    [
        ("4.40.2", "0.15.4", 64, "auto", 3, True),
        ("4.44.2", "0.19.8", 64, "auto", 3, True),
        ("4.40.2", "0.19.8", 5120, "auto", 3, False),  # 23592960, a whole number
        ("4.40.2", "0.19.8", None, "auto", 3, False),
        ("4.40.2", "0.19.8", 64, 3686, 3, False),
        ("4.40.2", "0.19.8", 64, "auto", 2, False),
        ("4.40.2", "0.14.4", 64, "auto", 3, False),
        ("4.45.0", "0.19.8", 64, "auto", 3, False),
    ],
)
def test_automatic_bucket_size(pretend, transformers, deepspeed, hidden, asked, stage, wrong):
    pretend(transformers=transformers, deepspeed=deepspeed)
    config = {"zero_optimization": {"stage": stage, "stage3_prefetch_bucket_size": asked}}
    found = versions._automatic_bucket_sizes(Run(zero_stage=stage, deepspeed=config, hidden_size=hidden))
    assert bool(found) == wrong
    if wrong:
        assert "into 3686.4" in found[0].text and "Write 3686" in found[0].text
        assert found[0].command.endswith("deepspeed==0.14.4")


@pytest.mark.parametrize(
    ("peft", "transformers", "missing"),
    [
        ("0.21.2", "4.40.2", "EncoderDecoderCache"),
        ("0.14.0", "4.42.4", "EncoderDecoderCache"),
        ("0.13.2", "4.40.2", None),
        ("0.21.2", "4.43.4", None),
        ("0.17.1", "5.0.0", "HybridCache"),
        ("0.17.1", "4.57.3", None),
        ("0.18.1", "5.23.0", None),
        ("0.13.2", "5.23.0", None),
        (None, "4.40.2", None),
    ],
)
def test_peft_beside_transformers(pretend, monkeypatch, peft, transformers, missing):
    monkeypatch.setattr(versions, "requires", lambda distribution: [])
    pretend(peft=peft, transformers=transformers)
    assert (f"peft {peft} imports {missing}," in texts()) == (missing is not None)
    assert missing or impossible(Run()) == []


def test_filelock_beside_lmms_eval(pretend, tmp_path, monkeypatch):
    (tmp_path / "evaluator.py").write_text("import filelock._api as _fl_api")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(versions, "find_spec", lambda name: spec if name == "lmms_eval" else None)
    monkeypatch.setattr(examination, "find_spec", lambda name: None if name == "PIL" else spec)
    pretend(filelock="4.3.1")
    (finding,) = versions.filelock()
    found = examination._packages()
    assert finding in found and "pip install pillow" in {other.command for other in found}
    assert finding.command == "pip install 'filelock<4.3'"
    pretend(filelock="4.2.12")
    assert versions.filelock() == []
    pretend(filelock="4.3.1")
    (tmp_path / "evaluator.py").write_text("from filelock import FileLock")
    assert versions.filelock() == []


# Some releases of each package, the newest last: what pip installs is the newest that a command allows.
RELEASES = {
    "transformers": ["4.40.2", "4.46.3", "4.51.3", "4.57.3", "5.17.0", "5.23.0"],
    "accelerate": ["0.34.2", "1.1.1", "1.12.0", "1.15.0"],
    "deepspeed": ["0.14.4", "0.15.4", "0.18.9", "0.19.8"],
    "peft": ["0.13.2", "0.14.0", "0.17.1", "0.18.1", "0.21.2"],
    "tokenizers": ["0.19.1", "0.20.3", "0.21.4", "0.22.2", "0.23.3"],
    "huggingface-hub": ["0.36.2", "1.33.0"],
    "filelock": ["3.20.3", "4.2.12", "4.3.1"],
}
# What the Trainer of each asks for, by its metadata.
NEEDS = {
    "4.40.2": ["tokenizers>=0.19,<0.20", "huggingface-hub>=0.19.3,<1.0", "accelerate>=0.21.0"],
    "4.46.3": ["tokenizers>=0.20,<0.21", "huggingface-hub>=0.23.2,<1.0", "accelerate>=0.26.0"],
    "4.51.3": ["tokenizers>=0.21,<0.22", "huggingface-hub>=0.30.0,<1.0", "accelerate>=0.26.0"],
    "4.57.3": ["tokenizers>=0.22,<=0.23", "huggingface-hub>=0.34.0,<1.0", "accelerate>=0.26.0"],
    "5.17.0": ["tokenizers>=0.22,<=0.23.3", "huggingface-hub>=1.3.0,<2.0", "accelerate>=1.1.0"],
    "5.23.0": ["tokenizers>=0.22,<=0.23.3", "huggingface-hub>=1.3.0,<2.0", "accelerate>=1.1.0"],
}


@pytest.mark.parametrize("others", ["newest", "oldest", "absent"])
@pytest.mark.parametrize("transformers", [None, "4.37.2", *NEEDS])
def test_following_the_commands_ends_in_what_the_launcher_takes(pretend, monkeypatch, tmp_path, transformers, others):
    """Beside each transformers, whatever else is there: the commands are followed, and then nothing is left to say."""
    from packaging.requirements import Requirement

    (tmp_path / "evaluator.py").write_text("import filelock._api as _fl_api")
    here = {name: {"newest": found[-1], "oldest": found[0], "absent": None}[others] for name, found in RELEASES.items()}
    here |= {"transformers": transformers, "filelock": here["filelock"] or "4.3.1"}
    pretend(**here)

    def find_spec(name: str) -> SimpleNamespace | None:
        there = name in ("lmms_eval", *examination.NEEDED) or here.get(name)
        return SimpleNamespace(submodule_search_locations=[str(tmp_path)]) if there else None

    for module in (versions, examination):
        monkeypatch.setattr(module, "find_spec", find_spec)
    monkeypatch.setattr(versions, "requires", lambda distribution: NEEDS[here["transformers"]])
    config = {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": "auto"}}

    def launcher() -> list:
        return impossible(Run(3, on_cpu=True, processes=2, attention="sdpa", deepspeed=config, hidden_size=896))

    for _ in range(6):
        found = [*launcher(), *examination._packages()]
        if not found:
            break
        for command in {finding.command for finding in found}:
            wanted = Requirement(shlex.split(command)[-1])
            fits = [release for release in RELEASES[wanted.name] if release in wanted.specifier]
            here[wanted.name] = fits[-1]
            pretend(**here)
            if wanted.name == "transformers":  # pip brings what it states itself
                for need in map(Requirement, NEEDS[here["transformers"]][:2]):
                    here[need.name] = [release for release in RELEASES[need.name] if release in need.specifier][-1]
                pretend(**here)
    assert launcher() == [] and examination._packages() == []
    assert here["transformers"] != "4.40.2" or here["deepspeed"] == "0.14.4"


def test_flash_attention_of_the_decoder(monkeypatch):
    here = {}
    monkeypatch.setattr(versions, "find_spec", here.get)
    assert "flash_attention_2 needs the flash-attn package" in texts(Run(attention="flash_attention_2"))
    here["flash_attn"] = SimpleNamespace(origin=None)  # flash-attn-4 alone
    assert impossible(Run(attention="flash_attention_2"))
    here["flash_attn"] = SimpleNamespace(origin="flash_attn/__init__.py")
    assert impossible(Run(attention="flash_attention_2")) == []
    assert impossible(Run(attention="sdpa")) == []


def test_the_launcher_refuses_before_anything_loads(files, pretend, monkeypatch):
    monkeypatch.setattr(launch, "_gpus", lambda: 0)
    monkeypatch.setattr(versions, "find_spec", lambda name: None)
    file = files(attn_implementation="flash_attention_2")
    with pytest.raises(UsageError, match=r"cannot run this:\n.*flash-attn[\s\S]*Fix: pip install flash-attn"):
        launch.make_plan(file, num_processes=2)
    plan = launch.make_plan(file, ["--attn_implementation", "sdpa"], num_processes=2)
    assert plan.zero_stage == 2
    pretend(accelerate="1.15.0")
    with pytest.raises(UsageError, match=r"accelerate 1\.15\.0 cannot run DeepSpeed"):
        launch.make_plan(files(), num_processes=2)
    assert launch.make_plan(files(deepspeed="-"), num_processes=2).zero_stage is None


def test_the_launcher_imports_nothing_to_tell(files):
    file = files(attn_implementation="flash_attention_2")
    script = (
        "import sys\nfrom llava_packing_tower.cli.main import main\n"
        "from llava_packing_tower.train import launcher\nfrom llava_packing_tower.utils import versions\n"
        "launcher._gpus = lambda: 0\nversions.find_spec = lambda name: None\n"
        f"status = main(['train', {str(file)!r}, '--num_processes', '2'])\n"
        "print(status, [m for m in ('torch', 'transformers', 'llava', 'deepspeed') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY)
    assert result.stdout.strip() == "2 []" and "flash-attn" in result.stderr, result.stdout + result.stderr


# ---------------------------------------------------------------- trying things out


def test_backends_are_run_and_compared(monkeypatch):
    results, findings = checks.attention_backends()
    by_name = {result.name: result for result in results}
    assert list(by_name) == list(dispatch.BACKENDS)
    assert by_name["sdpa"].runs and by_name["sdpa"].backward and by_name["sdpa"].error < 1e-4 and not findings
    if not torch.cuda.is_available():
        assert not by_name["cudnn"].runs and by_name["cudnn"].reason == "needs a CUDA GPU"

    real = dispatch.backend_module("sdpa").attend
    monkeypatch.setattr(dispatch.backend_module("sdpa"), "attend", lambda *args: real(*args) + 0.3)
    results, findings = checks.attention_backends()
    assert [f.text for f in findings] == [
        "attention backend sdpa does not work here: its results differ from eager by 3.0e-01"
    ]
    assert not next(r for r in results if r.name == "sdpa").runs

    def crash(*args):
        raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setattr(dispatch.backend_module("sdpa"), "attend", crash)
    results, findings = checks.attention_backends()
    assert findings[0].level == ERROR and "RuntimeError: no kernel image is available" in findings[0].text


def test_a_backward_that_is_wrong_is_seen(monkeypatch):
    real = dispatch.backend_module("sdpa").attend

    def no_gradient_for_k(q, k, v, segments, scale):
        return real(q, k.detach(), v, segments, scale) + 0 * k

    monkeypatch.setattr(dispatch.backend_module("sdpa"), "attend", no_gradient_for_k)
    _, findings = checks.attention_backends()
    assert findings and "differ from eager" in findings[0].text


def test_a_build_without_float16_is_a_warning(monkeypatch):
    real = dispatch.backend_module("sdpa").attend
    turned = lambda q, *rest: real(q.flip(0) if q.dtype == torch.float16 else q, *rest)  # noqa: E731
    monkeypatch.setattr(dispatch.backend_module("sdpa"), "attend", turned)
    monkeypatch.setattr(checks, "_device", lambda: (torch.device("cpu"), torch.bfloat16))
    results, findings = checks.attention_backends()
    assert next(r for r in results if r.name == "sdpa").runs
    (finding,) = findings
    assert finding.level == WARNING and "sdpa does not work here in float16: its results differ" in finding.text


def test_the_plans_of_a_tower_are_shown():
    result, findings = checks.tower()
    assert result["inference"] == result["training"] and result["finite"] and not findings
    assert result["inference"] == "eager (sdpa runs segment by segment), no CUDA graphs, attention by sdpa"


def test_an_import_that_fails_names_the_package():
    finding = checks._import_failure("ModuleNotFoundError: No module named 'datasets.arrow'")
    here = find_spec("datasets") is not None  # then a part of it is missing, and no command brings that
    assert "datasets.arrow" in finding.text and (finding.command is None) == here
    assert checks._import_failure("ModuleNotFoundError: No module named 'nowhere.x'").command == "pip install nowhere"
    assert checks._import_failure("ModuleNotFoundError: No module named 'torch.nowhere'").command is None
    assert checks._import_failure("ImportError: cannot import name 'x'").command is None


def test_a_cause_that_llava_next_only_prints_is_found(monkeypatch):
    """It goes on without the model, and its own import of that model fails then."""
    model = "Failed to import llava_{0} from llava.language_model.llava_{0}. Error: {1}\n"
    out = "a line\n" + model.format("llama", "No module named 'nowhere'") + model.format("qwen", "another")
    err = "Traceback\nImportError: cannot import name 'LlavaLlamaForCausalLM' from 'llava.model' (x/__init__.py)\n"
    monkeypatch.setattr(checks, "_run", lambda *_: None)
    monkeypatch.setattr(checks, "_end", lambda *_: (1, out, err))
    (finding,) = checks.host()[1]
    assert (finding.text, finding.command) == (
        "the host cannot be imported: No module named 'nowhere'",
        "pip install nowhere",
    )
    cause = model.format("llama", "Failed to import transformers.trainer because of (look up):\nx needs y")
    monkeypatch.setattr(checks, "_end", lambda *_: (1, cause + model.format("qwen", "another"), err))
    assert checks.host()[1][0].text.endswith(
        "imported: Failed to import transformers.trainer because of (look up): x needs y"
    )
    monkeypatch.setattr(checks, "_end", lambda *_: (1, "a line\n", err))
    assert "cannot import name 'LlavaLlamaForCausalLM'" in checks.host()[1][0].text


# ---------------------------------------------------------------- the command


def quick(monkeypatch, findings=(), host="LLaVA 1.2.2 (somewhere)"):
    """The slow parts replaced by what they would report."""
    collectives = {"backend": "gloo", "processes": 2, "works": True}
    patch = {"name": "cure", "reason": "it is sick", "issue": "a/b#1", "applied": True}
    monkeypatch.setattr(checks, "collectives", lambda: (collectives, []))
    monkeypatch.setattr(checks, "host", lambda: ({"patches": [patch], "deepspeed": None}, list(findings)))
    monkeypatch.setattr(examination, "impossible", lambda run: [])
    monkeypatch.setattr(examination, "_host", lambda report: report.update(host=host) or [])


def test_exit_status_and_the_command_of_each_finding(monkeypatch, capsys):
    quick(monkeypatch)
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "All checks passed" in shown and "compat patch cure: it is sick (a/b#1)" in shown
    assert "attention sdpa: runs (differs from eager by" in shown
    quick(monkeypatch, [versions.Finding("warning", "x", "slow", "make it fast")])
    assert main(["doctor"]) == 0 and "WARNING x: slow\n  Fix: make it fast" in capsys.readouterr().out
    quick(monkeypatch, [versions.Finding(ERROR, "x", "broken", "fix it")])
    assert main(["doctor"]) == 1 and "ERROR x: broken\n  Fix: fix it" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    finding = {"level": "error", "topic": "x", "text": "broken", "command": "fix it"}
    assert report["ok"] is False and finding in report["findings"] and report["patches"][0]["name"] == "cure"


def test_nothing_is_imported_where_versions_forbid_it(monkeypatch, capsys):
    quick(monkeypatch)
    bad = versions.Finding(ERROR, "transformers", "too old", "pip install transformers==4.40.2")
    monkeypatch.setattr(examination, "impossible", lambda run: [bad])
    monkeypatch.setattr(checks, "attention_backends", lambda: pytest.fail("tried"))
    assert main(["doctor"]) == 1 and "too old" in capsys.readouterr().out


def test_no_host(monkeypatch, capsys):
    from llava_packing_tower.integrations.llava import registry

    def nothing():
        raise ValueError("no LLaVA is installed")

    monkeypatch.setattr(registry, "find_host", nothing)
    report = {}
    assert "no LLaVA is installed" in examination._host(report)[0].text and report["host"] is None


def test_the_real_machine(monkeypatch, capsys):
    """All of it, with the host imported and its defects found; one patch is switched off."""
    need_a_host()
    monkeypatch.setenv("LLAVA_PACKING_DISABLE_PATCHES", "fwd_kw,cuda_sync,inner_loop")
    status = main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert status == int(not report["ok"]) == 0, report["findings"]
    assert report["training_step"]["attention"] in ("sdpa", "flash_attention_2", "flash_attention_4", "torch_varlen")
    assert report["training_step"]["decoder_reason"] is None
    assert report["collectives"]["works"] and report["tower"]["finite"] and "llava" in report["host"].lower()
    found = {patch["name"]: patch["applied"] for patch in report["patches"]}
    off = {name for name, applied in found.items() if not applied}
    assert off and off <= {"fwd_kw", "cuda_sync", "inner_loop"} and found["empty_groups"]
    warned = {f["text"].split()[0] for f in report["findings"] if f["topic"] == "patches"}
    assert warned == off
