"""A SLURM of our own on this machine: munge, a controller and four node daemons, as children that end with us."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from xutrain.launch.torchrun import die_with_parent

SHAPE = "CPUs=2 Boards=1 SocketsPerBoard=1 CoresPerSocket=2 ThreadsPerCore=1 State=UNKNOWN"
NODES = ("n1", "n2", "n3", "n4")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
CONF = """
ClusterName=xutrain
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={nodes[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool/%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd-%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=5
SlurmdTimeout=10
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={nodes[0]} {shape}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={nodes[1]} {shape}
NodeName=n3 NodeHostname={host} NodeAddr=127.0.0.1 Port={nodes[2]} {shape}
NodeName=n4 NodeHostname={host} NodeAddr=127.0.0.1 Port={nodes[3]} {shape}
PartitionName=low Nodes=n[1-2] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20 MaxTime=INFINITE State=UP
PartitionName=high Nodes=n[1-2] PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
PartitionName=apart Nodes=n[3-4] PriorityTier=5 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there can be no SLURM here; empty where it is installed, or could be just now."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    absent = [p for p in PROGRAMS if shutil.which(p, path=path) is None]
    if os.geteuid() != 0:
        return "only root can start node daemons that run jobs"
    if not absent:
        return ""
    if shutil.which("apt-get") is None:
        return f"{absent[0]} is not installed and there is no apt-get"
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for line in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", "slurm-wlm", "munge"]):
        try:
            done = subprocess.run(line, env=quiet, capture_output=True, text=True, timeout=180)
        except subprocess.TimeoutExpired:
            return f"`{' '.join(line)}` took too long"
        if done.returncode != 0:
            return f"`{' '.join(line)}` failed: {(done.stderr or done.stdout).strip().splitlines()[-1:]}"
    absent = [p for p in PROGRAMS if shutil.which(p, path=path) is None]
    return f"{absent[0]} is missing after the installation" if absent else ""


class Cluster:
    """Four nodes of two cores: n1 and n2 in the partitions ``low`` (preempted by requeue) and ``high``, n3 and n4 in ``apart``."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.children: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        for name in ("state", *(f"spool/{node}" for node in NODES)):
            (self.home / name).mkdir(parents=True)
        key = self.home / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        controller, *nodes = _free_ports(1 + len(NODES))
        conf = self.home / "slurm.conf"
        conf.write_text(
            CONF.format(host=socket.gethostname().split(".")[0], home=self.home, controller=controller, nodes=nodes, shape=SHAPE)
        )
        os.environ["SLURM_CONF"] = str(conf)
        os.environ["PATH"] = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        munge = {
            "socket": "munge.socket",
            "key-file": "munge.key",
            "pid-file": "munged.pid",
            "log-file": "munged.log",
            "seed-file": "munged.seed",
        }
        self._spawn("munged", "--foreground", "--force", *(f"--{k}={self.home / v}" for k, v in munge.items()))
        wait_for(lambda: (self.home / "munge.socket").exists(), 30, "munged")
        self._spawn("slurmctld", "-D", "-c")
        for node in NODES:
            self._spawn("slurmd", "-D", "-N", node)
        wait_for(lambda: ask("sinfo", "-h", "-p", "low,apart", "-o", "%P %T %D").count("idle 2") == 2, 90, "four idle nodes", self.logs)

    def cut_power(self, node: str) -> None:
        """Kill a node's daemon and all that runs on it, at once; the controller has to find out."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    inside = f"SLURMD_NODENAME={node}".encode() in (entry / "environ").read_bytes().split(b"\0")
                    ours = str(self.home).encode() in (entry / "environ").read_bytes()
                    daemon = words[0].endswith(b"slurmd") and node.encode() in words
                    if ours and (inside or daemon or (words[0].startswith(b"slurmstepd") and self._steps_of(node, words[0]))):
                        found.append(int(entry.name))
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _steps_of(self, node: str, title: bytes) -> bool:
        """Whether a step daemon, titled ``slurmstepd: [JOB.STEP]``, serves a job of the node."""
        match = re.search(rb"\[(\d+)\.", title)
        return bool(match) and job(match[1].decode()).get("NodeList") == node

    def _spawn(self, *command: str) -> None:
        log = (self.home / f"{command[0]}.out").open("ab")
        self.children.append(subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=die_with_parent))

    def stop(self) -> None:
        """Cancel every job, wait for it, end the daemons in the reverse order."""
        for number in ask("squeue", "-h", "-o", "%i").split():
            ask("scancel", number)
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not ask("squeue", "-h"), 40, "an empty queue")
        for child in reversed(self.children):
            child.terminate()
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def logs(self) -> str:
        """The ends of all logs, for a failed test."""
        return "\n".join(
            f"== {p.name}\n{p.read_text(errors='replace')[-1500:]}" for p in sorted([*self.home.glob("*.log"), *self.home.glob("*.out")])
        )


def ask(*command: str) -> str:
    """What a SLURM command prints; empty where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stdout.strip() if done.returncode == 0 else ""


def job(number: str) -> dict[str, str]:
    """``scontrol show job`` as a mapping: JobState, Restarts, Reason, ..."""
    return dict(re.findall(r"(\w+)=(\S*)", ask("scontrol", "show", "job", number)))


def wait_for(what: Callable[[], object], seconds: float, name: str, explain: Callable[[], str] = lambda: "") -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"waited {seconds} s for {name}\n{explain()}"
        time.sleep(0.2)


def ended(number: str) -> bool:
    """Whether a job is over; one that was requeued does not wait out SLURM's hold of two minutes."""
    seen = job(number)
    if seen.get("JobState") == "PENDING" and seen.get("Reason") == "BeginTime":
        time.sleep(2)  # a start in the second of the requeue is refused: "Job credential revoked"
        ask("scontrol", "update", f"JobId={number}", "StartTime=now")
    return seen.get("JobState", "") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@contextlib.contextmanager
def cluster(home: Path) -> Iterator[Cluster]:
    """A running cluster; every daemon is gone afterwards."""
    before = dict(os.environ)
    made = Cluster(home)
    try:
        made.start()
        yield made
    finally:
        made.stop()
        os.environ.clear()
        os.environ.update(before)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
