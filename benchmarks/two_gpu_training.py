"""Does training scale, and does it stay the same? LLaVA with a ViT-L packing tower under ZeRO-3, on one GPU and on two.

  python benchmarks/two_gpu_training.py --json two_gpu.json               # 50 steps, 3 runs, a reload: about 5 minutes
  python benchmarks/two_gpu_training.py --json tiny.json --tiny           # the same on a CPU, in small

The model is a host's own class (LLaVA-NeXT if LLAVA_NEXT_DIR is set, else llavaction's Qwen2, else LLaVA 1.x's Llama)
with random weights: a tower of ViT-L/14 size, an mlp2x_gelu projector, a decoder of the size of Qwen2-0.5B. Images of
many sizes go in at native resolution, text-only samples are mixed in, and every fifth step one of the two micro-batches
has no image at all. A step is always the same two micro-batches: one after the other on one GPU, one on each of two.

How "the same loss curve" is measured: a second run on one GPU has the samples of each micro-batch in reverse order. In
exact arithmetic nothing would change, so its distance to the first run is the noise of bfloat16. Two GPUs must stay
within 3 times that noise (largest difference over the steps), or within 0.02 if that is more.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from two_gpu_parts import FULL, MICRO, SLOTS, TINY, host_classes, make, micro_batch

WARM_UP = 8
STARTED = time.time()


def decoder_attention(device: str) -> str:
    from transformers.utils import is_flash_attn_2_available

    return "flash_attention_2" if device == "cuda" and is_flash_attn_2_available() else "sdpa"


# ---------------------------------------------------------------- one training process


def train(args: argparse.Namespace, size: dict, device: str) -> None:
    import deepspeed
    import torch
    import torch.distributed as dist
    from transformers.integrations import HfDeepSpeedConfig

    from llava_packing_tower.attention.dispatch import resolve_backend
    from llava_packing_tower.checkpoint.hashing import tensor_digest
    from llava_packing_tower.integrations.llava import compat
    from llava_packing_tower.train.history import gathered

    clock = {"imported": time.time()}
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed("nccl" if device == "cuda" else "gloo")
    config = {
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": SLOTS // world,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "overlap_comm": True, "contiguous_gradients": True},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    kept = HfDeepSpeedConfig(config)  # from here on transformers loads under zero.Init
    model_class = host_classes()[2]
    how = {"attn_implementation": decoder_attention(device), "torch_dtype": torch.bfloat16}
    model = model_class.from_pretrained(args.folder / "llava", **how).train().requires_grad_(True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=size["rate"], weight_decay=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    assert engine.zero_optimization_stage() == 3 and engine.world_size == world
    clock["loaded"] = time.time()
    slots = [rank] if world == SLOTS else list(range(SLOTS))
    losses, began, tokens = [], 0.0, 0
    for step in range(size["steps"]):
        if step == min(WARM_UP, size["steps"] // 2):
            if device == "cuda":
                torch.cuda.synchronize()
            dist.barrier()
            began, first = time.perf_counter(), step
        total = torch.zeros((), device=engine.device)
        for slot in slots:
            batch = micro_batch(size, step, slot, str(engine.device), args.backwards)
            tokens += sum(i.shape[1] * i.shape[2] // size["patch"] ** 2 for i in batch["images"] or [])
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach().float() / SLOTS
        dist.all_reduce(total)
        losses.append(total.item())
        clock.setdefault("first step", time.time())
    if device == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    seconds = time.perf_counter() - began
    clock["steps"] = time.time()
    state, digests = {}, {}
    for key, parameter in model.named_parameters():
        with gathered(parameter):
            if rank == 0:
                state[key] = parameter.detach().cpu().clone()
                digests[key] = tensor_digest(state[key])
    tower = model.get_vision_tower()
    encoder = tower.vision_tower.encoder
    plan = encoder.last_plan
    probe = torch.randn(3, 6 * size["patch"], 4 * size["patch"], generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        features = tower([probe.to(engine.device, torch.bfloat16)])[0]
    if rank == 0:
        if args.save:
            tied = {"lm_head.weight"} if size["decoder"]["tie_word_embeddings"] else set()
            whole = {key: tensor for key, tensor in state.items() if key not in tied}
            model.save_pretrained(args.folder / args.save, state_dict=whole)
        memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
        report = {
            "world": world,
            "engine": type(engine).__name__,
            "decoder attention": model.config._attn_implementation,
            "tower attention": resolve_backend("auto", device, torch.bfloat16, encoder.head_dim, needs_grad=True),
            "tower blocks": str(plan),
            "patches": compat.applied(),
            "losses": losses,
            "samples/s": MICRO * SLOTS * (size["steps"] - first) / seconds,
            "visual tokens of rank 0": tokens,
            "peak GiB": memory,
            "seconds": {b: clock[b] - clock[a] for a, b in itertools.pairwise(clock)} | {"all": time.time() - STARTED},
            "digests": digests,
        }
        torch.save(features.cpu(), args.folder / f"{args.name}.features.pt")
        (args.folder / f"{args.name}.json").write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()
    del kept


def reload(args: argparse.Namespace, size: dict, device: str) -> None:
    """A new process without DeepSpeed: every tensor and the tower's features, against what training had in memory."""
    import torch

    from llava_packing_tower.checkpoint.hashing import differing, tensor_digest
    from llava_packing_tower.integrations.llava.checkpoint import check_tower_weights

    trained = json.loads((args.folder / f"{args.name}.json").read_text())
    model_class = host_classes()[2]
    folder = args.folder / args.save
    model = model_class.from_pretrained(folder, torch_dtype=torch.bfloat16).to(device).eval()
    tower = model.get_vision_tower()
    check_tower_weights(tower, model.config, str(folder))
    here = {key: tensor_digest(parameter) for key, parameter in model.named_parameters()}
    probe = torch.randn(3, 6 * size["patch"], 4 * size["patch"], generator=torch.Generator().manual_seed(9))
    # As under ZeRO-3, whose hooks no graph could replay (graphs pad batches, and other sizes round otherwise).
    os.environ["LLAVA_PACKING_CUDA_GRAPHS"] = "0"
    with torch.no_grad():
        features = tower([probe.to(device, torch.bfloat16)])[0].cpu()
    before = torch.load(args.folder / f"{args.name}.features.pt")
    wrong = differing({key: trained["digests"][key] for key in here}, here)
    report = {
        "tensors": len(here),
        "different": wrong,
        "features equal": torch.equal(features, before),
        "largest feature and difference": [before.abs().max().item(), (features - before).abs().max().item()],
    }
    (args.folder / "reload.json").write_text(json.dumps(report))


