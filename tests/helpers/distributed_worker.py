"""One of two processes that train a tiny LLaVA under several engines; started by test_distributed.py with torchrun.

Rank 0 always has images, of other sizes each time; rank 1 never has one. Prints one JSON object per engine (rank 0).
"""

from __future__ import annotations

import gc
import json
import os
import sys
from functools import partial
from types import SimpleNamespace

import builder_patch  # noqa: F401

# isort: split
import torch
import torch.distributed as dist
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from torch import nn

from llava_packing_tower import LlavaViTPackingConfig, LlavaViTPackingModel, PackingImageProcessor
from llava_packing_tower.attention import dispatch
from llava_packing_tower.checkpoint.hashing import tensor_digest
from llava_packing_tower.train.history import gathered

STEPS, ACCUMULATION, RATE = 20, 2, 0.02
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 1, "patch_size": 4}
DECODER = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
}
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": ACCUMULATION,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "steps_per_print": 1000000,
}


def make_checkpoint(folder: str, words: int = DECODER["vocab_size"], limit: int = 200) -> None:
    """A whole LLaVA with its tower inside, as a finished training leaves it; image_newline as in anyres.

    words: of its vocabulary. limit: tokens of a sample.
    """
    torch.manual_seed(0)
    tower = os.path.join(folder, "vit_packing")
    LlavaViTPackingModel(LlavaViTPackingConfig(image_size=16, use_head=True, **TOWER)).save_pretrained(tower)
    PackingImageProcessor(size=16).save_pretrained(tower)
    config = LlavaConfig(
        **{**DECODER, "vocab_size": words},
        mm_vision_tower=tower,
        mm_hidden_size=TOWER["hidden_size"],
        mm_vision_select_layer=-2,  # the last block, the final norm and the head are not used
        mm_projector_type="mlp2x_gelu",
        mm_patch_merge_type="spatial_unpad",
        mm_tunable_parts="mm_vision_tower,mm_mlp_adapter,mm_language_model",
        image_aspect_ratio="native",
        mm_packing_min_patches=1,
        mm_packing_max_patches=64,
        mm_packing_video="frames",
        tokenizer_model_max_length=limit,
        use_cache=False,
    )
    model = LlavaLlamaForCausalLM(config).float()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.config.mm_packing_config = model.get_vision_tower().packing_config("checkpoint")
    model.save_pretrained(os.path.join(folder, "llava_tiny"))


def batch(rank: int, number: int) -> dict:
    """Two samples. Rank 0: ragged images, one or two in a sample; rank 1: text alone, sometimes much longer."""
    generator = torch.Generator().manual_seed(1000 * rank + number)
    lengths = [6 + number % 5, 9] if rank == 0 else [4, 5 + 20 * (number % 3)]
    ids = torch.zeros(2, max(lengths), dtype=torch.long)
    mask = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(3, DECODER["vocab_size"], (length,), generator=generator)
    labels = ids.masked_fill(~mask, -100)
    images = None
    if rank == 0:
        ids[0, 1] = ids[1, 1] = ids[1, 4] = -200
        labels = labels.masked_fill(ids == -200, -100)
        sides = [(4 * (1 + number % 6), 8), (12, 4 * (1 + number % 4)), (4, 4)]
        images = [torch.randn(3, *side, generator=generator) for side in sides]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "images": images}


