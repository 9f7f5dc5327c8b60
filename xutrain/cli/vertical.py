"""``xutrain vertical align|train|predict|audit|doctor``: what one party does. The simulation is ``xutrain vertical --config``."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import typer

from xutrain.cli import console
from xutrain.errors import Issue, UsageError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Real parties: align ids, train, predict, audit, and check the connections. Simulations: xutrain vertical --config afsgd",
)
Config = Annotated[str, typer.Option("--config", "-c", metavar="NAME_OR_PATH", help="The job: the same recipe at every party.")]
Party = Annotated[str, typer.Option("--party", metavar="NAME", help="Which party this is.")]
Data = Annotated[
    Path | None, typer.Option("--data", metavar="FILE", help="This party's CSV or LIBSVM (.svm) file; by default data.files of the job.")
]
Identity = Annotated[Path, typer.Option("--identity", metavar="DIR", help="Folder with ca.pem, NAME.pem and NAME.key.")]
Rows = Annotated[
    Path | None, typer.Option("--rows", metavar="FILE", help="Order file of `align`; without it all parties must hold the same ids.")
]
Ids = Annotated[
    Path | None, typer.Option("--ids", metavar="FILE", help="Ids of a LIBSVM file, one a line; by default the file's name with .ids.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, the same at every party.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document on stdout.")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Where this party's results go.")]


def _say(text: str) -> None:
    console.err.print(text, markup=False)


def _job(config: str, overrides: list[str] | None) -> Any:
    from xutrain.recipe.load import load

    return load(config, "vertical", overrides or []).recipe


def _mine(recipe: Any, party: str, data: Path | None) -> Path:
    if party not in recipe.party_names:
        raise UsageError(Issue("--party", "is no party of this job", party, f"parties: {', '.join(recipe.party_names)}"))
    if not hasattr(recipe.data, "files"):
        raise UsageError(
            Issue("data.name", "real parties read files of their own", recipe.data.name, "data: {name: party_files, ...}; or --simulate")
        )
    return data or Path(recipe.data.files[party])


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    party: Annotated[str | None, typer.Option("--party", metavar="NAME", help="Which party this is.")] = None,
    data: Data = None,
    identity: Identity = Path("identity"),
    rows: Rows = None,
    ids: Ids = None,
    out: Out = Path("runs/vertical-parties"),
    simulate: Annotated[bool, typer.Option("--simulate", help="Start all parties on this machine, over TLS on loopback.")] = False,
    json: Json = False,
) -> None:
    """Train with the other parties. Every party runs this command with its own --party and --data."""
    from xutrain.methods.vertical.transports.identity import load, need_extra

    need_extra()
    recipe = _job(config, overrides)
    if simulate:
        from xutrain.launch.parties import simulate as start_all

        result = start_all(recipe, out, _say)
        _print(result, json)
        raise typer.Exit(int(result["exit_code"]))
    if party is None:
        raise UsageError(
            Issue(
                "--party", "is missing", has_value=False, hint=f"one of {', '.join(recipe.party_names)}; or --simulate for all of them here"
            )
        )
    from xutrain.data.party_file import load_party
    from xutrain.loops.vertical_job import leader_of
    from xutrain.loops.vertical_party import Process

    mine = load_party(recipe.data, party, _mine(recipe, party, data), rows, id_file=ids, leader=leader_of(recipe))
    if mine.note:
        _say(f"{party}: {mine.note}")
    process = Process(recipe, party, mine, load(identity, party), out, _say)
    metrics = process.run()
    model = str(out / f"model.{party}.json")
    _print({"party": party, "status": "done", "out": str(out), "model": model, "left": process.left, "metrics": metrics}, json)


@app.command()
def predict(
    config: Config,
    party: Party,
    model: Annotated[Path, typer.Option("--model", metavar="JSON", help="This party's model file.")],
    overrides: Overrides = None,
    data: Data = None,
    identity: Identity = Path("identity"),
    rows: Rows = None,
    ids: Ids = None,
    out: Out = Path("runs/vertical-parties"),
    json: Json = False,
) -> None:
    """Score new rows together; only the label holder gets the scores (scores.csv)."""
    from xutrain.methods.vertical.transports.identity import load, need_extra

    need_extra()
    recipe = _job(config, overrides)
    from xutrain.data.party_file import load_scoring
    from xutrain.loops.vertical_score import Scoring

    known = read_model(model, party)
    mine = load_scoring(recipe.data, party, _mine(recipe, party, data), known, rows, id_file=ids)
    metrics = Scoring(recipe, party, mine, load(identity, party), out, _say, known).run()
    _print({"party": party, "status": "done", "out": str(out), "metrics": metrics}, json)


def read_model(path: Path, party: str) -> dict[str, Any]:
    """A party's model file. Raises UsageError where it is none, or another party's."""
    try:
        value = jsonlib.loads(path.read_text(encoding="utf-8"))
        known = {"party", "columns", "weights", "preprocessing"} <= set(value)
    except (OSError, ValueError, TypeError):
        known = False
    if not known:
        raise UsageError(Issue("--model", "is no model file of `xutrain vertical train`", str(path)))
    if value["party"] != party:
        raise UsageError(Issue("--model", f"is the model of {value['party']}", party))
    assert isinstance(value, dict)
    return value


@app.command()
def align(
    config: Config,
    party: Party,
    overrides: Overrides = None,
    data: Data = None,
    identity: Identity = Path("identity"),
    ids: Ids = None,
    out: Out = Path("runs/vertical-parties"),
    json: Json = False,
) -> None:
    """Find the common ids without showing the others (private set intersection); writes rows.NAME.json."""
    from xutrain.methods.vertical.transports.identity import load, need_extra

    need_extra()
    recipe = _job(config, overrides)
    from xutrain.data.party_table import read_table
    from xutrain.loops.vertical_align import Alignment, write_order

    table = read_table(_mine(recipe, party, data), recipe.data, ids)
    order, report = Alignment(recipe, party, table.ids, load(identity, party), _say).run()
    path = out / f"rows.{party}.json"
    write_order(path, order, report)
    _print({"party": party, "status": "done", "rows": str(path), "metrics": {k: float(v) for k, v in report.items()}}, json)


@app.command()
def export(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL...", help="model.NAME.json of every party of one run: its consent.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the merged model goes.")] = Path("model.merged.json"),
) -> None:
    """Merge the model files of all parties into one: coefficients of the raw columns, and the intercept."""
    from xutrain.loops.vertical_export import merged, read

    value = merged([(path, read(path)) for path in models])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(jsonlib.dumps(value, indent=1) + "\n", encoding="utf-8")
    console.table(["column", "party", "coefficient"], [[c["column"], c["party"], c["coefficient"]] for c in value["coefficients"]])
    console.out.print(f"intercept: {value['intercept']}", markup=False)
    console.out.print(f"written: {out}", markup=False)


@app.command()
def identities(
    config: Config,
    folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the certificates go.")] = Path("identity"),
) -> None:
    """Make a throw-away authority and a certificate per party, for trials. Real parties use their own authority."""
    from xutrain.methods.vertical.transports.identity import make, need_extra

    need_extra()
    make(folder, _job(config, None).party_names)
    console.out.print(f"{folder}: give each party ca.pem and its own NAME.pem and NAME.key", markup=False)


@app.command()
def audit(
    config: Config,
    overrides: Overrides = None,
    attack: Annotated[str, typer.Option("--attack", metavar="totals|labels|trees", help="What to try.")] = "totals",
    known: Annotated[
        int, typer.Option("--known", min=0, help="totals: rows of the others that the attacker knows; 0: five more than columns.")
    ] = 0,
    json: Json = False,
) -> None:
    """Try on the recipe's own data what the protocol gives away: totals, label signs, or a pair of trees."""
    from xutrain.launch.parties import audit as carry_out

    result = carry_out(_job(config, overrides), attack, known)
    if json:
        console.print_json(result)
        return
    for line in result["says"]:
        console.out.print(line, markup=False)
    if result["rows"]:
        console.table(result["columns"], result["rows"])


@app.command()
def doctor(
    config: Config,
    party: Party,
    overrides: Overrides = None,
    data: Data = None,
    identity: Identity = Path("identity"),
    seconds: Annotated[float, typer.Option(help="How long to wait for the others.")] = 20.0,
    json: Json = False,
) -> None:
    """Check packages, certificate, file and connections before any data moves. Run it at all parties at the same time."""
    from xutrain.methods.vertical.transports.identity import need_extra

    need_extra()
    from xutrain.launch.parties import examine

    recipe = _job(config, overrides)
    findings = examine(recipe, party, _mine(recipe, party, data), identity, seconds)
    ok = all(f["ok"] for f in findings)
    if json:
        console.print_json({"party": party, "ok": ok, "findings": findings})
    else:
        console.table(["check", "", "what was found"], [[f["check"], "ok" if f["ok"] else "FAILS", f["found"]] for f in findings])
    raise typer.Exit(0 if ok else 1)


def _print(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        console.print_json(result)
        return
    console.table(["metric", "value"], [[k, v] for k, v in result.get("metrics", {}).items()])
    for key, value in result.items():
        if key not in ("metrics", "exit_code"):
            console.out.print(f"{key}: {value}", markup=False)