# ---------------------------------------------------------------- the parent


def start(words: list[str], processes: int, device: str, gpu: int | None = None) -> subprocess.Popen:
    """Run this file again in ``processes`` processes, on one GPU alone if ``gpu`` is given."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(Path(__file__).resolve()), *words]
    if processes:
        torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_addr", "127.0.0.1"]
        command = [sys.executable, *torchrun, "--master_port", str(port), *command[1:]]
    environment = {**os.environ, "NCCL_NVLS_ENABLE": "0", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    if device == "cpu":
        environment |= {"LOCAL_SIZE": str(processes or 1), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
    return subprocess.Popen(command, env=environment, start_new_session=True)


def wait(processes: dict[str, subprocess.Popen], limit: float) -> dict[str, float]:
    """Seconds that each took. Ends all of them and raises SystemExit where one fails or takes too long."""
    began, seconds = time.perf_counter(), {}
    try:
        for name, process in processes.items():
            if process.wait(timeout=max(1.0, limit - (time.perf_counter() - began))):
                raise SystemExit(f"{name} failed with status {process.returncode}")
            seconds[name] = time.perf_counter() - began
    except subprocess.TimeoutExpired:
        raise SystemExit(f"{name} hangs: not done after {limit:.0f} s") from None
    finally:
        for process in processes.values():
            if process.poll() is None:
                process.terminate()  # torchrun ends its workers, which have process groups of their own
                process.wait()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the report goes")
    parser.add_argument("--tiny", action="store_true", help="small, on the CPU")
    parser.add_argument("--steps", type=int, help="in place of 50 (24 with --tiny)")
    parser.add_argument("--limit", type=float, default=170, help="seconds that one run may take (default 170)")
    for name in ("--job", "--name", "--save"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--backwards", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = {**(TINY if args.tiny else FULL)}
    size["steps"] = args.steps or size["steps"]
    device = "cpu" if args.tiny else "cuda"
    if args.job:
        import builder_patch  # noqa: F401

        if args.job == "make":
            (args.folder / "make.json").write_text(json.dumps(make(args.folder, size, device)))
        else:
            {"train": train, "reload": reload}[args.job](args, size, device)
        return
    common = ["--steps", str(size["steps"])] + (["--tiny"] if args.tiny else [])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common += ["--folder", name]
        job = ["--job", "train", *common, "--name"]
        seconds = wait({"make": start(["--job", "make", *common], 0, device)}, args.limit)
        # Both on one GPU: side by side, each on its own.
        alone = {
            "one": start([*job, "one"], 1, device, 0),
            "backwards": start([*job, "backwards", "--backwards"], 1, device, 1),
        }
        seconds |= wait(alone, args.limit)
        seconds |= wait({"two": start([*job, "two", "--save", "saved"], 2, device)}, args.limit)
        words = ["--job", "reload", "--name", "two", "--save", "saved", *common]
        seconds |= wait({"reload": start(words, 0, device)}, args.limit)
        runs = ("one", "backwards", "two")
        found = {run: json.loads((folder / f"{run}.json").read_text()) for run in (*runs, "make", "reload")}
    report = summary(found, seconds, device)
    text = json.dumps(report, indent=1)
    if args.json:
        args.json.write_text(text + "\n")
    print(text)
    failed = [check for check, passed in report["checks"].items() if not passed]
    print("FAILED: " + ", ".join(failed) if failed else "all checks passed")
    sys.exit(bool(failed))


def summary(found: dict, seconds: dict, device: str) -> dict:
    """The figures and the checks."""
    import torch
    import transformers

    from llava_packing_tower.utils.versions import installed

    for run in ("one", "backwards", "two"):
        found[run].pop("digests")
    one, backwards, two = (found[run]["losses"] for run in ("one", "backwards", "two"))
    noise = max(abs(a - b) for a, b in zip(one, backwards, strict=True))
    apart = max(abs(a - b) for a, b in zip(one, two, strict=True))
    tail = max(3, len(two) // 10)
    start_loss, end_loss = sum(two[:tail]) / tail, sum(two[-tail:]) / tail
    rates = {run: found[run]["samples/s"] for run in ("one", "two")}
    checks = {
        "loss falls": end_loss < 0.85 * start_loss,
        "same curve on one GPU and on two": apart <= max(3 * noise, 0.02),
        "every tensor reloads to the last bit": not found["reload"]["different"],
        "features reload to the last bit": found["reload"]["features equal"],
    }
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    versions |= {name: number for name in ("deepspeed", "flash_attn") if (number := installed(name))}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": versions,
        "model": found["make"],
        "loss": {"first steps": start_loss, "last steps": end_loss},
        "largest difference of losses": {"one GPU, samples in reverse (noise)": noise, "one GPU and two": apart},
        "samples/s": rates,
        "scaling efficiency": rates["two"] / (2 * rates["one"]),
        "seconds": {key: round(value, 1) for key, value in seconds.items()},
        "checks": checks,
        "reload": found["reload"],
        "runs": {run: found[run] for run in ("one", "backwards", "two")},
    }


if __name__ == "__main__":
    main()
