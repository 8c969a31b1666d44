"""What `llava-packing train` refuses before anything is loaded, in one message that names key, file and sample."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import fuzz_readers
import pytest
import yaml
from launch_files import need_a_host
from PIL import Image

from llava_packing_tower.cli.main import main
from llava_packing_tower.data import samples
from llava_packing_tower.data.media_check import MediaCheck, check_data
from llava_packing_tower.integrations.llava.host import FoundHost
from llava_packing_tower.integrations.llava.hosts.llava_next import HOST as NEXT_HOST
from llava_packing_tower.integrations.llava.registry import find_host
from llava_packing_tower.train import data_note, folder_checks, launcher, preflight, resume, sequence_lengths
from llava_packing_tower.train.deepspeed_config import check_keys
from llava_packing_tower.utils.errors import UsageError

WITHOUT_LIGER = pytest.mark.skipif(find_spec("liger_kernel") is not None, reason="liger-kernel is installed")


def turns(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("mm_tunable_parts", "mm_vision_tower,mm_projector", "mm_tunable_parts names 'mm_projector'"),
        ("mm_vision_select_feature", "ptach", "mm_vision_select_feature: 'ptach' is unknown; the nearest is 'patch'"),
        ("mm_vision_select_layer", "-99", "selects hidden state -99, but a tower of"),
        ("mm_packing_attention", "sdpaa", "mm_packing_attention: 'sdpaa' is unknown; the nearest is 'sdpa'"),
        ("attn_implementation", "flash", "attn_implementation: 'flash' is unknown"),
        ("image_aspect_ratio", "anyrez", "image_aspect_ratio: 'anyrez' is unknown"),
        ("image_aspect_ratio", "anyres_max", "image_aspect_ratio: 'anyres_max' is unknown"),
        ("mm_projector_type", "mlp2_gelu", "mm_projector_type: 'mlp2_gelu' is unknown"),
        ("mm_patch_merge_type", "spatia", "mm_patch_merge_type: 'spatia' is unknown"),
        ("version", "v99", "version: 'v99' is unknown"),
        ("mm_tunable_parts", ",", "mm_tunable_parts ',' names no part"),
        ("fp16", "true", "bf16 and fp16 exclude each other: --fp16 null"),
        ("per_device_train_batch_size", "0", "per_device_train_batch_size must be at least 1, got 0"),
        ("learning_rate", "-1e-4", "learning_rate must be at least 0, got -0.0001"),
        ("seed", "4294967296", "seed must be 0 to 4294967295, got 4294967296"),
        ("warmup_ratio", "7", "must be 0 to 1, got 7.0"),
        ("adam_beta2", "1", "adam_beta2 must be at least 0 and below 1, got 1.0"),
        ("optim", "adamw", "optim: 'adamw' is unknown; the nearest is 'adam"),
        ("lr_scheduler_type", "cosin", "lr_scheduler_type: 'cosin' is unknown; the nearest is 'cosine', of "),
        ("num_train_epochs", "-1", "num_train_epochs must be at least 0, got -1"),
        ("eval_strategy", "steps", "strategy: LLaVA's train.py has no data to evaluate on"),
        ("lr_scheduler_type", "reduce_lr_on_plateau", "reduce_lr_on_plateau needs evaluations"),
        ("dataloader_persistent_workers", "true", "persistent_workers: needs dataloader_num_workers"),
        ("report_to", "mlflow", "report_to: mlflow needs the package mlflow, which is not installed"),
        ("optim", "adamw_bnb_8bit", "optim: adamw_bnb_8bit needs the package bitsandbytes, which is not installed"),
        ("dataloader_drop_last", "true", "1 samples are fewer than the 8 x 1 of a micro-batch on every process"),
        ("report_to", "wandbb", "report_to: 'wandbb' is unknown; known are none, all, "),
        ("resume_from_checkpoint", "run1/checkpoint-8", "resume_from_checkpoint: LLaVA's train.py does not read it"),
        ("load_best_model_at_end", "true", "load_best_model_at_end: LLaVA's train.py has no data to evaluate on"),
        ("neftune_noise_alpha", "5", "neftune_noise_alpha: transformers adds its noise to the embeddings of a batch"),
        ("lr_scheduler_type", "cosine_with_min_lr", "cosine_with_min_lr needs min_lr_rate in lr_scheduler_kwargs"),
        ("lr_scheduler_kwargs", '{"min_lr": 1e-6}', "lr_scheduler_kwargs: linear has no 'min_lr', but nothing to set"),
        ("lr_scheduler_kwargs", "min_lr", "lr_scheduler_kwargs must be a mapping, got 'min_lr'"),
        ("accelerator_config", '{"dispatch_batches": true}', "dispatch_batches has one process cut batches for all"),
        ("optim", "galore_adamw", "optim: galore_adamw needs the model, and LLaVA's trainer makes its optimizer with"),
        ("optim", "paged_lion_32bit", "optim: paged_lion_32bit needs the package bitsandbytes, which is not installed"),
        ("mm_packing_fusion", "channel", "mm_packing_fusion has no effect with one tower"),
        ("model_max_length", "0", "model_max_length must be at least 1, got 0"),
        ("mm_packing_batch_tokens", "0", "mm_packing_batch_tokens must be a whole number of tokens, at least 1, got 0"),
        ("mm_packing_over_budget", "cut", "mm_packing_over_budget is 'cut'; it is one of refuse, truncate"),
        ("mm_packing_over_budget", "truncate", "truncate has no effect without mm_packing_batch_tokens"),
        ("mm_packing_loss_average", "token", "mm_packing_loss_average is 'token'; it is one of micro_batches, tokens"),
        pytest.param("use_liger_kernel", "true", "liger-kernel is not installed: pip install", marks=WITHOUT_LIGER),
        ("mm_packing_profile", "0", "mm_packing_profile must be at least 1, got 0"),
        ("mm_packing_peak_tflops", "-1", "mm_packing_peak_tflops must be above 0, got -1.0"),
        ("vision_tower", "vit_packing", "vision_tower: vit_packing is neither a folder here nor a hub id, owner/name"),
        ("model_name_or_path", "llama", "model_name_or_path: llama is neither a folder here nor a hub id, owner/name"),
        ("output_dir", __file__, "is a file, not a folder"),
        ("output_dir", f"{__file__}/run1", "is a file, not a folder"),
        ("pretrain_mm_mlp_adapter", "/no/such.bin", "pretrain_mm_mlp_adapter: /no/such.bin does not exist"),
        ("model_name_or_path", "checkpoints/of/mine", "model_name_or_path: folder checkpoints/of/mine does not exist"),
        ("tf32", "true", "tf32: needs an NVIDIA GPU of Ampere or newer, and this run is on the CPU"),
        ("data_path", "/no/data.json", "data_path: /no/data.json does not exist"),
    ],
)
def test_a_value_that_would_fail_late_or_be_ignored(files, tmp_path, key, value, said):
    tower = tmp_path / "vit_packing"
    tower.mkdir()
    (tower / "config.json").write_text('{"model_type": "llava_vit_packing", "num_hidden_layers": 4}')
    words = [*(["--vision_tower", str(tower)] if key != "vision_tower" else []), f"--{key}", value]
    with pytest.raises(UsageError) as caught:
        launcher.make_plan(files(), words, num_processes=1)
    assert said in str(caught.value)


def test_what_is_right_passes(files):
    need_a_host()
    for words in (
        ["--image_aspect_ratio", "anyres_max_9"],
        ["--mm_projector_type", "mlp2x_gelu", "--mm_patch_merge_type", "spatial_unpad"],
        ["--attn_implementation", "kernels-community/flash-attn"],
        ["--version", "plain"],
        ["--tf32", "false"],
        ["--max_steps", "3", "--num_train_epochs", "-1", "--eval_strategy", "no"],
        ["--num_train_epochs", "0"],
        ["--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr_rate": 0.1}'],
        ["--lr_scheduler_type", "polynomial", "--lr_scheduler_kwargs", '{"power": 2.0}'],
        ["--accelerator_config", '{"split_batches": true}', "--label_smoothing_factor", "0"],
        ["--dataloader_drop_last", "true", "--per_device_train_batch_size", "1"],
    ):
        assert launcher.make_plan(files(), words, num_processes=1).samples >= 1
    names = preflight.conversations(find_host())
    assert {"v1", "plain", "llava_llama_2"} <= set(names)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("remove_unused_columns", "true", "remove_unused_columns: LLaVA's samples would lose their images"),
        ("label_smoothing_factor", "0.1", "label_smoothing_factor: transformers smooths the labels of the text, but"),
    ],
)
def test_a_value_that_fails_with_images_alone(files, tmp_path, key, value, said):
    need_a_host()
    config, words = files(), [f"--{key}", value]
    assert launcher.make_plan(config, words, num_processes=1).samples == 1  # of text
    Image.new("RGB", (30, 20)).save(tmp_path / "images" / "photo.png")
    sample = {"image": "photo.png", "conversations": turns("<image>q", "a")}
    (tmp_path / "data.json").write_text(json.dumps([{"conversations": turns("q", "a")}, sample]))
    with pytest.raises(UsageError, match=said):
        launcher.make_plan(config, words, num_processes=1)


def test_tf32_asks_the_gpu(monkeypatch):
    import torch

    for capability, refused in (((7, 5), True), ((8, 0), False), ((9, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        if refused:
            with pytest.raises(UsageError, match=r"compute capability 7\.5"):
                preflight.check_precision({"tf32": True}, "gpu")
        else:
            preflight.check_precision({"tf32": True}, "gpu")


@pytest.mark.parametrize(
    ("key", "file", "content", "said"),
    [
        ("vision_tower", "config.json", None, "has no config.json"),
        ("vision_tower", "config.json", "[]", "config.json must hold a JSON object, found list"),
        ("vision_tower", "config.json", '{"model_type": "llava_vit_packing",', "config.json is not valid JSON"),
        ("vision_tower", "config.json", '{"num_hidden_layers": "4"}', "is damaged: num_hidden_layers is '4'"),
        ("vision_tower", "config.json", '{"model_type": "qwen2", "vocab_size": 9}', "a language model (model_type qw"),
        ("vision_tower", "config.json", '{"a": 1}', "has no model.safetensors or pytorch_model.bin"),
        ("vision_tower", "config.json", '{"model_type": "llava_vit_packing", "hidden_size": []}', "hidden_size in its"),
        ("vision_tower", "preprocessor_config.json", "{", "preprocessor_config.json is damaged"),
        ("model_name_or_path", "config.json", None, "has no config.json"),
        ("model_name_or_path", "config.json", "{", "config.json is damaged"),
        ("model_name_or_path", "config.json", "[1]", "config.json must hold a JSON object, found list"),
        (
            "model_name_or_path",
            "config.json",
            '{"model_type": "opt"}',
            "says model_type opt, for which LLaVA has no decoder",
        ),
        ("model_name_or_path", "tokenizer.json", '{"version": 1}', "tokenizer.json is damaged"),
        ("model_name_or_path", "tokenizer.model", "no model", "tokenizer.model is damaged"),
        (
            "pretrain_mm_mlp_adapter",
            "mm_projector.bin",
            "half a file",
            "mm_projector.bin is not a complete file of torch.save",
        ),
    ],
)
def test_a_damaged_folder_names_key_and_file(files, tmp_path, key, file, content, said):
    need_a_host()
    folder = tmp_path / "llama_packing"
    folder.mkdir()
    if file != "config.json":
        (folder / "config.json").write_text("{}")
    if content is not None:
        (folder / file).write_text(content)
    value = folder / file if key == "pretrain_mm_mlp_adapter" else folder
    with pytest.raises(UsageError, match=f"^{key}: ") as caught:
        launcher.make_plan(files(), [f"--{key}", str(value)], num_processes=1)
    assert said in str(caught.value)


def test_a_folder_that_is_no_tower(files, tmp_path):
    """Named as one of ours, alone and beside another."""
    need_a_host()
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    for name in ("packing:{}/bert", "packing:{0}/tower_packing + packing:{0}/bert"):
        said = r"^vision_tower: .*bert/config\.json: no packed encoder for model_type 'bert'"
        with pytest.raises(UsageError, match=said):
            launcher.make_plan(files(), ["--vision_tower", name.format(tmp_path)], num_processes=1)


def test_several_values_for_one(files):
    need_a_host()
    with pytest.raises(UsageError, match=r"mm_tunable_parts: expected one value, got 2"):
        launcher.make_plan(files(mm_tunable_parts=["mm_vision_tower", "mm_mlp_adapter"]), num_processes=1)


def host_with(tmp_path: Path, train: str, *modules: str) -> FoundHost:
    """A host of a few lines, with these classes of decoders."""
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "train.py").write_text(train)
    (tmp_path / "model" / "language_model").mkdir(parents=True)
    for name in modules:
        (tmp_path / "model" / "language_model" / f"{name}.py").write_text("")
    return FoundHost(NEXT_HOST, tmp_path, "1")


NEXT_TRAIN = """
def get_model(model_args):
    if model_args.vision_tower is not None:
        if "vicuna" in model_args.model_name_or_path.lower() or "llama" in model_args.model_name_or_path.lower():
            model = 1
        elif "qwen" in model_args.model_name_or_path.lower():
            if "moe" in model_args.model_name_or_path.lower():
                model = 2
        elif "gemma" in model_args.model_name_or_path.lower():
            model = 3
        else:
            raise ValueError("Unknown model class")

