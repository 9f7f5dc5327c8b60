"""The command line, and the one place where errors become exit codes.

0 done   1 a bug or the machine   2 usage or recipe   3 data or model   4 diverged   5 report --check   75 stopped   130 interrupted
"""

from __future__ import annotations

import errno
import importlib
import sys

import typer

from xutrain.cli import bench, console, doctor, export, recipes, report, sweep, train
from xutrain.errors import Issue, XutrainError
from xutrain.families import FAMILIES

app = typer.Typer(
    name="xutrain",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run papers on compressed, distributed, federated and asynchronous training for real, under one protocol.",
    epilog="Start with: xutrain quantize --config orq    What is there: xutrain ls    One recipe: xutrain show orq",
)
train.register(app)
recipes.register(app)
sweep.register(app)
report.register(app)
export.register(app)
doctor.register(app)
bench.register(app)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: groups of commands, imported by name when they are there
GROUPS = {
    "data": "Prepare, verify and look at data sets.",
    "runs": "List, show, stop and remove runs.",
}


def _version(value: bool) -> None:
    if value:
        from importlib import metadata

        typer.echo(f"xutrain {metadata.version('xutrain')}")
        raise typer.Exit


@app.callback()
def _root(version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version.")) -> None:
    pass


def _groups() -> None:
    for name, text in GROUPS.items():
        module = importlib.import_module(f"xutrain.cli.{name}")
        app.add_typer(module.app, name=name, help=text)


_groups()


def main(argv: list[str] | None = None) -> None:
    """Entry of the ``xutrain`` command."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    sys.exit(run(arguments))


def run(arguments: list[str]) -> int:
    """Run a command line; returns the exit code. Faults of the user are printed without a stack trace."""
    try:
        chosen, name, rest = _route(arguments)
        code = chosen(rest, prog_name=name, standalone_mode=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except XutrainError as error:
        console.print_issues(error.issues)
        if "--json" in arguments:
            console.print_json({"status": "error", "exit_code": error.exit_code, "errors": [i.as_dict() for i in error.issues]})
        return error.exit_code
    except OSError as error:  # the machine: a full disk, a folder that may not be written
        place = str(error.filename or "the file system")
        hint = "free some space, or give another --out; checkpoints that were written are whole" if error.errno in _FULL else ""
        issue = Issue(place, error.strerror or str(error), hint=hint, has_value=False)
        console.print_issues([issue])
        if "--json" in arguments:
            console.print_json({"status": "error", "exit_code": 1, "errors": [issue.as_dict()]})
        return 1
    except KeyboardInterrupt:
        console.err.print("interrupted")
        return 130
    return int(code or 0)


def _route(arguments: list[str]) -> tuple[typer.Typer, str, list[str]]:
    """`xutrain VERB ACTION ...` goes to the verb's own commands (pipeline plan, vertical align); all else to the main app."""
    if len(arguments) > 1 and (family := FAMILIES.get(arguments[0])) and family.actions and family.built:
        name = arguments[1]
        if not name.startswith("-") and "=" not in name:
            actions = importlib.import_module(family.actions)
            return actions.app, f"xutrain {family.verb}", arguments[1:]
    return app, "xutrain", arguments


if __name__ == "__main__":
    main()
