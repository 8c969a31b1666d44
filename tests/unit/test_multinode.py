"""Several machines: flags that are missing or contradict each other, and what torchrun is told; a hostfile."""

from __future__ import annotations

import json
import os
import re
import sys
from importlib.util import find_spec

import host_runs
import pytest
import torch

from llava_packing_tower.train.hostfile import check_hostfile, pack, unpack
from llava_packing_tower.train.multinode import Nodes
from llava_packing_tower.utils.errors import UsageError

FIXED = {"count": 3, "rank": 2, "address": "10.0.0.7", "port": 29500}


def test_machine_0_or_a_rendezvous():
    assert Nodes(**FIXED).torchrun(8) == [
        *("--nproc_per_node", "8", "--nnodes", "3", "--node_rank", "2"),
        *("--master_addr", "10.0.0.7", "--master_port", "29500"),
    ]
    met = Nodes(count=2, endpoint="head:4000", meeting="run7").torchrun(4)
    assert met[2:] == ["--nnodes", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "head:4000", "--rdzv_id", "run7"]
    near = Nodes(count=2, endpoint="localhost:4000").torchrun(1)
    assert near[-2:] == ["--local_addr", "127.0.0.1"] and "--local_addr" not in met
    alone = Nodes().torchrun(2)
    assert alone[:5] == ["--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port"] and alone[5].isdigit()


def test_what_stays_on_this_machine():
    assert Nodes().on_this_machine and Nodes(**{**FIXED, "address": "127.0.0.1"}).on_this_machine
    assert Nodes(count=2, endpoint="localhost:1").on_this_machine and Nodes(count=2, endpoint="[::1]:1").on_this_machine
    assert not Nodes(**FIXED).on_this_machine and not Nodes(count=2, endpoint="head:1").on_this_machine


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"count": 0}, "at least 1, got 0"),
        ({"rank": 0}, "give --nnodes too"),
        ({"endpoint": "a:1"}, "give --nnodes too"),
        ({"count": 2}, "needs --node_rank, --master_addr and --master_port, or --rdzv_endpoint"),
        ({**FIXED, "port": None}, "--nnodes 3 needs"),
        ({**FIXED, "rank": 3}, "must be 0 to 2, got 3"),
        ({**FIXED, "endpoint": "a:1"}, "takes the place"),
        ({**FIXED, "meeting": "x"}, "goes with --rdzv_endpoint"),
        ({"count": 2, "endpoint": "head"}, "must be HOST:PORT, got 'head'"),
    ],
)
def test_flags_that_do_not_fit(flags, message):
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        Nodes(**flags)


# ---------------------------------------------------------------- a hostfile: DeepSpeed, over pdsh and ssh

# ssh that stays here: nothing of the caller's environment; its words are joined and read by a shell, as sshd does.
SSH = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do [[ $1 == -o || $1 == -p ]] && shift; shift; done
machine=$1; shift
echo "$machine" >>"$(dirname "$0")/machines"
[[ "$*" == "hostname -I" ]] && { echo 127.0.0.1; exit 0; }
exec env -i HOME="$HOME" PATH="$PATH" bash -c "$*"
"""
# pdsh: the same words for every machine of -w, %n its number and %h its name; the worst exit status.
PDSH = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do [[ $1 == -w ]] && machines=$2; [[ $1 != -S ]] && shift; shift; done
words="$*" number=0 status=0
for machine in ${machines//,/ }; do
  command="${words//%n/$number}"
  ssh -x "$machine" "${command//%h/$machine}" & processes+=($!)
  number=$((number + 1))
done
for process in "${processes[@]}"; do wait "$process" || status=$?; done
exit "$status"
"""


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """pdsh and ssh in front of PATH; the folder that they are in."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("ssh", SSH), ("pdsh", PDSH)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


@pytest.mark.long  # the trainings of tests/hosts/test_host_training.py are started on two machines by hand
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    find_spec("llava") is None or find_spec("deepspeed") is None or torch.cuda.is_available(),
    reason="needs LLaVA and DeepSpeed on a machine without a GPU",
)
def test_a_hostfile_trains_on_its_machines(trainings, programs, tmp_path, monkeypatch):
    """The commands that DeepSpeed starts over ssh really train, with values that a shell would take for its own."""
    monkeypatch.setenv("LLAVA_PACKING_DISABLE_MENDS", "empty_groups")  # on every machine, or its line is in the log
    name = 'it\'s (1x1) $HOME; %n "two"\nlines'
    hostfile, output = tmp_path / "hosts.txt", tmp_path / "llava_llama_hostfile"
    hostfile.write_text("# two\nnode-a slots=1\n\nnode-b slots=1\n")
    command = [sys.executable, "-m", "llava_packing_tower", "train", str(trainings.config), "--hostfile", str(hostfile)]
    command += ["--output_dir", str(output), "--deepspeed", "configs/zero2.json", "--max_steps", "2"]
    done = host_runs.execute([*command, "--run_name", name], host_runs.environment(host_runs.NEXT))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all GPUs on the machines of" in done.stdout and "step 2/2  loss" in done.stdout
    assert "engine: DeepSpeedEngine, ZeRO stage 2, world size 2, backend gloo" in done.stdout
    assert "empty_groups" not in done.stdout and "compat patch cuda_sync" in done.stderr
    assert {"node-a", "node-b"} == set((programs / "machines").read_text().split())
    assert torch.load(output / "training_args.bin", weights_only=False).run_name == name
    assert json.loads((output / "packing_tower.json").read_text())["step"] == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("# nothing\n", "lists no machine"),
        ("node-a\n", "line 1: expected a new `name slots=N`, got 'node-a'"),
        ("node-a slots=2\n\nnode-a slots=2\n", "line 3"),
        ("node-a slots=0\n", "line 1"),
    ],
)
def test_hostfiles_that_deepspeed_would_not_read(tmp_path, text, message):
    """A missing one costs a warning there, and the training runs on one machine."""
    if text is not None:
        (tmp_path / "hosts.txt").write_text(text)
    with pytest.raises(UsageError, match=message):
        check_hostfile(tmp_path / "hosts.txt")


def test_pdsh_is_asked_for(tmp_path, programs, monkeypatch):
    (tmp_path / "hosts.txt").write_text("node-a slots=4\nnode-b   slots=2 # old\n")
    assert check_hostfile(tmp_path / "hosts.txt") == {"node-a": 4, "node-b": 2}
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"needs pdsh.*apt install pdsh"):
        check_hostfile(tmp_path / "hosts.txt")


def test_what_travels():
    here = {
        "LLAVA_NEXT_DIR": "/a b",
        "HF_HUB_OFFLINE": "1",
        "HF_TOKEN": "hf_secret",
        "WANDB_API_KEY": "x",
        "HOME": "/me",
    }
    words = ["--x", "(a) $b 'c' \"d\" %n é\n", ""]
    word = pack(words, here)
    assert re.fullmatch(r"--packed=[A-Za-z0-9_=-]+", word)
    there = {"HF_HUB_OFFLINE": "0", "HOME": "/you"}
    assert unpack(["--local_rank=1", word], there) == ["--local_rank=1", *words]
    assert there == {"LLAVA_NEXT_DIR": "/a b", "HF_HUB_OFFLINE": "1", "HOME": "/you"}