def train():
    if "vicuna" in model_args.model_name_or_path.lower() or "llama" in model_args.model_name_or_path.lower():
        tokenizer = 1
    elif "qwen" in model_args.model_name_or_path.lower():
        tokenizer = 2
"""


def test_the_host_must_find_a_class_for_the_decoder(tmp_path):
    host = host_with(tmp_path, NEXT_TRAIN, "llava_llama")
    assert folder_checks.path_words(host) == ("vicuna", "llama", "qwen")
    folder_checks.check_decoder("lmsys/Vicuna-7b", host)
    for name in ("owner/moe", "gpt/2", "gemma-2b"):  # of the last, no tokenizer would be made
        with pytest.raises(UsageError, match="none of vicuna, llama, qwen: rename the folder"):
            folder_checks.check_decoder(name, host)
    decoder = tmp_path / "qwen_run"
    decoder.mkdir()
    (decoder / "config.json").write_text('{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}')
    with pytest.raises(UsageError, match=r"is a LlavaQwenForCausalLM, a class that the LLaVA in .* does not have"):
        folder_checks.check_decoder(str(decoder), host)
    (tmp_path / "model" / "language_model" / "llava_qwen.py").write_text("class LlavaQwenForCausalLM:\n    pass\n")
    folder_checks.check_decoder(str(decoder), host)


def test_whole_projectors_of_either_format_pass(tmp_path):
    import torch

    for new in (True, False):
        file = tmp_path / f"{new}.bin"
        torch.save({"w": torch.ones(3)}, file, _use_new_zipfile_serialization=new)
        folder_checks.check_adapter(file)
    whole = (tmp_path / "True.bin").read_bytes()
    (tmp_path / "cut.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"cut\.bin is not a complete file"):
        folder_checks.check_adapter(tmp_path / "cut.bin")


@pytest.mark.parametrize(
    ("device", "values", "said"),
    [
        ("cpu", {"bf16": True}, None),
        ("cpu", {"fp16": True}, "fp16: needs a GPU, and this run is on the CPU"),
        ("cpu", {"fp16_full_eval": True}, "fp16_full_eval: needs a GPU"),
        ("gpu", {"fp16": True}, None),
        (
            "gpu",
            {"bf16": True},
            r"bf16: needs an NVIDIA GPU of Ampere or newer, .* compute capability 6\.1: --bf16 null",
        ),
        ("gpu", {"bf16": False, "fp16": True}, None),
        ("gpu", {"bf16_full_eval": True, "fp16_full_eval": True}, "bf16_full_eval and fp16_full_eval exclude"),
    ],
)
def test_number_formats_of_the_hardware(monkeypatch, device, values, said):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 1))
    with pytest.raises(UsageError, match=said) if said else contextlib.nullcontext():
        preflight.check_precision(values, device)


# ---------------------------------------------------------------- DeepSpeed


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ([], "must be a mapping"),
        ({"gradient_cliping": 1.0}, "gradient_cliping is unknown; the nearest is 'gradient_clipping'"),
        ({"zero_optimisation": {"stage": 3}}, "zero_optimisation is unknown; the nearest is 'zero_optimization'"),
        ({"overlap_comm": True}, "overlap_comm is unknown; it belongs to zero_optimization"),
        ({"zzz": 1}, "zzz is unknown; DeepSpeed .* does not know this key, the nearest is"),
        ({"bf16": {"enabld": True}}, r"bf16\.enabld is unknown; the nearest is 'enabled'"),
        ({"fp16": {"loss_scal": 0}}, r"fp16\.loss_scal is unknown; the nearest is 'loss_scale'"),
        ({"optimizer": {"type": "AdamW", "parms": {}}}, r"optimizer\.parms is unknown; the nearest is 'params'"),
        ({"scheduler": {"typ": "WarmupLR"}}, r"scheduler\.typ is unknown; the nearest is 'type'"),
        (
            {"activation_checkpointing": {"partition_activation": True}},
            r"activation_checkpointing\.partition_activation is unknown; the nearest is 'partition_activations'",
        ),
        ({"tensorboard": {"path": "x"}}, r"tensorboard\.path is unknown; "),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"pin_memroy": True}}},
            r"zero_optimization\.offload_param\.pin_memroy is unknown; the nearest is 'pin_memory'",
        ),
        ({"fp16": True}, "fp16 must be a mapping, got True"),
        ({"zero_optimization": 2}, "must be a mapping"),
        ({"zero_optimization": {"stage": "2"}}, r"stage must be 0, 1, 2 or 3, got '2'"),
        ({"zero_optimization": {"stage": True}}, "stage must be 0, 1, 2 or 3, got True"),
        (
            {"zero_optimization": {"stage": 3, "overlap_com": True}},
            "overlap_com is unknown; the nearest is 'overlap_comm'",
        ),
    ],
)
def test_a_deepspeed_configuration(config, said):
    pytest.importorskip("deepspeed", reason="its source has the keys")
    with pytest.raises(UsageError, match=said):
        check_keys(config, "zero.json")


def test_the_shipped_deepspeed_configurations_have_known_keys():
    from llava_packing_tower.train.deepspeed_config import CONFIGS, zero_stage

    for name, stage in (("zero2.json", 2), ("zero2_nvlink.json", 2), ("zero3.json", 3), ("zero3_offload.json", 3)):
        config = json.loads((CONFIGS / name).read_text())
        check_keys(config, name)
        assert zero_stage(config) == stage
    check_keys({"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": "auto"}}, "x")


@pytest.mark.newest
def test_keys_that_deepspeed_reads_pass():
    """Every section that its documentation, and transformers', has in examples of both supported versions."""
    pytest.importorskip("deepspeed", reason="its source has the keys")
    adam = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}
    warmup = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto", "total_num_steps": "auto"}
    config = {
        "_comment": "ours",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "prescale_gradients": False,
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "optimizer": {"type": "AdamW", "params": adam},
        "scheduler": {"type": "WarmupDecayLR", "params": warmup},
        "fp16": {
            "enabled": "auto",
            "auto_cast": False,
            "loss_scale": 0,
            "loss_scale_window": 1000,
            "initial_scale_power": 16,
            "hysteresis": 2,
            "consecutive_hysteresis": False,
            "min_loss_scale": 1,
        },
        "bf16": {"enabled": "auto", "immediate_grad_update": True},
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "nvme", "nvme_path": "/x", "pin_memory": True, "buffer_count": 4},
            "offload_param": {"device": "cpu", "pin_memory": True, "buffer_size": 1e8, "max_in_cpu": 1e9},
            "overlap_comm": True,
            "contiguous_gradients": True,
            "sub_group_size": 1e9,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9,
            "zero_quantized_weights": True,
            "zero_hpz_partition_size": 16,
            "zero_quantized_gradients": True,
        },
        "aio": {"block_size": 262144, "queue_depth": 32, "thread_count": 1, "single_submit": False},
        "activation_checkpointing": {"partition_activations": True, "cpu_checkpointing": True, "profile": False},
        "flops_profiler": {"enabled": False, "profile_step": 1, "module_depth": -1, "top_modules": 1},
        "comms_logger": {"enabled": True, "verbose": False, "prof_all": True, "debug": False},
        "tensorboard": {"enabled": False, "output_path": "x", "job_name": "y"},
        "wandb": {"enabled": False, "project": "x"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "checkpoint": {"tag_validation": "Warn", "load_universal": False},
        "autotuning": {"enabled": False, "arg_mappings": {"train_batch_size": "--b"}},
        "data_efficiency": {"enabled": False, "seed": 1234, "data_routing": {"enabled": False}},
    }
    check_keys(config, "x")


