"""`xutrain bench`: will compression pay on this machine and network?"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from xutrain.cli import console
from xutrain.errors import Issue, UsageError

_EXAMPLES = "Examples: xutrain bench    xutrain bench --config orq_cifar10_small --workers 16    torchrun --nnodes 2 ... -m xutrain bench"


def register(app: typer.Typer) -> None:
    app.command("bench", epilog=_EXAMPLES)(bench)


def bench(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides for --config.", show_default=False)
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", "-c", metavar="RECIPE", help="Take model, batch and N from a data-parallel recipe.")
    ] = None,
    processes: Annotated[int, typer.Option("--processes", min=1, max=64, help="Processes that talk; 1 measures no network.")] = 2,
    workers: Annotated[
        int | None, typer.Option(min=2, max=10**6, help="N of the break-even points.", show_default="the recipe's, or as many as processes")
    ] = None,
    elements: Annotated[int, typer.Option(min=1000, max=1 << 28, help="Length of the vector that is exchanged.")] = 1_000_000,
    codec: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this codec; may be given several times.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Measure what decides whether compression pays: the network, the codecs, and how much of a step is communication."""
    recipe = _recipe(config, list(overrides or []))
    from xutrain.launch import speed

    if unknown := [c for c in codec or [] if c not in speed.CODECS]:
        raise UsageError(Issue("--codec", "is not measured", unknown[0], f"one of {', '.join(map(repr, speed.CODECS))}"))
    if recipe is not None and workers is None:
        workers = max(2, recipe.workers)
    found = speed.measure(processes, workers, elements, list(codec or []), recipe)
    if found is None:
        return
    if json:
        console.print_json(found)
    else:
        _show(found)


def _recipe(config: str | None, overrides: list[str]) -> Any:
    if config is None:
        if overrides:
            raise UsageError(Issue("KEY=VALUE", "is for --config RECIPE", " ".join(overrides)))
        return None
    from xutrain.families import FAMILIES
    from xutrain.recipe.load import load

    loaded = load(config, None, overrides)
    if not FAMILIES[loaded.verb].loop.endswith("data_parallel"):
        hint = "a recipe of quantize, sparsify or pretrain"
        raise UsageError(Issue("--config", f"{loaded.verb} exchanges no gradients between workers", config, hint))
    return loaded.recipe


def _show(found: dict[str, Any]) -> None:
    from xutrain.engine.network import rate_text

    network, count = found["network"], found["workers"]
    console.out.print(f"{found['cores']} cores, load {found['load']}, {found['device']}; {found['elements']:,} elements", markup=False)
    if network:
        text = f"{rate_text(network['bandwidth'])}, {network['latency_s'] * 1e6:.0f} us a message ({network['backend']})"
        console.out.print(f"network    {found['processes']} processes: {text}", markup=False)
    else:
        console.out.print("network    not measured (one process); 1 Gbit/s and 50 us are assumed below", markup=False)
    gradient, full = 1e3 * found["gradient_s"], 1e3 * found["fp32_all_reduce_s"]
    console.out.print(f"headroom   gradient {gradient:.3g} ms, fp32 all-reduce of {count} workers {full:.3g} ms (model):", markup=False)
    console.out.print(f"           without any communication a step would be {found['headroom']:.3g} times as fast, at most", markup=False)
    rows = []
    for row in found["codecs"]:
        at = row["break_even_bandwidth"]
        below = "-" if at is None else "any" if at == float("inf") else rate_text(at)
        pays = {True: "yes", False: "no", None: "-"}[row["pays_here"]]
        cells = [row["codec"], f"{row['encode_ns']:.2f}", f"{row['decode_ns']:.2f}", f"{row['bits_per_element']:.3f}", row["exchange"]]
        rows.append([*cells, f"{1e3 * row['exchange_s']:.3g}", below, pays])
    columns = ["codec", "encode ns", "decode ns", "bits/elem", "exchange", f"ms, N={count}", "ahead of fp32 below", "here"]
    console.table(columns, rows, wrap=False)
    if found["headroom"] < 1.1:
        console.out.print("less than a tenth is communication here: compression has next to nothing to save", markup=False)