def everything(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters, whole. Collective."""
    found = {}
    for name, parameter in model.named_parameters():
        with gathered(parameter):
            found[name] = parameter.detach().clone()
    return found


class Plain:
    """DDP and FSDP, trained as the Trainer would."""

    def __init__(self, model: nn.Module, wrap) -> None:
        self.model = wrap(model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=RATE, momentum=0.9)
        self.count = 0

    def __call__(self, **inputs):
        return self.model(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        (loss / ACCUMULATION).backward()

    def step(self) -> None:
        self.count += 1
        if self.count % ACCUMULATION == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def gradients(self, model: nn.Module) -> dict[str, torch.Tensor | None]:
        return {name: p.grad for name, p in model.named_parameters()}

    def parameters_whole(self, model: nn.Module) -> dict[str, torch.Tensor]:
        if type(self.model).__name__ != "FullyShardedDataParallel":
            return everything(model)
        with type(self.model).summon_full_params(self.model, writeback=False):
            return {
                name.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for name, p in model.named_parameters()
            }


class Deep:
    def __init__(self, model: nn.Module, stage: int, config: dict) -> None:
        import deepspeed

        optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
        self.model, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        assert self.model.zero_optimization_stage() == stage
        self.step, self.backward = self.model.step, self.model.backward

    def __call__(self, **inputs):
        return self.model(**inputs)

    def gradients(self, model: nn.Module) -> dict[str, torch.Tensor | None]:
        from deepspeed.utils import safe_get_full_grad

        return {name: safe_get_full_grad(p) for name, p in model.named_parameters()}

    def parameters_whole(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return everything(model)


def fsdp(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    from llava_packing_tower.models.layers import EncoderBlock

    policy = ModuleWrapPolicy({LlamaDecoderLayer, EncoderBlock})
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=cpu)


def fuse(encoder: nn.Module) -> None:
    """Fused blocks, as on a GPU, around an attention that runs on a CPU."""
    sdpa = dispatch.backend_module("sdpa")
    dispatch.BACKENDS["cpu_varlen"] = "cpu_varlen"
    dispatch._LOADED["cpu_varlen"] = SimpleNamespace(
        VARLEN=True, unsupported_reason=lambda *_: None, attend=sdpa.attend
    )
    encoder.attention_backend, encoder.fused = "cpu_varlen", True
    run = encoder.run

    def checked(*arguments, path, **options):
        assert path == "fused", path
        return run(*arguments, path=path, **options)

    encoder.run = checked


def count_passes(tower: nn.Module) -> list[int]:
    """The patches of each pass from here on."""
    seen, encode = [], tower._encode

    def counted(*args, **kwargs):
        packed, grids = encode(*args, **kwargs)
        seen.append(len(packed))
        return packed, grids

    tower._encode = counted
    return seen


def train(name: str, checkpoint: str) -> dict:
    name, _, blocks = name.partition("+")
    stage = int(name[-1]) if name.startswith("zero") else None
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "contiguous_gradients": False}
    config = {**DEEPSPEED, "zero_optimization": zero}
    keep = None
    if stage == 3:  # from here on transformers loads under zero.Init, and the tower partitions itself
        from transformers.integrations import HfDeepSpeedConfig

        keep = HfDeepSpeedConfig(config)
    model = LlavaLlamaForCausalLM.from_pretrained(checkpoint, torch_dtype=torch.float32)
    model.requires_grad_(True).train()
    model.gradient_checkpointing_enable()
    if blocks == "padded":  # LLaVA's own step
        model.config.mm_packing_decoder, model.config.mm_packing_full_logits = False, True
    if blocks == "passes":  # rank 0 needs several for its images, rank 1 one
        model.get_vision_tower().set_encoder_tokens(5)
    if blocks == "fused":
        fuse(model.get_vision_tower().vision_tower.encoder)
    start = everything(model)
    partitioned = sum(hasattr(p, "ds_id") for p in model.get_vision_tower().parameters())
    if stage is None:
        ddp = partial(nn.parallel.DistributedDataParallel, find_unused_parameters=False)
        engine = Plain(model, fsdp if name == "fsdp" else ddp)
    else:
        engine = Deep(model, stage, config)
    if stage == 3 and blocks != "passes":  # a block is one gather: hooks on it, none inside
        for block in model.get_vision_tower().vision_tower.encoder.layers:
            assert block._forward_pre_hooks
            assert not any(inner._forward_pre_hooks for inner in block.modules() if inner is not block)
    rank, losses, missing = dist.get_rank(), [], []
    passes = count_passes(model.get_vision_tower())
    for number in range(STEPS * ACCUMULATION):
        loss = engine(**batch(rank, number)).loss
        losses.append(loss.item())
        engine.backward(loss)
        if number == STEPS * ACCUMULATION - 1:
            missing = [key for key, gradient in engine.gradients(model).items() if gradient is None]
        engine.step()
    if stage == 3:  # evaluation runs collectives too
        model.eval()
        with torch.no_grad():
            engine(**batch(rank, 0))
    end = {key.removeprefix("module."): value for key, value in engine.parameters_whole(model).items()}
    digests: list = [None, None]
    dist.all_gather_object(digests, {key: tensor_digest(value) for key, value in end.items()})
    counts: list = [None, None]
    dist.all_gather_object(counts, passes)
    result = {
        "engine": f"{name}+{blocks}" if blocks else name,
        "start": {key: tensor_digest(value) for key, value in start.items()},
        "partitioned": partitioned,
        "losses": losses,
        "passes": counts,
        "without gradient": missing,
        "ranks differ in": [key for key in digests[0] if digests[0][key] != digests[1][key]],
        "unchanged": [key for key in start if torch.equal(start[key], end[key])],
    }
    del engine, model, keep
    gc.collect()
    if rank == 0:
        torch.save(end, os.path.join(os.path.dirname(checkpoint), f"{result['engine']}.pt"))
    return result


def main() -> None:
    folder, *engines = sys.argv[1:]
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        make_checkpoint(folder)
    dist.barrier()
    for name in engines:
        result = train(name, os.path.join(folder, "llava_tiny"))
        if dist.get_rank() == 0:
            with open(os.path.join(folder, "results.jsonl"), "a") as file:
                print(json.dumps(result), file=file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