def test_a_key_given_twice(files, tmp_path):
    need_a_host()
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 2, "stage": 3}}')
    with pytest.raises(UsageError, match=r"zero\.json is not valid JSON: stage is given twice"):
        launcher.make_plan(files(), num_processes=1)


# ---------------------------------------------------------------- readers


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: \xe9t\xe9\n", "is not UTF-8"),
        (b"{a: b}: c\n", "line 1: a key must be text"),
        (b"? [a, b]\n: c\n", "line 1: a key must be text"),
        (b"a: [1\n", "is not valid YAML"),
        (b"- a\n", "must hold `key: value` lines"),
        (b"", "must hold `key: value` lines"),
        (b"a: 1\na: 2\n", "a is given twice"),
    ],
)
def test_a_damaged_yaml_ends_in_one_line(tmp_path, capsys, content, said):
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    assert main(["train", str(file), "--dry_run"]) == 2
    err = capsys.readouterr().err
    assert said in err and "run.yaml" in err and err.count("\n") == 1


def test_no_pipe_and_no_device_is_read(tmp_path, capsys):
    for name in ("/dev/zero", str(tmp_path)):
        assert main(["train", name, "--dry_run"]) == 2
        assert f"{name} is not a regular file" in capsys.readouterr().err


# ---------------------------------------------------------------- data


