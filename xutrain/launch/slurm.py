"""Hand runs to SLURM: a readable job script in each run folder, one array for several runs. Torch-free."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from xutrain.engine.record import read_json, write_json
from xutrain.errors import DataError, Failed, Issue, UsageError
from xutrain.launch import needs
from xutrain.launch.cluster import Profile, open_profile
from xutrain.launch.job import clear_stop
from xutrain.launch.plan import RunPlan, run_lock

SCRIPT = "job.sbatch"
#: variables of the submitting shell that a script submitted again by hand needs as well; never a secret
_KEPT = ("XUTRAIN_DATA", "XUTRAIN_DEVICE", "XUTRAIN_PURE", "XUTRAIN_TIMEOUT_S", "OMP_NUM_THREADS", "PYTHONPATH", "WANDB_MODE")


def launch(plans: list[RunPlan], cluster: str | None, *, dry_run: bool = False, smoke: bool = False) -> list[dict[str, Any]]:
    """Submit runs, or say what would be submitted; one row a plan: its head, "status", "job" and "script" (the text in a dry run).

    Raises:
        UsageError: a wrong profile, no SLURM here, a run that is running or queued already.
        DataError: data of a run are not here (unless the profile says that only the nodes have them).
        Failed: sbatch refused; what was submitted before it is cancelled.
    """
    name, profile = open_profile(cluster)
    for plan in plans:
        _check_nodes(plan, profile, name)
    todo = list({p.folder: p for p in plans if read_json(p.folder / "state.json").get("status") != "done"}.values())
    batches = [_Batch(todo[i : i + profile.max_array], profile) for i in range(0, len(todo), profile.max_array)]
    if dry_run:
        texts = {p.folder: batch.text for batch in batches for p in batch.plans}
        return [{**p.describe(), **_head(p, "dry-run" if p.folder in texts else "done"), "script": texts.get(p.folder, "")} for p in plans]
    if todo and shutil.which("sbatch") is None:
        hint = "submit from a login node, or see the script with --dry-run; without SLURM leave --launcher out"
        raise UsageError(Issue("--launcher", "slurm needs `sbatch`, which is not on PATH", "slurm", hint))
    if not profile.data_on_nodes:
        _refuse_missing(todo)
    for plan in todo:
        _refuse_busy(plan)
    jobs: dict[Path, str] = {}
    with contextlib.ExitStack() as undo:
        for batch in batches:
            number = batch.submit()
            undo.callback(_cancel, number)
            jobs.update(batch.jobs(number))
        undo.pop_all()
    for folder, job in jobs.items():
        _note_job(folder, job, profile)
    return [
        {**p.describe(), **_head(p, "submitted" if p.folder in jobs else "done", jobs.get(p.folder)), "script": str(p.folder / SCRIPT)}
        for p in plans
    ]


@dataclass(frozen=True)
class _Batch:
    """What one sbatch submits: a run by its own script, or several as an array."""

    plans: list[RunPlan]
    profile: Profile

    @property
    def home(self) -> Path:
        """Where the script lies: the run folder, or a folder of the array beside the runs."""
        if len(self.plans) == 1:
            return self.plans[0].folder.resolve()
        digest = hashlib.sha256("\n".join(str(p.folder.resolve()) for p in self.plans).encode()).hexdigest()[:8]
        return self.plans[0].folder.resolve().parents[3] / "slurm" / digest

    @property
    def text(self) -> str:
        """The script that is submitted."""
        home = self.home if len(self.plans) > 1 else None
        return script(self.plans[0], self.profile, home, len(self.plans))

    def submit(self) -> str:
        """Write the run folders and the scripts, call sbatch; the job's number."""
        for plan in self.plans:
            plan.write()
            (plan.folder / SCRIPT).write_text(script(plan, self.profile), encoding="utf-8")
        self.home.mkdir(parents=True, exist_ok=True)
        if len(self.plans) > 1:
            (self.home / "runs.txt").write_text("".join(f"{p.folder.resolve()}\n" for p in self.plans), encoding="utf-8")
        (self.home / SCRIPT).write_text(self.text, encoding="utf-8")
        done = subprocess.run(["sbatch", "--parsable", str(self.home / SCRIPT)], capture_output=True, text=True)
        if done.returncode != 0:
            reason = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
            hint = f"the script is {self.home / SCRIPT}; jobs submitted before it were cancelled"
            raise Failed(Issue("sbatch", reason, has_value=False, hint=hint))
        return done.stdout.strip().splitlines()[-1].split(";")[0]

    def jobs(self, number: str) -> dict[Path, str]:
        """The job of every run folder."""
        return {p.folder: number if len(self.plans) == 1 else f"{number}_{i}" for i, p in enumerate(self.plans)}


