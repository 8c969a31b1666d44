"""Several machines: flags that are missing or contradict each other, and what torchrun is told."""

from __future__ import annotations

import pytest

from llava_packing_tower.cli import UsageError
from llava_packing_tower.nodes import Nodes

FIXED = {"count": 3, "rank": 2, "address": "10.0.0.7", "port": 29500}


def test_machine_0_or_a_rendezvous():
    assert Nodes(**FIXED).torchrun(8) == [
        *("--nproc_per_node", "8", "--nnodes", "3", "--node_rank", "2"),
        *("--master_addr", "10.0.0.7", "--master_port", "29500"),
    ]
    met = Nodes(count=2, endpoint="head:4000", meeting="run7").torchrun(4)
    assert met[2:] == ["--nnodes", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "head:4000", "--rdzv_id", "run7"]
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
