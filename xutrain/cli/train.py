"""The verbs that run experiments: load -> plan -> launch. One function serves them all; only the recipe differs."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from xutrain.cli import console
from xutrain.errors import Issue, UsageError
from xutrain.families import FAMILIES, Family

Config = Annotated[
    str | None,
    typer.Option("--config", "-c", metavar="NAME_OR_PATH", help="A recipe: a path, or a name that `xutrain ls recipes` shows."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of recipe keys, dotted: train.epochs=3", show_default=False),
]
Nproc = Annotated[int, typer.Option(help="Processes to spread the participants over.")]
Launcher = Annotated[
    str | None,
    typer.Option(
        metavar="local|torchrun|slurm",
        help="How to start: local (one process), torchrun, or slurm.",
        show_default="local, torchrun if --nproc > 1",
    ),
]
Cluster = Annotated[str | None, typer.Option(metavar="NAME", help="SLURM profile: a name under configs/clusters, or a path.")]
Seeds = Annotated[str | None, typer.Option(metavar="0,1,2", help="Seeds to run, one run folder each.")]
Smoke = Annotated[bool, typer.Option("--smoke", help="Apply the recipe's smoke overrides: seconds, embedded data.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe, the plan and the predicted bits; run nothing.")]
Bandwidth = Annotated[
    str | None, typer.Option(metavar="RATE", help="With --dry-run: predict step times on links of this rate (1Gbit, 100Mbit).")
]
Latency = Annotated[str | None, typer.Option(metavar="TIME", help="With --bandwidth: time of a message.", show_default="50us")]
Count = Annotated[int | None, typer.Option(metavar="N", min=1, help="With --dry-run: the same for N workers.")]
Compute = Annotated[
    str | None, typer.Option(metavar="TIME", help="With --bandwidth: time of one gradient, where it is known.", show_default="timed here")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start anew; an existing run folder is moved aside.")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Where run folders go.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show everything that the processes print.")]


def register(app: typer.Typer) -> None:
    """Add one command per verb; a verb that is not built yet is hidden and says so."""
    for family in FAMILIES.values():
        example = f"xutrain {family.verb} --config {family.default} --seeds 0,1,2"
        epilog = f"Example: {example}    Next: xutrain ls recipes, xutrain show {family.default}"
        app.command(family.verb, help=family.help, hidden=not family.built, epilog=epilog)(_verb(family))


def _verb(family: Family) -> Any:
    def run(
        config: Config = None,
        overrides: Overrides = None,
        nproc: Nproc = 1,
        launcher: Launcher = None,
        cluster: Cluster = None,
        seeds: Seeds = None,
        smoke: Smoke = False,
        dry_run: DryRun = False,
        bandwidth: Bandwidth = None,
        latency: Latency = None,
        workers: Count = None,
        compute: Compute = None,
        fresh: Fresh = False,
        out: Out = Path("runs"),
        json: Json = False,
        quiet: Quiet = False,
        verbose: Verbose = False,
    ) -> None:
        if not family.built:
            raise UsageError(
                Issue(family.verb, "this verb is not part of this version yet", has_value=False, hint="xutrain --help lists what is")
            )
        if config is None:
            raise UsageError(
                Issue(
                    "--config",
                    "is missing",
                    has_value=False,
                    hint=f"xutrain {family.verb} --config {family.default}; all: xutrain ls recipes",
                )
            )
        verbosity = -1 if quiet else 1 if verbose else 0
        network = _network(family, dry_run, bandwidth, latency, compute, workers)
        given = [*(overrides or []), *([] if workers is None else [f"workers={workers}"])]
        plans = _plans(
            family, config, given, seeds, smoke, nproc=nproc, launcher=launcher, fresh=fresh and not dry_run, out=out, verbosity=verbosity
        )
        if launcher == "slurm":
            from xutrain.launch import slurm

            _print(slurm.launch(plans, cluster, dry_run=dry_run, smoke=smoke), json, show_jobs)
            return
        if dry_run:
            _print([_forecast(p, network) for p in plans], json, _show_forecasts)
            return
        from xutrain.launch.run import launch, summary

        with contextlib.redirect_stdout(sys.stderr):  # what a method, a plugin or a library prints is not the result
            results = [launch(p) for p in plans]
        if not quiet:
            for result in results:
                if result.get("recalled"):
                    console.err.print(
                        f"note: {result['run']} was finished before; this is its result (--fresh runs it again)", markup=False
                    )
        value = summary(results)
        if json:
            console.print_json(value)
        else:
            console.print_result(value)
        worst = max((r["exit_code"] for r in results), key=lambda code: (code != 0, code == 1, code))
        raise typer.Exit(worst)

    return run


def _plans(
    family: Family, config: str, overrides: list[str], seeds: str | None, smoke: bool, *, nproc: int, launcher: str | None, **kwargs: Any
) -> list[Any]:
    from xutrain.launch.plan import plan
    from xutrain.recipe.load import load

    if launcher not in (None, "local", "torchrun", "slurm"):
        raise UsageError(Issue("--launcher", "must be local, torchrun or slurm", launcher))
    if launcher == "local" and nproc > 1:
        raise UsageError(Issue("--nproc", "the local launcher is one process", nproc, "leave --launcher out, or say --launcher torchrun"))
    wanted = parse_seeds(seeds) if seeds is not None else [None]
    loaded = [load(config, family.verb, overrides, smoke=smoke, seed=seed) for seed in wanted]
    return [plan(item, nproc=nproc, launcher=launcher, **kwargs) for item in loaded]


def parse_seeds(text: str) -> list[int]:
    """``0,1,2`` as numbers. Raises UsageError for anything else, and for a seed given twice."""
    parts = [p.strip() for p in text.split(",")]
    if not all(p.isascii() and p.isdigit() and len(p) <= 10 for p in parts):
        raise UsageError(Issue("--seeds", "must be whole numbers separated by commas", text, "for example --seeds 0,1,2"))
    numbers = [int(p) for p in parts]
    if len(set(numbers)) < len(numbers):
        raise UsageError(Issue("--seeds", "gives a seed twice, which would count one run as two samples", text))
    return numbers


def _network(
    family: Family, dry_run: bool, bandwidth: str | None, latency: str | None, compute: str | None, workers: int | None
) -> tuple[float, float, float | None] | None:
    """(bits per second, seconds, seconds of a gradient) that step times are to be predicted for. Raises UsageError."""
    from xutrain.engine.network import parse_bandwidth, parse_time

    asked = {"--bandwidth": bandwidth, "--latency": latency, "--compute": compute, "--workers": workers}
    flags = [name for name, value in asked.items() if value is not None]
    if not flags:
        return None
    if not dry_run:
        hint = "set workers=N as an override to run with N" if flags == ["--workers"] else "add --dry-run"
        raise UsageError(Issue(flags[0], "is for --dry-run", asked[flags[0]], hint))
    if not family.loop.endswith("data_parallel"):
        hint = "quantize, sparsify and pretrain have one; `xutrain pipeline plan` foresees pipelines"
        raise UsageError(Issue(flags[0], f"{family.verb} has no prediction of step times", asked[flags[0]], hint))
    if bandwidth is None:
        if latency is not None or compute is not None:
            raise UsageError(
                Issue("--bandwidth", f"is missing; {flags[0]} alone predicts no step time", hint="--bandwidth 1Gbit", has_value=False)
            )
        return None
    seconds = parse_time(compute, "--compute") if compute is not None else None
    return parse_bandwidth(bandwidth), parse_time(latency or "50us"), seconds


def _forecast(plan: Any, network: tuple[float, float, float | None] | None = None) -> dict[str, Any]:
    """What a dry run prints for one plan."""
    import importlib

    loop = importlib.import_module(FAMILIES[plan.loaded.verb].loop)
    timed: dict[str, Any] = {}
    if loop.__name__.endswith("data_parallel"):
        from xutrain.launch import foresee

        predicted = loop.forecast(plan.recipe, foresee.Alone(plan.recipe.seed))
        if network is not None:
            timed = {"step_time": foresee.step_time(plan.recipe, foresee.Link(*network[:2]), network[2])}
    else:
        predicted = loop.forecast(plan.recipe)
    return {
        **plan.describe(),
        "status": "dry-run",
        "scale": plan.recipe.scale,
        "steps": predicted.steps,
        "bits": predicted.bits,
        "forecast": predicted.details,
        **timed,
        "plan": {"nproc": plan.nproc, "launcher": plan.launcher, "participants": plan.recipe.participants},
        "resolved": plan.recipe.model_dump(mode="json"),
    }


def _print(values: list[dict[str, Any]], as_json: bool, show: Any) -> None:
    if as_json:
        console.print_json(values[0] if len(values) == 1 else {"runs": values})
    else:
        show(values)


def _show_forecasts(values: list[dict[str, Any]]) -> None:
    from xutrain.recipe.yamlfile import dump

    console.out.print(dump(values[0]["resolved"]), markup=False, end="")
    for value in values:
        rows = [
            ["run folder", value["run"]],
            ["steps", value["steps"]],
            ["processes", value["plan"]["nproc"]],
            ["launcher", value["plan"]["launcher"]],
        ]
        rows += [["sent, all", console.bits(value["bits"]["up"])], ["received, all", console.bits(value["bits"]["down"])]]
        rows += [["per worker and step", console.bits(value["bits"]["per_worker_step"])]]
        rows += [[k.replace("_", " "), v] for k, v in value["forecast"].items() if not isinstance(v, (dict, list))]
        console.table([f"dry run, seed {value['seed']}", "predicted"], rows)
        if "step_time" in value:
            _show_step_time(value["step_time"])


def _show_step_time(time: dict[str, Any]) -> None:
    from xutrain.engine.network import rate_text

    at = time["break_even_bandwidth"]
    pays = "never: no bits are saved" if at is None else "any bandwidth" if at == float("inf") else f"below {rate_text(at)}"
    rows = [
        ["network", f"{rate_text(time['bandwidth'])}, {time['latency_s'] * 1e6:.4g} us a message"],
        ["gradient", f"{time['gradient_s'] * 1e3:.4g} ms, {time['gradient']}"],
        ["encode and decode", f"{time['codec_s'] * 1e3:.4g} ms"],
        ["messages", f"{time['wire_s'] * 1e3:.4g} ms (model)"],
        ["step", f"{time['step_s'] * 1e3:.4g} ms"],
        ["step with fp32 all-reduce", f"{time['fp32_all_reduce_step_s'] * 1e3:.4g} ms, {time['speed_up']:.3g} times this"],
        ["ahead of fp32 at", pays],
        ["epoch", f"{time['epoch_s']:.4g} s"],
    ]
    console.table([f"a step of {time['workers']} workers", "predicted"], rows)


def show_jobs(values: list[dict[str, Any]]) -> None:
    """For people: the scripts of a dry run, or the SLURM jobs and how to look at them."""
    if any(v["status"] == "dry-run" for v in values):
        for text in dict.fromkeys(v["script"] for v in values if v["script"]):
            console.out.print(text, markup=False, end="")
        return
    console.table(
        ["job", "status", "recipe", "seed", "folder"], [[v["job"], v["status"], v["recipe"], v["seed"], v["run"]] for v in values]
    )
    if any(v["job"] for v in values):
        console.err.print("hint: squeue --me; xutrain runs ls; xutrain runs stop FOLDER saves and ends a run", markup=False)
