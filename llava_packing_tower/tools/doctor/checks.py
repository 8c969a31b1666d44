"""The checks that run something: attention backends, the tower, collectives, DeepSpeed, the host with its patches."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from ...utils import environment
from ...utils.findings import ERROR, WARNING, Finding
from ...utils.versions import install_command

TIMEOUT = 300
# What the hosts import under another name than that of the package to install.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "yaml": "PyYAML",
    "sklearn": "scikit-learn",
    "google": "protobuf",
    "cv2": "opencv-python",
}
VARLEN_KERNELS = ("flash_attention_2", "flash_attention_3", "flash_attention_4", "torch_varlen")
# Largest difference from the float32 reference that is allowed, outputs and gradients being of order one.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 5e-2}


@dataclass
class Backend:
    """The result of one attention backend. ``error``: its largest difference from the eager one, in float32."""

    name: str
    runs: bool
    error: float | None = None
    backward: bool = False
    reason: str | None = None


# ---------------------------------------------------------------- in this process


def attention_backends() -> tuple[list[Backend], list[Finding]]:
    """Forward and backward of every backend on this machine's device, each against `eager` in float32."""
    import torch

    from ...attention.dispatch import BACKENDS

    device, dtype = _device()
    results, findings = [], []
    for name in BACKENDS:
        result = _try_backend(name, device, dtype)
        results.append(result)
        if result.reason and result.reason.startswith("!"):
            result.reason = result.reason[1:]
            text = f"attention backend {name} does not work here: {result.reason}"
            findings.append(Finding(ERROR, "attention", text, "export LLAVA_PACKING_ATTENTION=sdpa"))
        # A build can lack it, and LLaVA loads checkpoints in it by default.
        if result.runs and dtype == torch.bfloat16:
            half = _try_backend(name, device, torch.float16)
            if half.reason:
                text = f"attention backend {name} does not work here in float16: {half.reason.removeprefix('!')}"
                findings.append(Finding(WARNING, "attention", text, "leave mm_packing_attention at auto, or use bf16"))
    kernels = [r for r in results if r.runs and r.name in VARLEN_KERNELS]
    if device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0) and not kernels:
        text = "no variable-length attention kernel runs on this GPU: images of different sizes run one size at a time"
        findings.append(Finding(WARNING, "attention", text, "pip install flash-attn --no-build-isolation"))
    return results, findings


def _device():
    import torch

    if torch.cuda.is_available():
        ampere = torch.cuda.get_device_capability() >= (8, 0)
        return torch.device("cuda"), torch.bfloat16 if ampere else torch.float32
    return torch.device("cpu"), torch.float32


def _try_backend(name, device, dtype) -> Backend:
    import torch

    from ...attention import eager
    from ...attention.dispatch import backend_module
    from ...attention.self_check import apart, results
    from ...data.segments import make_segments

    heads, width = 2, 64
    module = backend_module(name)
    lengths = (64, 64) if getattr(module, "EQUAL_LENGTHS_ONLY", False) else (17, 64, 5)
    reason = module.unsupported_reason(device, dtype, width, False)
    if reason:
        return Backend(name, False, reason=reason)
    backward = module.unsupported_reason(device, dtype, width, True) is None
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(sum(lengths), heads, width, generator=generator).to(dtype) for _ in range(4)]

    def outputs(backend: ModuleType, where: torch.device, precision: torch.dtype) -> list[torch.Tensor]:
        *qkv, weight = (x.to(where, precision) for x in inputs)
        with apart(where, backward):
            given = make_segments(lengths, where), width**-0.5, weight if backward else None
            return [tensor.float().cpu() for tensor in results(backend.attend, qkv, *given)]

    try:
        actual = outputs(module, device, dtype)
    except Exception as error:  # a kernel that was built for something else fails in its own way; that is the result
        return Backend(
            name, False, reason=f"!{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )
    expected = outputs(eager, torch.device("cpu"), torch.float32)
    worst = max((a - e).abs().max().item() for a, e in zip(actual, expected, strict=True))
    if not worst <= TOLERANCE[str(dtype).removeprefix("torch.")]:
        return Backend(name, False, worst, backward, f"!its results differ from eager by {worst:.1e}")
    return Backend(name, True, worst, backward)


def tower() -> tuple[dict[str, object], list[Finding]]:
    """A tiny tower: forward and backward on this machine's device, and the plans by which it ran, without and with
    gradients."""
    import torch

    from ... import LlavaViTPackingModel, batch_images_to_packing_input
    from ...models.llava_vit.packed import LlavaViTPackingConfig
    from ...models.runtime.execution import EAGER

    device, dtype = _device()
    config = LlavaViTPackingConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=28
    )
    model = LlavaViTPackingModel(config).to(device, dtype)
    images = [torch.zeros(3, 28, 42), torch.ones(3, 56, 28)]
    rows, grid = batch_images_to_packing_input(images, config.patch_size, device=device, dtype=dtype)
    with torch.no_grad():
        model(rows, grid)
    inference = model.encoder.last_plan
    out = model(rows, grid).last_hidden_state
    out.float().square().mean().backward()
    finite = bool(out.isfinite().all())
    findings = []
    if not finite:
        findings.append(Finding(ERROR, "tower", f"a tiny tower gives values that are not finite on {device}"))
    if device.type == "cuda" and inference.path == EAGER and inference.reason != "requested":
        findings.append(Finding(WARNING, "fused blocks", f"the encoder blocks run eager here: {inference.reason}"))
    result = {
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "inference": str(inference),
        "training": str(model.encoder.last_plan),
        "finite": finite,
    }
    return result, findings


