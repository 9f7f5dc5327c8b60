"""Processes on links of a chosen bandwidth, on one machine: network namespaces around a bridge, limited by token buckets.

    with Laboratory(4, "100mbit") as lab:
        answer = lab.run([sys.executable, "script.py"])      # one process per namespace; rank 0's standard output

Every rank has a namespace whose card ``xueth`` leads to a bridge in a namespace of its own; ``tc tbf`` limits both directions of
every card, so that a rank can send and receive at that rate, as on a switch. The script finds RANK, WORLD_SIZE, MASTER_ADDR,
MASTER_PORT and GLOO_SOCKET_IFNAME; ``counters()`` inside it reads what the card has sent and received. ``loopback`` starts the
same processes without namespaces. Limited links need root, ip and tc: ``missing()`` says what is not there, and callers then
quote the model of xutrain.engine.network alone, labelled so. Everything is taken down at the end, also on an interrupt.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

#: name -> (tc rate, bits per second, burst); a burst under 512 kB at 1 Gbit/s makes an all-reduce several times slower
RATES: dict[str, tuple[str, float, str] | None] = {
    "loopback": None,
    "10gbit": ("10gbit", 1e10, "4mb"),
    "1gbit": ("1gbit", 1e9, "512kb"),
    "100mbit": ("100mbit", 1e8, "128kb"),
}
CARD = "xueth"


def missing() -> str:
    """What keeps this machine from limited links; empty where nothing does."""
    if not sys.platform.startswith("linux"):
        return "not Linux"
    tools = [tool for tool in ("ip", "tc") if not shutil.which(tool)]
    if tools:
        return f"no {' and no '.join(tools)} (Debian: iproute2)"
    return "" if os.geteuid() == 0 else "not root"


def bandwidth(link: str) -> float | None:
    """Bits per second of a link; None for loopback, which has no rate of its own."""
    limits = RATES[link]
    return limits[1] if limits else None


def counters() -> tuple[int, int]:
    """Bytes (received, sent) by this namespace's card so far; zeros on loopback."""
    for line in Path("/proc/self/net/dev").read_text(encoding="utf-8").splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == CARD:
            fields = numbers.split()
            return int(fields[0]), int(fields[8])
    return 0, 0


def join(timeout_s: float = 120) -> tuple[int, int]:
    """Inside a rank: join the others over gloo, one thread; (rank, ranks)."""
    import datetime

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address = f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    limit = datetime.timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world, timeout=limit)
    return rank, world


class Laboratory:
    """``ranks`` places for processes on links of one kind. Raises CalledProcessError where namespaces cannot be made."""

    def __init__(self, ranks: int, link: str) -> None:
        self.ranks, self.limits = ranks, RATES[link]
        self.names = [f"xu{os.getpid()}-{i}" for i in range(ranks)] if self.limits else []
        self.hub = f"xu{os.getpid()}-hub"
        self.children: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Laboratory:
        self._before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        try:
            if self.limits:
                self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
        signal.signal(signal.SIGTERM, self._before)

    def close(self) -> None:
        """End what still runs and remove the namespaces, and with them their cards."""
        for child in self.children:
            child.kill()
            child.wait()
        self.children = []
        for name in [*self.names, self.hub] if self.names else []:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def run(self, command: list[str], timeout_s: float = 600) -> Any:
        """Start ``command`` once per rank; the JSON that rank 0 printed last. Raises RuntimeError where a rank fails."""
        place = "10.77.9.1" if self.names else "127.0.0.1"
        base = {**os.environ, "MASTER_ADDR": place, "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(self.ranks), "OMP_NUM_THREADS": "1"}
        base |= {"GLOO_SOCKET_IFNAME": CARD if self.names else "lo", "LOCAL_WORLD_SIZE": str(self.ranks), "XUTRAIN_DEVICE": "cpu"}
        with tempfile.TemporaryFile("w+") as faults:
            for rank in range(self.ranks):
                inside = ["ip", "netns", "exec", self.names[rank]] if self.names else []
                self.children.append(
                    subprocess.Popen(
                        [*inside, *command],
                        env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=subprocess.PIPE,
                        stderr=faults,
                        text=True,
                    )
                )
            try:
                answer, _ = self.children[0].communicate(timeout=timeout_s)
                codes = [child.wait(timeout=60) for child in self.children]
            finally:
                for child in self.children:
                    child.kill()
                self.children = []
            if any(codes):
                faults.seek(0)
                raise RuntimeError(f"ranks ended with {codes}: {faults.read()[-2000:]}")
        return json.loads(answer.strip().splitlines()[-1])

    def _build(self) -> None:
        assert self.limits is not None
        rate, _, burst = self.limits
        _run("ip", "netns", "add", self.hub)
        at_hub = ("ip", "netns", "exec", self.hub)
        _run(*at_hub, "ip", "link", "add", "xubr", "type", "bridge")
        _run(*at_hub, "ip", "link", "set", "xubr", "up")
        limit = ("root", "tbf", "rate", rate, "burst", burst, "latency", "200ms")
        for i, name in enumerate(self.names):
            _run("ip", "netns", "add", name)
            _run("ip", "link", "add", CARD, "netns", name, "type", "veth", "peer", "name", f"port{i}", "netns", self.hub)
            inside = ("ip", "netns", "exec", name)
            _run(*inside, "ip", "addr", "add", f"10.77.9.{i + 1}/24", "dev", CARD)
            _run(*inside, "ip", "link", "set", "lo", "up")
            _run(*inside, "ip", "link", "set", CARD, "up")
            _run(*at_hub, "ip", "link", "set", f"port{i}", "master", "xubr")
            _run(*at_hub, "ip", "link", "set", f"port{i}", "up")
            _run(*inside, "tc", "qdisc", "add", "dev", CARD, *limit)
            _run(*at_hub, "tc", "qdisc", "add", "dev", f"port{i}", *limit)


def _free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