def write(tmp_path: Path, entries: object, name: str = "data.json") -> Path:
    file = tmp_path / name
    file.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return file


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ("[{", "data.json is damaged"),
        ({}, "must hold a list of samples"),
        ([], "must hold a list of samples, found none"),
        ([1], "entry 0 is not a sample, found int"),
        ([{"id": "x"}], "sample x: no conversations"),
        ([{"id": "x", "conversations": []}], "sample x: no conversations"),
        ([{"id": "x", "conversations": [{"from": "human"}]}], "sample x: a turn must have a value"),
        ([{"id": "x", "conversations": [{"from": "robot", "value": "a"}]}], "got from 'robot'"),
        ([{"conversations": turns("a", "b")}, {"conversations": "text"}], "sample 1: no conversations"),
        ([{"id": "x", "image": "a.png", "conversations": turns("<image> <image>", "b")}], "x: 1 images, 2 <image>"),
        ([{"id": "x", "image": ["a.png", "a.png"], "conversations": turns("<image>", "b")}], "x: 2 images, 1 <image>"),
        ([{"id": "x", "conversations": turns("<image>", "b")}], "x: 0 images, 1 <image>"),
        ([{"id": "x", "image": "gone.png", "conversations": turns("<image>", "b")}], "gone.png: No such file"),
        (
            [{"id": "x", "image": "data.json", "conversations": turns("<image>", "b")}],
            "data.json cannot be read as an image",
        ),
        ([{"id": "x", "image": 7, "conversations": turns("<image>", "b")}], "sample x: an image is named 7"),
    ],
)
def test_damaged_data_name_file_and_sample(tmp_path, entries, said):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    file = write(tmp_path, entries)
    with pytest.raises(ValueError, match=r"data\.json") as caught:
        check_data(str(file), MediaCheck({"image": str(tmp_path)}, True))
    assert said in str(caught.value)


