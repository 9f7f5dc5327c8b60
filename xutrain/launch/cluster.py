"""Cluster profiles: what a SLURM site wants to be told, as a strict YAML file under configs/clusters/. Torch-free."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from xutrain.errors import Issue, UsageError
from xutrain.recipe import catalog, yamlfile
from xutrain.recipe.explain import issues_of
from xutrain.registry import Options, suggest

_TIME = re.compile(r"^(?:(?P<d>\d+)-)?(?P<a>\d+)(?::(?P<b>\d+))?(?::(?P<c>\d+))?$")
_WORD = r"^[A-Za-z0-9_.,:+\-]+$"


class Profile(Options):
    """One site, or one queue of it."""

    summary: str = Field("", description="One line for the reader.")
    partition: str | None = Field(None, pattern=_WORD, description="Partition (queue); the site's default without it.")
    account: str | None = Field(None, pattern=_WORD, description="Account that is charged.")
    qos: str | None = Field(None, pattern=_WORD, description="Quality of service.")
    time: str = Field("1:00:00", description="Time limit as SLURM writes it: minutes, H:M:S or D-H:M:S; in quotes.")
    nodes: int = Field(1, ge=1, le=4096, description="Nodes of one run; the processes of --nproc are spread evenly over them.")
    gpus_per_node: int = Field(0, ge=0, le=64, description="GPUs of a node; 0 asks for none.")
    cpus_per_task: int | None = Field(None, ge=1, description="Cores of a node for this run; one for each process without it.")
    mem: str | None = Field(None, pattern=r"^\d+[KMGT]?$", description="Memory of a node, such as 16G; the site's default without it.")
    modules: list[str] = Field([], description="Environment modules to load.")
    setup: list[str] = Field([], description="Shell lines that run in the job before anything else.")
    extra_sbatch: list[str] = Field([], description="More sbatch options, one a line, such as --constraint=a100.")
    data_on_nodes: bool = Field(
        False, description="Data lie where only the nodes see them; without it they are looked for before submission."
    )
    lead_s: int = Field(
        180, ge=5, le=86400, description="Seconds before the time limit at which the run saves and the job requeues itself."
    )
    max_requeues: int = Field(20, ge=0, description="A job that was requeued so often does not requeue itself again.")
    array_cap: int = Field(8, ge=1, description="Runs of an array at a time.")
    max_array: int = Field(1000, ge=1, description="Runs of one array; more become several arrays (the site's MaxArraySize - 1).")

    @property
    def time_s(self) -> int:
        """The time limit in seconds."""
        match = _TIME.match(self.time)
        assert match
        first, *rest = (int(g) for g in match.group("a", "b", "c") if g is not None)
        if match["d"] is not None:  # D-H[:M[:S]]
            parts = [first, *rest, 0, 0][:3]
            return int(match["d"]) * 86400 + parts[0] * 3600 + parts[1] * 60 + parts[2]
        if len(rest) == 2:
            return first * 3600 + rest[0] * 60 + rest[1]
        return first * 60 + (rest[0] if rest else 0)

    @field_validator("time")
    @classmethod
    def _is_time(cls, value: str) -> str:
        if not _TIME.match(value):
            raise ValueError("must be minutes, H:M:S or D-H:M:S")
        return value

    @field_validator("modules", "setup", "extra_sbatch")
    @classmethod
    def _one_line(cls, values: list[str]) -> list[str]:
        if any("\n" in v or "\r" in v or not v.strip() for v in values):
            raise ValueError("must be lines of text, none empty")
        return values

    @field_validator("modules")
    @classmethod
    def _is_module(cls, values: list[str]) -> list[str]:
        if not all(re.match(r"^[A-Za-z0-9_.+/\-]+$", v) for v in values):
            raise ValueError("must be names of modules, such as cuda/12.4")
        return values

    @field_validator("extra_sbatch")
    @classmethod
    def _is_option(cls, values: list[str]) -> list[str]:
        taken = ("--array", "--signal", "--output", "--open-mode", "--job-name", "--parsable", "--nodes", "--ntasks-per-node", "--chdir")
        for value in values:
            if not value.startswith("-"):
                raise ValueError("must be sbatch options that begin with a dash, such as --constraint=a100")
            if value.split("=")[0].split()[0] in taken:
                raise ValueError(f"{value.split('=')[0]} is set by the job script")
        return values


def names() -> dict[str, Path]:
    """The profiles that are there, nearest folder first."""
    found: dict[str, Path] = {}
    for root in catalog.roots():
        for path in sorted((root / "clusters").glob("*.yaml")):
            found.setdefault(path.stem, path)
    return found


def open_profile(name: str | None) -> tuple[str, Profile]:
    """The profile called ``name`` (``generic`` without one), or the file of that path. Raises UsageError with everything wrong in it."""
    name = name or "generic"
    path = Path(name).expanduser()
    if not path.is_file():
        known = names()
        stem = name.removesuffix(".yaml").removesuffix(".yml")
        if stem not in known:
            near = suggest(stem, list(known))
            hint = (f"did you mean {near}? " if near else "") + f"profiles: {', '.join(known)}; or give a path"
            raise UsageError(Issue("--cluster", "no such file and no profile of that name under configs/clusters", name, hint))
        path = known[stem]
    raw, _ = yamlfile.read(path)
    return path.stem, _validated(raw, path)


def _validated(raw: dict[str, Any], path: Path) -> Profile:
    try:
        profile = Profile.model_validate(raw)
    except ValidationError as error:
        issues = [Issue(f"{path}: {i.where}", i.what, i.value, _hint(i), i.has_value) for i in issues_of(error, Profile)]
        raise UsageError(*issues) from None
    if profile.lead_s >= profile.time_s:
        hint = "the run would be asked to stop as soon as it starts; lower lead_s or raise time"
        raise UsageError(Issue(f"{path}: lead_s", f"must be less than time={profile.time} ({profile.time_s} s)", profile.lead_s, hint))
    return profile


def _hint(issue: Issue) -> str:
    if issue.what != "unknown key":
        return issue.hint
    near = issue.hint if issue.hint.startswith("did you mean") else ""
    return f"{near} known keys: {', '.join(Profile.model_fields)}".strip()
