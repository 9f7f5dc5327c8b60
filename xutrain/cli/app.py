"""The command line, and the one place where errors become exit codes.

0 done   1 a bug or the machine   2 usage or recipe   3 data or model   4 diverged   5 report --check   75 stopped   130 interrupted
"""

from __future__ import annotations

import errno
import importlib
import sys
from typing import Any

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
#: what Typer raises for a wrong flag, argument or command
_FlagError: Any = typer.BadParameter.__mro__[1]
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
        code = chosen(rest, prog_name=name, standalone_mode=False)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except XutrainError as error:
        return _tell(error.issues, error.exit_code, arguments)
    except _FlagError as error:
        if not str(error):  # a group without a command has printed its help
            return error.exit_code
        return _tell([_flag_issue(error)], error.exit_code, arguments)
    except OSError as error:  # the machine: a full disk, a folder that may not be written
        place = str(error.filename or "the file system")
        hint = "free some space, or give another --out; checkpoints that were written are whole" if error.errno in _FULL else ""
        if isinstance(error, (PermissionError, NotADirectoryError)) or error.errno == errno.EROFS:
            hint = "give a folder that can be written, such as --out DIR"
        return _tell([Issue(place, error.strerror or str(error), hint=hint, has_value=False)], 1, arguments)
    except typer.Abort:  # a question that nobody answered
        console.err.print("aborted")
        return 1
    except KeyboardInterrupt:
        console.err.print("interrupted")
        return 130
    return code if isinstance(code, int) else 0


def _tell(issues: list[Issue], code: int, arguments: list[str]) -> int:
    """Errors for people on stderr, under ``--json`` as one document on stdout as well; the exit code."""
    console.print_issues(issues)
    if "--json" in arguments:
        console.print_json({"status": "error", "exit_code": code, "errors": [issue.as_dict() for issue in issues]})
    return code


def _flag_issue(error: Any) -> Issue:
    """What is wrong with the flags or arguments, in the form of every other error."""
    command = error.ctx.command_path if getattr(error, "ctx", None) is not None else "xutrain"
    option = getattr(getattr(error, "param", None), "opts", [])
    where, what = (option[0], error.message) if option and error.message else ("", error.format_message())
    return Issue(where, what.rstrip("."), has_value=False, hint=f"{command} --help")


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