def script(plan: RunPlan, profile: Profile, array_home: Path | None = None, count: int = 1) -> str:
    """The job script of one run, or of an array of ``count`` runs listed in ``array_home``/runs.txt."""
    folder = plan.folder.resolve()
    per_node = plan.nproc // profile.nodes
    cpus = profile.cpus_per_task or per_node
    title = f"{plan.loaded.verb}/{plan.loaded.name}" + (f" seed {plan.recipe.seed}" if array_home is None else f" and others, {count} runs")
    lines = [
        f"--job-name=xutrain-{plan.loaded.verb}-{plan.loaded.name}",
        *(f"--{key}={value}" for key in ("partition", "account", "qos") if (value := getattr(profile, key))),
        f"--time={profile.time}",
        f"--nodes={profile.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={cpus}",
        *([f"--gpus-per-node={profile.gpus_per_node}"] if profile.gpus_per_node else []),
        *([f"--mem={profile.mem}"] if profile.mem else []),
        *([f"--array=0-{count - 1}%{min(profile.array_cap, count)}"] if array_home else []),
        f"--chdir={_quoted(Path.cwd())}",
        f"--output={_pattern(array_home, 'slurm-%A_%a.out') if array_home else _pattern(folder / 'logs', 'slurm-%j.out')}",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR2@{profile.lead_s}",
        *profile.extra_sbatch,
    ]
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(Path(__file__).with_name("job.sbatch.j2").read_text(encoding="utf-8"))
    return template.render(
        title=title,
        script=shlex.quote(str((array_home or folder) / SCRIPT)),
        sbatch=lines,
        modules=profile.modules,
        setup=profile.setup,
        python=shlex.quote(sys.executable),
        run=shlex.quote(str(folder)),
        array=shlex.quote(str(array_home / "runs.txt")) if array_home else "",
        environment=[(n, shlex.quote(os.environ[n])) for n in _KEPT if os.environ.get(n) and n != "OMP_NUM_THREADS"],
        lead=profile.lead_s,
        nproc=plan.nproc,
        nodes=profile.nodes,
        step=f" --cpus-per-task={cpus}" + (f" --gpus-per-node={profile.gpus_per_node}" if profile.gpus_per_node else ""),
        max_requeues=profile.max_requeues,
    )


def _quoted(path: Path) -> str:
    """A path in an #SBATCH line."""
    return f'"{path}"' if " " in str(path) else str(path)


def _pattern(folder: Path, name: str) -> str:
    """A file name with SLURM's % marks in a folder whose own % are none."""
    return _quoted(Path(str(folder).replace("%", "%%")) / name)


def _head(plan: RunPlan, status: str, job: str | None = None) -> dict[str, Any]:
    return {"status": status, "job": job, "nproc": plan.nproc, "launcher": "slurm"}


def _check_nodes(plan: RunPlan, profile: Profile, name: str) -> None:
    if plan.nproc % profile.nodes:
        hint = f"use a multiple of {profile.nodes}, or a profile with another number of nodes"
        raise UsageError(Issue("--nproc", f"cannot be spread evenly over nodes={profile.nodes} of the profile {name}", plan.nproc, hint))


def _refuse_busy(plan: RunPlan) -> None:
    """A run folder has one job at a time: not where a launcher holds its lock, not where a job waits in the queue."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    state = read_json(plan.folder / "state.json")
    job = str((state.get("job") or {}).get("id", ""))
    if job and state.get("status") in ("queued", "running") and _in_queue(job):
        hint = f"cancel it with scancel {job}, or save and end it with xutrain runs stop {plan.folder}"
        raise UsageError(Issue(str(plan.folder), f"is in the queue already, as job {job}", has_value=False, hint=hint))
    with run_lock(plan.folder):
        pass


def _refuse_missing(plans: list[RunPlan]) -> None:
    """What jobs would end with 3 for, now: all of it at once, each thing once."""
    found = {(i.where, str(i.value)): i for plan in plans for i in needs.missing(plan.recipe)}
    more = "where only the nodes have it: data_on_nodes: true in the profile"
    if found:
        raise DataError(*(Issue(i.where, i.what, i.value, f"{i.hint}; {more}", i.has_value) for i in found.values()))


def _in_queue(job: str) -> bool:
    if shutil.which("squeue") is None:
        return False
    found = subprocess.run(["squeue", "--noheader", "--jobs", job, "--format", "%T"], capture_output=True, text=True)
    return found.returncode == 0 and bool(found.stdout.strip())


def _cancel(number: str) -> None:
    subprocess.run(["scancel", number], capture_output=True, text=True)


def _note_job(folder: Path, job: str, profile: Profile) -> None:
    """Say in state.json that the run waits, unless its job was quicker than this line."""
    state = read_json(folder / "state.json")
    if state.get("job", {}).get("id") == job or state.get("status") == "done":
        return
    clear_stop(folder)
    write_json(folder / "state.json", {**state, "status": "queued", "job": {"id": job, "restarts": 0}, "updated": time.time()})
