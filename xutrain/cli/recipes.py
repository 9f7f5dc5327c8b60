"""`xutrain ls`, `show`, `cp`, `validate`, `diff`: what is there, and whether a recipe is right. None of them trains."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from xutrain import registry
from xutrain.cli import console
from xutrain.errors import Issue, RecipeError, UsageError
from xutrain.families import FAMILIES
from xutrain.recipe import catalog, yamlfile

KINDS = {
    "recipes": None,
    "methods": "method",
    "codecs": "codec",
    "datasets": "dataset",
    "models": "model",
    "agents": "agent",
    "suites": None,
}
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Verb = Annotated[str | None, typer.Option("--verb", help="Only what this verb uses.")]


def register(app: typer.Typer) -> None:
    app.command("ls", epilog="Examples: xutrain ls methods --verb federate    xutrain ls recipes --json")(ls)
    app.command("show", epilog="Examples: xutrain show orq    xutrain show quantize/orq --schema    xutrain show method orq")(show)
    app.command("cp", epilog="Example: xutrain cp orq my.yaml    Next: xutrain quantize --config my.yaml")(cp)
    app.command("validate", epilog="Example: xutrain validate my.yaml configs/quantize/*.yaml")(validate)
    app.command("diff", epilog="Example: xutrain diff orq bingrad_b")(diff)


def ls(
    what: Annotated[str | None, typer.Argument(metavar="[" + "|".join(KINDS) + "]", show_default=False)] = None,
    verb: Verb = None,
    json: Json = False,
) -> None:
    """List recipes, methods (codecs among them), codecs, datasets, models, agents of a federated search or suites."""
    if what is not None and what not in KINDS:
        near = registry.suggest(what, list(KINDS))
        raise UsageError(Issue("ls", "must be one of " + ", ".join(KINDS), what, f"did you mean {near}?" if near else ""))
    if verb is not None and verb not in FAMILIES:
        raise UsageError(Issue("--verb", "must be one of " + ", ".join(FAMILIES), verb))
    if what is None:
        counts = [[kind, len(listing(kind, verb)), f"xutrain ls {kind}"] for kind in KINDS]
        if json:
            console.print_json({kind: count for kind, count, _ in counts})
        else:
            console.table(["what", "count", "list them"], counts)
        return
    rows = listing(what, verb)
    if json:
        console.print_json(rows)
    elif not rows:
        console.out.print(f"no {what} here")
    else:
        columns = [c for c in rows[0] if c not in ("path", "aliases")]
        console.table(columns, [[row[c] for c in columns] for row in rows])


def listing(what: str, verb: str | None = None) -> list[dict[str, Any]]:
    """The rows of ``xutrain ls WHAT --json``."""
    if what == "recipes":
        return [item.as_dict() for item in catalog.listing(verb)]
    if what == "suites":
        files = {f.stem: f for root in reversed(catalog.roots()) for f in sorted((root / "suites").glob("*.yaml"))}
        return [
            {"name": name, "path": str(f), "summary": str(catalog.merged(f)[0].get("summary", ""))} for name, f in sorted(files.items())
        ]
    kinds = ["method", "codec"] if what == "methods" else [str(KINDS[what])]
    rows = []
    for kind in kinds:
        for entry in registry.entries(kind, verb):
            for owner in _owners(kind, entry):
                if verb in (None, owner):
                    rows.append({"verb": owner, "kind": kind, "name": entry.name, "paper": entry.paper, "summary": entry.summary})
    return sorted(rows, key=lambda r: (list(FAMILIES).index(r["verb"]) if r["verb"] in FAMILIES else 99, r["kind"] != "method", r["name"]))


def _owners(kind: str, entry: registry.Entry) -> tuple[str, ...]:
    """The verbs under which a part is listed; a codec without verbs is listed once, under the verb that it was made for."""
    if entry.verbs:
        return entry.verbs
    return ("quantize",) if kind == "codec" else ("any",)


def show(
    name: Annotated[str, typer.Argument(help="A recipe; or `method`, `codec`, `dataset`, `model`, `agent` and a second name.")],
    part: Annotated[str | None, typer.Argument(show_default=False)] = None,
    verb: Verb = None,
    resolved: Annotated[bool, typer.Option("--resolved", help="With everything that it extends and every default.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="The JSON schema of the recipe or of the part's options.")] = False,
    json: Json = False,
) -> None:
    """Show a recipe, or a part with its options and bounds."""
    if name in ("method", "codec", "dataset", "model", "agent"):
        if part is None:
            raise UsageError(Issue("show", f"say which {name}", has_value=False, hint=f"xutrain ls {name}s"))
        from xutrain.cli.card import show_part

        show_part(name, part, verb, schema, json)
        return
    path, implied = catalog.find(name, verb)
    if not resolved and not schema:
        text = yamlfile.read(path)[1]
        if json:
            console.print_json({"path": str(path), "verb": implied, "recipe": catalog.merged(path)[0]})
        else:
            typer.echo(text, nl=not text.endswith("\n"))
        return
    from xutrain.recipe.load import load

    recipe = load(name, verb).recipe
    if schema:
        console.print_json(type(recipe).model_json_schema())
    elif json:
        console.print_json(recipe.model_dump(mode="json"))
    else:
        typer.echo(yamlfile.dump(recipe.model_dump(mode="json")), nl=False)


def cp(
    name: Annotated[str, typer.Argument(help="A recipe.")],
    target: Annotated[Path, typer.Argument(help="The new file.")],
    verb: Verb = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite.")] = False,
) -> None:
    """Copy a recipe, to change it."""
    path, implied = catalog.find(name, verb)
    if target.is_dir():
        target = target / path.name
    if target.suffix == "":
        target = target.with_suffix(".yaml")
    if target.exists() and not force:
        raise UsageError(Issue(str(target), "is there already", has_value=False, hint="choose another name, or add --force"))
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)
    text = target.read_text(encoding="utf-8")
    if implied and "\nverb:" not in f"\n{text}":
        target.write_text(f"{text.rstrip()}\nverb: {implied}\n", encoding="utf-8")
    console.err.print(f"{path} -> {target}\nnext: xutrain {implied or 'VERB'} --config {target}", markup=False)


def validate(
    recipes: Annotated[list[str], typer.Argument(help="Recipes: names or paths.")],
    verb: Verb = None,
    json: Json = False,
) -> None:
    """Check recipes without running them; all errors of all recipes at once."""
    from xutrain.recipe.load import load

    results = []
    for name in recipes:
        try:
            loaded = load(name, verb)
            load(name, verb, smoke=True)
            results.append({"recipe": name, "verb": loaded.verb, "valid": True, "errors": []})
        except RecipeError as error:
            results.append({"recipe": name, "verb": verb, "valid": False, "errors": [i.as_dict() for i in error.issues]})
            if not json:
                console.err.print(f"{name}:", markup=False)
                console.print_issues(error.issues)
    bad = sum(not r["valid"] for r in results)
    if json:
        console.print_json(results)
    else:
        console.out.print(f"{len(results) - bad} valid, {bad} not")
    raise typer.Exit(2 if bad else 0)


def diff(
    first: Annotated[str, typer.Argument(help="A recipe or a run folder.")],
    second: Annotated[str, typer.Argument(help="Another.")],
    verb: Verb = None,
    steps: Annotated[
        int | None, typer.Option("--run", min=1, metavar="STEPS", help="Run both and show the first step and tensor where they part.")
    ] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="With --run: both with their smoke overrides.")] = False,
    json: Json = False,
) -> None:
    """Show the resolved keys in which two recipes differ, or where their runs part."""
    if steps is not None:
        _diff_runs((first, second), verb, steps, smoke, json)
        return
    sides = [_flat(_resolved(name, verb)) for name in (first, second)]
    keys = sorted({k for side in sides for k in side})
    rows = [{"key": k, first: sides[0].get(k), second: sides[1].get(k)} for k in keys if sides[0].get(k) != sides[1].get(k)]
    if json:
        console.print_json(rows)
    elif not rows:
        console.out.print("no key differs")
    else:
        shown = [[str(side[k]) if k in side else "(no such key)" for side in sides] for k in (r["key"] for r in rows)]
        console.table(["key", first, second], [[r["key"], *values] for r, values in zip(rows, shown, strict=True)])


def _diff_runs(names: tuple[str, str], verb: str | None, steps: int, smoke: bool, json: bool) -> None:
    import tempfile

    from xutrain.cli.doctor import tell
    from xutrain.launch import compare

    with tempfile.TemporaryDirectory(prefix="xutrain-diff-") as home:
        folders = [compare.traced(_file(n), verb, [], steps=steps, out=Path(home) / str(i), smoke=smoke) for i, n in enumerate(names)]
        found = compare.first_difference(*folders)
        number = compare.compared(*folders)
    tell(f"{names[0]} and {names[1]}", found, number, json, {"first": names[0], "second": names[1]})


def _file(name: str) -> str:
    """The recipe of a run folder, or the name itself."""
    folder = Path(name)
    return str(folder / "recipe.yaml") if (folder / "recipe.yaml").is_file() else name


def _resolved(name: str, verb: str | None) -> dict[str, Any]:
    from xutrain.recipe.load import load

    return load(_file(name), verb).recipe.model_dump(mode="json")


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(_flat(item, f"{prefix}{key}.") if isinstance(item, dict) and item else {f"{prefix}{key}": item})
    return flat
