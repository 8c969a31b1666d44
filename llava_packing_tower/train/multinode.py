"""Several machines: the same command is started on each, and torchrun brings them together."""

from __future__ import annotations

import argparse
import ipaddress
from dataclasses import dataclass

from ..utils.errors import UsageError
from ..utils.net import free_port


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags, called as torchrun calls them."""
    parser.add_argument(
        "--nnodes", type=int, default=1, metavar="N", help="number of machines; start this command on each"
    )
    parser.add_argument("--node_rank", type=int, metavar="R", help="number of this machine, from 0")
    parser.add_argument("--master_addr", metavar="HOST", help="address of machine 0 for the others")
    parser.add_argument(
        "--rdzv_endpoint",
        metavar="HOST:PORT",
        help="rendezvous of the machines, instead of --node_rank and --master_addr",
    )
    parser.add_argument("--rdzv_id", metavar="ID", help="name of the rendezvous (default: llava-packing)")


@dataclass(frozen=True)
class Nodes:
    """``count`` machines that meet at machine 0 (``rank``, ``address``, ``port``) or at a rendezvous ``endpoint``.

    Raises ``UsageError`` for flags that are missing or contradict each other.
    """

    count: int = 1
    rank: int | None = None
    address: str | None = None
    port: int | None = None
    endpoint: str | None = None
    meeting: str | None = None

    def __post_init__(self) -> None:
        fixed = self.rank is not None or self.address is not None
        if self.count < 1:
            raise UsageError(f"--nnodes must be at least 1, got {self.count}")
        if self.port is not None and not 1 <= self.port <= 65535:
            raise UsageError(f"--master_port must be 1 to 65535, got {self.port}")
        if self.count == 1 and (fixed or self.endpoint or self.meeting):
            raise UsageError("--node_rank, --master_addr and --rdzv_* are for several machines: give --nnodes too")
        if self.count == 1:
            return
        if self.endpoint is None:
            if self.rank is None or self.address is None or self.port is None:
                raise UsageError(
                    f"--nnodes {self.count} needs --node_rank, --master_addr and --master_port, or --rdzv_endpoint"
                )
            if not 0 <= self.rank < self.count:
                raise UsageError(f"--node_rank must be 0 to {self.count - 1}, got {self.rank}")
            if self.meeting:
                raise UsageError("--rdzv_id goes with --rdzv_endpoint")
        elif fixed or self.port is not None:
            raise UsageError("--rdzv_endpoint takes the place of --node_rank, --master_addr and --master_port")
        elif not self.endpoint.rpartition(":")[0] or not self.endpoint.rpartition(":")[2].isdigit():
            raise UsageError(f"--rdzv_endpoint must be HOST:PORT, got {self.endpoint!r}")

    @property
    def on_this_machine(self) -> bool:
        """Whether everything that meets is on this machine."""
        if self.count == 1:
            return True
        host = self.address or self.endpoint.rpartition(":")[0].strip("[]")
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

    @property
    def meeting_place(self) -> str | None:
        """What the launchers of one run on several machines have in common; None on one machine."""
        if self.count == 1:
            return None
        return f"{self.endpoint or f'{self.address}:{self.port}'} {self.meeting or ''}".strip()

    def torchrun(self, processes: int) -> list[str]:
        """Words for ``python -m torch.distributed.run``; ``processes`` on each machine."""
        words = ["--nproc_per_node", str(processes)]
        if self.endpoint is not None:
            words += ["--nnodes", str(self.count), "--rdzv_backend", "c10d", "--rdzv_endpoint", self.endpoint]
            words += ["--rdzv_id", self.meeting or "llava-packing"]
            # Else the processes look for rank 0 under this machine's host name, which may lead anywhere.
            return words + (["--local_addr", "127.0.0.1"] if self.on_this_machine else [])
        if self.count > 1:
            words += ["--nnodes", str(self.count), "--node_rank", str(self.rank)]
        return [*words, "--master_addr", self.address or "127.0.0.1", "--master_port", str(self.port or free_port())]