def test_rows_of_text_alone_may_have_an_empty_image(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    entries = [
        {"id": str(n), "image": value, "conversations": turns("q", "a")} for n, value in enumerate((None, "", []))
    ]
    entries.append({"id": "p", "image": "a.png", "conversations": turns("<image>q", "a")})
    file = write(tmp_path, entries)
    assert check_data(str(file), MediaCheck({"image": str(tmp_path)}, False)) == 4
    samples.drop_empty_media(entries)
    assert ["image" in entry for entry in entries] == [False, False, False, True]


def test_every_file_of_a_mixture_is_checked(tmp_path):
    good = [{"conversations": turns("q", "a")}] * 3
    write(tmp_path, good, "a.json")
    write(tmp_path, good[:2], "b.json")
    write(tmp_path, "\n".join(json.dumps(entry) for entry in good), "c.jsonl")
    write(tmp_path, f"datasets:\n- json_path: {tmp_path}/a.json\n- json_path: {tmp_path}/c.jsonl\n", "mix.yaml")
    assert check_data(f"{tmp_path}/{{a,b}}.json", MediaCheck({}, False)) == 5
    assert check_data(f"{tmp_path}/mix.yaml", MediaCheck({}, False)) == 6
    for strategies, count in ((("first:50%", "end:1"), 3), (("all", "random:2"), 5), (("first:9", "random:34%"), 5)):
        entries = zip(("a.json", "c.jsonl"), strategies, strict=True)
        listed = [{"json_path": f"{tmp_path}/{name}", "sampling_strategy": how} for name, how in entries]
        write(tmp_path, yaml.safe_dump({"datasets": listed}), "mix.yaml")
        assert check_data(f"{tmp_path}/mix.yaml", MediaCheck({}, False)) == count
    unknown = f"datasets:\n- json_path: {tmp_path}/a.json\n  sampling_strategy: "
    for content, said in (
        (f"{unknown}frist:50%\n", "a.json: sampling_strategy 'frist:50%' is not all, or first, end or random with"),
        (f"{unknown}first\n", "sampling_strategy 'first' is not all"),
        ("datasets: 1\n", "has no list `datasets:`"),
        ("datasets:\n- a: b\n", "dataset 1 has no json_path"),
        ("datasets:\n- json_path: ~/a.json\n", "dataset 1: json_path begins with ~, which LLaVA does not replace"),
        ("datasets: [\n", "is not valid YAML"),
        (f"datasets:\n- json_path: {tmp_path}/d.json\n", "d.json does not exist"),
    ):
        write(tmp_path, content, "mix.yaml")
        with pytest.raises(ValueError, match=said):
            check_data(f"{tmp_path}/mix.yaml", MediaCheck({}, False))


def test_a_kind_of_data_that_the_host_does_not_open(tmp_path):
    """LLaVA 1.x opens one JSON file, LLaVA-NeXT lists of them too; neither takes JSON lines or .yml by itself."""
    need_a_host()
    found = find_host()
    lists = ("a.yaml", "{a,b}.json")
    preflight.check_format("a.json", found)
    for name in ("a.jsonl", "a.yml", *(lists if found.host.name == "llava_v1" else ())):
        with pytest.raises(UsageError, match=r"^data_path: LLaVA.* opens no .* here, but a .json file"):
            preflight.check_format(f"{tmp_path}/{name}", found)
    for name in lists if found.host.name == "llava_next" else ():
        preflight.check_format(f"{tmp_path}/{name}", found)


def test_many_samples_are_checked_quickly(tmp_path):
    import time

    entries = [{"id": n, "conversations": turns("question " * 20, "answer " * 20)} for n in range(100_000)]
    entries[77_777]["conversations"] = []
    started = time.process_time()
    with pytest.raises(ValueError, match="sample 77777"):
        samples.check_turns(entries)
    MediaCheck({}, True).look(entries)
    assert time.process_time() - started < 5


def test_the_checks_need_no_torch():
    modules = "llava_packing_tower.train.preflight, llava_packing_tower.data.media_check"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


# ---------------------------------------------------------------- model_max_length


def lengths(tmp_path: Path, limit: int, samples: list[dict], **values: object) -> sequence_lengths.LengthCheck:
    """A tower of 8 x 8 patches and a tokenizer that makes a token of each word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"image_size": 112, "patch_size": 14}')
    check = sequence_lengths.LengthCheck(
        {"model_name_or_path": str(tmp_path), "image_folder": str(tmp_path), **values}, tmp_path, limit
    )
    check.look(samples)
    return check


def test_samples_that_are_cut_are_named(tmp_path):
    samples = [
        {"id": "short", "image": "a.png", "conversations": turns("<image> q", "yes no")},
        {"id": "long", "image": "a.png", "conversations": turns("<image> q", "word " * 40)},
        {"id": "two", "image": ["a.png", "a.png"], "conversations": turns("<image><image> q", "yes")},
        {"conversations": turns("q", "word " * 101)},
    ]
    said = lengths(tmp_path, 100, samples).result()
    assert said.startswith("3 of 4 samples are longer than model_max_length 100 and will be cut:")
    assert said.splitlines()[1:] == [
        "  sample long: at least 105 tokens, 64 of them of images",
        "  sample two: at least 130 tokens, 128 of them of images",
        "  sample 3: at least 102 tokens, 0 of them of images",
    ]
    assert lengths(tmp_path, 130, samples).result() is None
    # A resampler, or a projector that merges, makes fewer tokens than there are patches: nothing is claimed.
    for fewer in ({"mm_resampler_type": "perceiver"}, {"mm_projector_type": "pooler"}):
        assert "sample long" not in (lengths(tmp_path, 100, samples, **fewer).result() or "")
    # "plain" leaves the questions out.
    asked = [{"id": "x", "conversations": turns("word " * 200, "yes")}]
    assert lengths(tmp_path, 100, asked, version="plain").result() is None


def test_samples_above_the_token_budget_are_refused_by_name(tmp_path):
    samples = [
        {"id": "short", "image": "a.png", "conversations": turns("<image> q", "yes no")},
        {"id": "long", "image": "a.png", "conversations": turns("<image> q", "word " * 40)},
        {"conversations": turns("q", "word " * 101)},
    ]
    budget = {"mm_packing_batch_tokens": 90}
    with pytest.raises(ValueError, match="mm_packing_batch_tokens 90: 2 of 3 samples have more tokens") as caught:
        lengths(tmp_path, 1000, samples, **budget).result()
    assert str(caught.value).splitlines()[1:] == [
        "  sample long: at least 105 tokens, 64 of them of images",
        "  sample 2: at least 102 tokens, 0 of them of images",
    ]
    assert lengths(tmp_path, 1000, samples, mm_packing_batch_tokens=105).result() is None
    assert lengths(tmp_path, 1000, samples, mm_packing_over_budget="truncate", **budget).result() is None
    # What model_max_length cuts has no more than its tokens.
    assert lengths(tmp_path, 90, samples, **budget).result().startswith("2 of 3 samples are longer than model_max")


def test_a_limit_that_leaves_nothing_to_train_on(tmp_path):
    text = {"id": "text", "conversations": turns("q", "yes")}
    image = {"id": "x", "image": "a.png", "conversations": turns("<image> q", "yes no")}
    with pytest.raises(
        ValueError, match="model_max_length 64 leaves no answer about an image to train on:\n  sample x"
    ):
        lengths(tmp_path, 64, [text, image]).result()
    assert lengths(tmp_path, 66, [text, image]).result().startswith("1 of 2 samples")
    with pytest.raises(ValueError, match="model_max_length 3 leaves no answer to train on"):
        lengths(tmp_path, 3, [{"conversations": turns("a b c d", "e")}]).result()


def test_lengths_at_native_resolution_follow_the_images(tmp_path):
    samples = []
    for name, size in (("wide", (280, 28)), ("tall", (56, 140))):  # 2 x 20 and 10 x 4 patches
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
        samples.append({"id": name, "image": f"{name}.png", "conversations": turns("<image>", "a " * len(name) * 3)})
    values = {"image_aspect_ratio": "native"}
    assert lengths(tmp_path, 60, samples, **values).result() is None
    said = lengths(tmp_path, 45, samples, **values).result()
    assert "wide: at least 52 tokens, 40 of" in said and "tall: at least 52 tokens, 40 of" in said
    merged = {**values, "mm_projector_type": "spatial_merge"}  # 1 x 10 and 5 x 2 tokens
    assert "wide: at least 22 tokens, 10 of" in lengths(tmp_path, 20, samples, **merged).result()


def test_the_plan_says_what_is_cut(files, tmp_path):
    need_a_host()
    lengths(tmp_path / "llama", 1, [])
    rows = [{"id": "a", "conversations": turns("q", "w " * 50)}, {"id": "b", "conversations": turns("q", "w")}]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    plan = launcher.make_plan(files(), ["--model_max_length", "20"], num_processes=1)
    assert "1 of 2 samples are longer than model_max_length 20 and will be cut:\n  sample a: at" in plan.describe()
    assert "warning" not in launcher.make_plan(files(), ["--model_max_length", "60"], num_processes=1).describe()
    budget = ["--model_max_length", "60", "--mm_packing_batch_tokens", "40"]
    with pytest.raises(UsageError, match=r"^mm_packing_batch_tokens 40: 1 of 2 samples have more tokens"):
        launcher.make_plan(files(), budget, num_processes=1)


def test_the_plan_says_that_data_changed(files, tmp_path):
    need_a_host()
    (tmp_path / "out").mkdir()
    fuzz_readers.make_marks(tmp_path / "out")
    plan = launcher.make_plan(files(deepspeed="-"), num_processes=1)
    said = f"data_path: {tmp_path}/data.json changed since the run began that saved checkpoint-3."
    assert f"  warning: {said}" in plan.describe() and plan.content()["warning"].startswith(said)
    order = tmp_path / "out" / "checkpoint-3" / resume.ORDER
    order.write_text(json.dumps({**json.loads(order.read_text()), "data": data_note.note_of(f"{tmp_path}/data.json")}))
    resume.mark_complete(order.parent)
    assert "warning" not in launcher.make_plan(files(deepspeed="-"), num_processes=1).describe()


def test_a_host_that_opens_the_data_itself_gets_no_empty_image():
    from llava_packing_tower.integrations.llava.methods import add_step
    from llava_packing_tower.integrations.llava.native_dataset import empty_media
    from llava_packing_tower.integrations.llava.patcher import Patches

    class Dataset:
        data_args = None

        def __init__(self, path):
            self.list_data_dict = [{"image": None}, {"image": "a.png"}, {"video": ""}]

    patches = Patches()
    add_step(Dataset, "LazySupervisedDataset.__init__", "empty_media", empty_media, patches)
    assert Dataset("x").list_data_dict == [{}, {"image": "a.png"}, {}]
    patches.undo()
    assert Dataset("x").list_data_dict[0] == {"image": None}
