"""Export a LLaVA checkpoint with a packing tower as a Hugging Face folder, for transformers and vLLM.

The checkpoint may be of LLaVA-NeXT or LLaVA 1.x, whole or a LoRA (which is merged). The result is complete or absent:
whatever cannot be exported is said before anything is written. Images, prompts and tokens are those of LLaVA.

  llava-packing export checkpoints/run1 --output_dir exported/run1
  llava-packing export checkpoints/run1 --output_dir exported/run1 --dtype bfloat16 --push_to_hub user/run1
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..utils.errors import UsageError

DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="folder of a LLaVA checkpoint")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write; it must not exist or be empty")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: that of the checkpoint)")
    parser.add_argument("--model_base", type=Path, help="the model that a LoRA or a projector was trained on")
    parser.add_argument("--conv_template", help="LLaVA's conversation template (default: that of the training)")
    parser.add_argument(
        "--with_code", action="store_true", help="add the model's code, for use with trust_remote_code alone"
    )
    parser.add_argument("--max_shard_size", default="5GB", help="largest weight file (default: 5GB)")
    parser.add_argument("--push_to_hub", metavar="REPO", help="upload the folder to this repository of the hub")


def run(args: argparse.Namespace) -> int:
    from ..export.writer import export

    try:
        made = export(
            args.checkpoint,
            args.output_dir,
            args.dtype,
            args.model_base,
            args.conv_template,
            args.with_code,
            args.max_shard_size,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    print(
        f"written to {made.folder}: {made.parameters / 1e6:.1f} million parameters in {made.dtype}, "
        f"conversation {made.conversation}"
    )
    if args.push_to_hub:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(args.push_to_hub, exist_ok=True)
        print(f"uploaded to {api.upload_folder(repo_id=args.push_to_hub, folder_path=made.folder)}")
    return 0
