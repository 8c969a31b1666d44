"""Export a LLaVA checkpoint with a packing tower as a Hugging Face folder, for transformers and vLLM.

The checkpoint may be of LLaVA-NeXT or LLaVA 1.x, whole or a LoRA (which is merged). The result is complete or absent:
whatever cannot be exported is said before anything is written. Images, prompts and tokens are those of LLaVA.

  llava-packing export checkpoints/run1 --output_dir exported/run1
  llava-packing export checkpoints/run1 --output_dir exported/run1 --dtype bfloat16 --push_to_hub user/run1
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path

from ..utils.errors import UsageError
from ..utils.files import write_for_program
from ..utils.progress import progress

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
    parser.add_argument("--json", type=Path, help="also write what was made to this file")


def run(args: argparse.Namespace) -> int:
    from ..export.writer import export

    if args.push_to_hub:
        check_upload(args.push_to_hub)
    try:
        made = export(
            args.checkpoint,
            args.output_dir,
            dtype=args.dtype,
            base=args.model_base,
            conversation=args.conv_template,
            with_code=args.with_code,
            max_shard_size=args.max_shard_size,
            bar=partial(progress, in_bytes=True),
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    print(
        f"written to {made.folder}: {made.parameters / 1e6:.1f} million parameters in {made.dtype}, "
        f"conversation {made.conversation}"
    )
    address = upload(args.push_to_hub, made.folder) if args.push_to_hub else None
    if address is not None:
        print(f"uploaded to {address}")
    write_for_program(args.json, {**asdict(made), "uploaded_to": address})
    return 0


def check_upload(repository: str) -> None:
    """Raises ``UsageError`` where an upload cannot work, before the export is made for nothing."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UsageError(f"--push_to_hub {repository}: {error}") from error
    if constants.HF_HUB_OFFLINE:
        raise UsageError(f"--push_to_hub {repository}: HF_HUB_OFFLINE is set")
    if get_token() is None:
        raise UsageError(f"--push_to_hub {repository}: no token; run `hf auth login`, or set HF_TOKEN")


def upload(repository: str, folder: Path) -> str:
    """The address of the uploaded folder. Raises ``UsageError`` with what is left to do where the hub refuses it."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder))
    except Exception as error:  # whatever the network or the hub has against it
        raise UsageError(
            f"{folder} is complete, but was not uploaded: {error}\nTo upload it: hf upload {repository} {folder}"
        ) from error