def training_step() -> tuple[dict[str, object], list[Finding]]:
    """What the decoder of a LLaVA would train with here: attention of packed rows, and liger-kernel."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from ...integrations.llava.decoder_attention import unsupported_attention
    from ...integrations.llava.liger import unsupported_liger
    from ...multimodal.packed_decoder import causal_backend

    device, dtype = _device()
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = Qwen2ForCausalLM(config).to(device, dtype)
    attention = model.model.layers[0].self_attn
    reason, findings = unsupported_attention(attention), []
    backend = None if reason else causal_backend(device, dtype, attention.head_dim)
    if backend == "sdpa" and device.type == "cuda":
        text = "no variable-length attention kernel for the packed decoder: attention runs sample by sample"
        findings.append(Finding(WARNING, "training step", text, "pip install flash-attn --no-build-isolation"))
    result = {"attention": backend, "decoder_reason": reason, "liger_reason": unsupported_liger(model, None)}
    return result, findings


# ---------------------------------------------------------------- in processes of their own


def _run(script: str, *words: str, environment: dict[str, str] | None = None, timeout: float = TIMEOUT):
    """Start a Python process with ``script``; returns the Popen."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *words],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": _path(), **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def _path() -> str:
    own = str(Path(__file__).resolve().parents[3])
    return os.pathsep.join(filter(None, [own, os.environ.get("PYTHONPATH")]))


def _end(process: subprocess.Popen, timeout: float) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return 124, "", f"no answer within {timeout:.0f} s"
    return process.returncode, out, err


def _last(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it ended without output"


HOST = """
import json
from importlib import import_module
import builder_patch
from llava_packing_tower.integrations import llava as hosts
from llava_packing_tower.integrations.llava import compat
host = hosts.find_host().host
report = {}
for name in (host.train, host.loader.module):
    import_module(host.module(name))
try:
    from deepspeed.accelerator import get_accelerator
    import deepspeed, torch
    report["deepspeed"] = {"version": deepspeed.__version__, "accelerator": get_accelerator().device_name()}
except ModuleNotFoundError as error:
    if error.name != "deepspeed":
        raise
report |= {"applied": compat.applied(), "left": compat.left()}
print("\\n" + json.dumps(report))
"""


def host() -> tuple[dict[str, object], list[Finding]]:
    """Import the host's trainer and loader with the hook in place: which compat patches are applied, which are off."""
    from ...integrations.llava import compat

    code, out, err = _end(_run(HOST), TIMEOUT)
    if code:
        return {}, [_import_failure(_swallowed(out) or _last(err))]
    report = json.loads(_last(out))
    known = compat.load_all()
    findings = [
        Finding(
            WARNING,
            "patches",
            f"{name} is switched off and its defect is there: {known[name].reason}",
            f"unset {compat.DISABLE_ENV}",
        )
        for name in report["left"]
    ]
    report["patches"] = [
        {"name": name, "reason": known[name].reason, "issue": known[name].issue, "applied": state == "applied"}
        for state in ("applied", "left")
        for name in report.pop(state)
    ]
    return report, findings


def _swallowed(out: str) -> str | None:
    """The cause that LLaVA-NeXT prints where it goes on without a model, and then fails for lack of it."""
    found = re.search(
        r"^Failed to import .*? Error: (.+:\n.+|.+)$", out, re.MULTILINE
    )  # transformers: in the line below
    return found and found[1].replace("\n", " ")


def _import_failure(line: str) -> Finding:
    missing = line.partition("No module named ")[2].strip("'\"").partition(".")[0]
    # Where the package itself is there, a part of it is missing, and installing it again would not help.
    command = None if not missing or find_spec(missing) else install_command(DISTRIBUTIONS.get(missing, missing))
    if "which is not a compat patch" in line:
        command = f"unset {environment.DISABLE_PATCHES}"
    return Finding(ERROR, "host", f"the host cannot be imported: {line}", command)


RANK = """
import datetime, sys
import torch
import torch.distributed as dist
backend, rank, world = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
device = torch.device("cpu")
if backend == "nccl":
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
address = f"tcp://127.0.0.1:{sys.argv[4]}"
limit = datetime.timedelta(seconds=60)
dist.init_process_group(backend, init_method=address, rank=rank, world_size=world, timeout=limit)
x = torch.full((3,), float(rank + 1), device=device)
dist.all_reduce(x)
parts = torch.empty(world * 3, device=device)
dist.all_gather_into_tensor(parts, torch.full((3,), float(rank), device=device))
assert x.tolist() == [world * (world + 1) / 2] * 3, x
assert parts.tolist() == [float(r) for r in range(world) for _ in range(3)], parts
dist.destroy_process_group()
print("fine")
"""


def collectives() -> tuple[dict[str, object], list[Finding]]:
    """A sum and a gather over two processes: NCCL on the GPUs (one process on a single GPU), gloo without any."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    backend, world = ("nccl", min(2, gpus)) if gpus else ("gloo", 2)
    result: dict[str, object] = {"backend": backend, "processes": world}
    if backend == "nccl":
        result["version"] = ".".join(map(str, torch.cuda.nccl.version()))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"), "OMP_NUM_THREADS": "1"}
    ranks = [_run(RANK, backend, str(r), str(world), port, environment=environment) for r in range(world)]
    ends = [_end(rank, 120) for rank in ranks]
    failed = [_last(err) for code, _, err in ends if code]
    result["works"] = not failed
    if not failed:
        return result, []
    command = "NCCL_DEBUG=INFO llava-packing doctor" if backend == "nccl" else "export GLOO_SOCKET_IFNAME=lo"
    return result, [Finding(ERROR, backend, f"{backend} over {world} processes fails: {failed[0]}", command)]


def as_json(backends: list[Backend]) -> list[dict[str, object]]:
    return [asdict(backend) for backend in backends]
