"""Whether this machine can do what runs need: versions, devices, processes that talk, a sound file system. For `xutrain doctor`."""

from __future__ import annotations

import datetime
import netrc
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout

from xutrain.launch import together
from xutrain.launch.plan import versions

Check = dict[str, Any]
_TIMEOUT_S = 60


def checks(out: Path, nproc: int = 2) -> list[Check]:
    """All checks: {"check", "status": ok | warn | fail | skip, "value", "hint"}."""
    found = [_versions(), _devices(), _processes("gloo", nproc)]
    if torch.cuda.is_available():
        found.append(_processes("nccl", min(nproc, torch.cuda.device_count())))
    return [*found, *_file_system(out), _disk(out), _data(), _wandb(), _slurm()]


def _check(name: str, status: str, value: str, hint: str = "") -> Check:
    return {"check": name, "status": status, "value": value, "hint": hint}


def _versions() -> Check:
    status = "ok" if sys.version_info >= (3, 10) else "fail"
    return _check(
        "versions", status, ", ".join(f"{k} {v}" for k, v in versions().items()), "" if status == "ok" else "Python 3.10 or newer"
    )


def _devices() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return _check("devices", "ok", f"{cores} cores{load}, {', '.join(gpus) if gpus else 'no CUDA device'}")


def _processes(backend: str, count: int) -> Check:
    """A message between processes and back, and a large one: all_reduce of 1 and of 2^20 float32."""
    answer = together.ask(_talk, backend, count, _TIMEOUT_S)
    hint = "firewall, or the wrong network card: try GLOO_SOCKET_IFNAME=lo (NCCL_SOCKET_IFNAME for nccl)"
    if isinstance(answer, str):
        return _check(backend, "fail", f"{count} processes: {answer}", hint)
    ping, rate = answer
    return _check(backend, "ok", f"{count} processes: ping {ping * 1e3:.2f} ms, all_reduce of 4 MiB at {rate / 1e6:.0f} MB/s")


def _talk(backend: str, rank: int, count: int, store: str, answer: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK=str(rank))
    try:
        device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        limit = datetime.timedelta(seconds=_TIMEOUT_S)
        dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=count, timeout=limit)
        ping = statistics.median(_timed(torch.ones(1, device=device), count) for _ in range(20))
        large = min(_timed(torch.ones(1 << 20, device=device), count) for _ in range(3))
        if rank == 0:
            answer.send((ping, (4 << 20) / large))
        dist.barrier()
        dist.destroy_process_group()
    except (RuntimeError, ValueError, AssertionError) as error:  # dist raises subclasses of RuntimeError
        answer.send(str(error).splitlines()[0])
    os._exit(0)


def _timed(vector: torch.Tensor, count: int) -> float:
    began = time.perf_counter()
    dist.all_reduce(vector)
    if vector.is_cuda:
        torch.cuda.synchronize()
    took = time.perf_counter() - began
    assert float(vector[0]) == count, f"all_reduce gave {float(vector[0])} instead of {count}"
    return took


def _file_system(out: Path) -> list[Check]:
    """Rename over a file is seen whole, and a lock that one process holds is refused to another."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=".doctor-") as name:
            return [_rename(Path(name)), _lock(Path(name))]
    except OSError as error:
        return [_check("runs folder", "fail", f"{out}: {error.strerror}", "give another --out")]


def _rename(folder: Path) -> Check:
    target, aside = folder / "value", folder / ".value.aside"
    target.write_text("old")
    aside.write_text("new")
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, target)
    (folder / "a").mkdir()
    os.replace(folder / "a", folder / "b")
    whole = target.read_text() == "new" and not aside.exists() and (folder / "b").is_dir()
    return _check(
        "rename",
        "ok" if whole else "fail",
        "atomic" if whole else "a renamed file is not the new one",
        "" if whole else "checkpoints need it",
    )


def _lock(folder: Path) -> Check:
    path = str(folder / "lock")
    code = "import sys, filelock\ntry: filelock.FileLock(sys.argv[1]).acquire(timeout=0)\nexcept filelock.Timeout: sys.exit(7)"
    try:
        with FileLock(path, timeout=0):
            other = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=_TIMEOUT_S).returncode
    except (Timeout, OSError, NotImplementedError) as error:
        return _check("lock", "fail", f"{error}", "two runs on one folder would not be noticed; put --out on another file system")
    if other == 7:
        return _check("lock", "ok", "held by one process, refused to another")
    return _check("lock", "fail", "a second process got it as well", "two runs on one folder would not be noticed; put --out elsewhere")


def _disk(out: Path) -> Check:
    free = shutil.disk_usage(out if out.exists() else out.absolute().anchor).free
    status = "fail" if free < 1 << 28 else "warn" if free < 5 << 30 else "ok"
    return _check("disk", status, f"{free / 1e9:.1f} GB free for run folders", "" if status == "ok" else "free some, or give another --out")


def _data() -> Check:
    from xutrain.data.prepare import listing

    rows = listing(None)
    damaged = [r["name"] for r in rows if r["status"] == "damaged"]
    ready = [r["name"] for r in rows if r["status"] in ("ready", "built in")]
    if damaged:
        return _check("data", "fail", f"damaged: {', '.join(damaged)}", "xutrain data verify")
    return _check(
        "data", "ok", f"{len(ready)} of {len(rows)} sets ready: {', '.join(ready)}", "" if len(ready) == len(rows) else "xutrain data ls"
    )


def _wandb() -> Check:
    """Whether W&B would find a login; asks nobody."""
    mode = os.environ.get("WANDB_MODE", "")
    if mode in ("disabled", "offline"):
        return _check("wandb", "ok", f"WANDB_MODE={mode}")
    if os.environ.get("WANDB_API_KEY"):
        return _check("wandb", "ok", "logged in by WANDB_API_KEY")
    try:
        known = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        known = {}
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0]
    if host in known:
        return _check("wandb", "ok", f"logged in at {host}")
    return _check("wandb", "skip", "not logged in", "only log.wandb=online needs it: wandb login")


def _slurm() -> Check:
    if shutil.which("sbatch") is None:
        return _check("slurm", "skip", "sbatch is not on PATH", "only --launcher slurm needs it")
    try:
        done = subprocess.run(["sinfo", "--noheader", "--format", "%P %D %T"], capture_output=True, text=True, timeout=15)
    except (OSError, subprocess.TimeoutExpired):
        return _check("slurm", "warn", "sinfo does not answer", "ask the site; only --launcher slurm needs it")
    if done.returncode != 0:
        told = (done.stderr.strip().splitlines() or ["sinfo failed"])[-1]
        return _check("slurm", "warn", told, "the controller is not reachable; only --launcher slurm needs it")
    return _check("slurm", "ok", "; ".join(done.stdout.split("\n")).strip("; "))
