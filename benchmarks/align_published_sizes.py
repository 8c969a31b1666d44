"""`llava-packing align` on random checkpoints of the published sizes, made here by transformers: nothing is downloaded.

    python benchmarks/align_published_sizes.py                       # on a GPU: bfloat16, flash-attn
    python benchmarks/align_published_sizes.py --sizes dinov3_vitl16 --eager --out align.json
    python benchmarks/align_published_sizes.py --layers 2 --device cpu --attention sdpa --image_size 224

Needs a transformers with the three families (4.56 or newer). A row passes if the largest difference from transformers
in float32 is at most twice that of transformers' own model in the same low precision. Options that are not named here
go to `align`. Exit status 0 if all rows of all sizes pass.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))

from llava_packing_tower.cli.main import main as llava_packing

# model class, config class, fields; the other fields have the published values by default
SIZES = {
    "siglip2_so400m": (
        "Siglip2VisionModel",
        "Siglip2VisionConfig",
        dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16),
    ),
    "aimv2_large_native": (
        "Aimv2VisionModel",
        "Aimv2VisionConfig",
        dict(
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=24,
            num_attention_heads=8,
            is_native=True,
            use_head=False,
        ),
    ),
    "aimv2_large_224": (
        "Aimv2VisionModel",
        "Aimv2VisionConfig",
        dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=24, num_attention_heads=8, use_head=False),
    ),
    "dinov3_vitl16": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        dict(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            num_register_tokens=4,
        ),
    ),
}
DEFAULT = ("siglip2_so400m", "aimv2_large_native", "dinov3_vitl16")


def make_checkpoint(size: str, folder: Path, device: str, layers: int | None) -> int:
    """Write a random checkpoint in bfloat16, every part of it visible in the output; returns its parameter count."""
    model_name, config_name, fields = SIZES[size]
    if layers:
        fields = {**fields, "num_hidden_layers": layers}
    torch.manual_seed(0)
    with torch.device(device):
        model = getattr(transformers, model_name)(getattr(transformers, config_name)(**fields))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                scale = parameter.dim() == 1 and not name.endswith("bias")  # of norms and LayerScale
                spread = 0.3 if parameter.dim() == 1 else 0.8 * parameter[0].numel() ** -0.5
                parameter.normal_(1.0 if scale else 0.0, spread)
    model.to(torch.bfloat16).save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def align(size: str, args: argparse.Namespace, rest: list[str]) -> dict:
    with tempfile.TemporaryDirectory(prefix=f"{size}.", dir=args.tmp) as folder:
        began = time.perf_counter()
        checkpoint, rows = Path(folder) / "original", Path(folder) / "rows.json"
        parameters = make_checkpoint(size, checkpoint, args.device, args.layers)
        made = time.perf_counter()
        print(f"\n{size}: {parameters / 1e6:.0f} M parameters, written in {made - began:.1f} s", flush=True)
        words = ["--ckpt", str(checkpoint), "--device", args.device, "--attention", args.attention]
        status = llava_packing(["align", *words, "--json", str(rows), *rest])
        seconds = time.perf_counter() - made
        found = json.loads(rows.read_text()) if rows.is_file() else []
    for row in found if args.device == "cuda" else ():  # in bfloat16 the allowed difference is twice transformers' own
        row["times_transformers_error"] = 2 * row["max_difference"] / row["allowed_difference"]
    return {"size": size, "parameters": parameters, "status": status, "seconds": round(seconds, 1), "rows": found}


def table(results: list[dict]) -> str:
    lines = [f"{'size':<20} {'test':<12} {'patches':>8} {'min cosine':>11} {'max diff':>9} {'allowed':>9} {'x own':>6}"]
    for result in results:
        for row in result["rows"]:
            times = row.get("times_transformers_error")
            lines.append(
                f"{result['size']:<20} {row['name']:<12} {row['tokens']:>8} {row['min_cosine'] or 0:>11.7f} "
                f"{row['max_difference'] or 0:>9.2e} {row['allowed_difference']:>9.2e} "
                f"{f'{times:.2f}' if times else '-':>6}  {'PASS' if row['passed'] else 'FAIL'}"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=DEFAULT)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--attention", default="flash_attention_2", help="of the packed encoder")
    parser.add_argument("--eager", action="store_true", help="eager blocks, no CUDA graphs: faster here")
    parser.add_argument("--layers", type=int, help="fewer layers than published, for a quick look")
    parser.add_argument("--tmp", help="folder for the checkpoints (0.8 GB at a time)")
    parser.add_argument("--out", help="also write everything to this JSON file")
    args, rest = parser.parse_known_args()
    if args.eager:
        os.environ.update(LLAVA_PACKING_FUSED="0", LLAVA_PACKING_CUDA_GRAPHS="0")
    transformers.utils.logging.disable_progress_bar()
    began = time.perf_counter()
    results = [align(size, args, rest) for size in args.sizes]
    summary = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "attention": args.attention,
        "fused": args.device == "cuda" and not args.eager,
        "seconds": round(time.perf_counter() - began, 1),
        "passed": all(result["status"] == 0 for result in results),
        "results": results,
    }
    print("\n" + table(results))
    print(json.dumps({key: value for key, value in summary.items() if key != "results"}))
    if args.out:
        Path(args.out).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return 0 if summary["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
