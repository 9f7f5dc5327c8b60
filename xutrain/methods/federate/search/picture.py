"""The policy over the rounds as a picture: every searched value with the law's mean and one deviation around it, loss and reward."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

Curves = dict[str, list[tuple[int, float]]]


def curves(lines: Iterable[dict[str, Any]]) -> Curves:
    """What a run logged of its search: name -> (round, value)."""
    found: dict[str, dict[int, float]] = {}
    for line in lines:
        if line.get("split") == "search" and line["value"] is not None:
            found.setdefault(line["name"], {})[int(line["step"])] = float(line["value"])
    return {name: sorted(points.items()) for name, points in found.items()}


def draw(lines: Iterable[dict[str, Any]], path: Path) -> Path | None:
    """Write the picture; None where nothing was searched."""
    known = curves(lines)
    names = [n.removeprefix("sample_") for n in known if n.startswith("sample_")]
    if not names:
        return None
    from matplotlib.figure import Figure

    weights = [n for n in names if n.startswith("weight_")]
    panels = [[n] for n in names if n not in weights] + ([weights] if weights else [])
    rows = len(panels) + 1
    figure = Figure(figsize=(8, 1.2 + 1.7 * rows), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    for axis, group in zip(axes, panels, strict=False):
        for i, name in enumerate(group):
            _law(axis, known, name, f"C{i % 10}", alone=len(group) == 1)
        axis.set_ylabel("weights" if group is weights else name.replace("_", " "))
    _outcome(axes[-1], known)
    axes[-1].set_xlabel("round")
    axes[0].set_title("Drawn values (dots), mean of the policy (line), one deviation (band)", fontsize=10, loc="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def _law(axis: Any, known: Curves, name: str, colour: str, *, alone: bool) -> None:
    """One value: dots, line and, where it has the panel for itself, the band."""
    if alone:
        axis.plot(*zip(*known[f"sample_{name}"], strict=True), ".", color=colour, markersize=3, alpha=0.6)
    mean, std = known.get(f"policy_mean_{name}", []), dict(known.get(f"policy_std_{name}", []))
    if mean:
        x, y = [p[0] for p in mean], [p[1] for p in mean]
        axis.plot(x, y, color=colour, linewidth=1.4, label=name.removeprefix("weight_"))
        if alone:
            axis.fill_between(x, [v - std.get(q, 0) for q, v in mean], [v + std.get(q, 0) for q, v in mean], color=colour, alpha=0.15)


def _outcome(axis: Any, known: Curves) -> None:
    """Validation loss, logarithmic, and reward on an axis of its own."""
    if known.get("search_loss"):
        axis.plot(*zip(*known["search_loss"], strict=True), color="C0", linewidth=1.4)
        if min(v for _, v in known["search_loss"]) > 0:
            axis.set_yscale("log")
    axis.set_ylabel("validation loss", color="C0")
    if known.get("reward"):
        other = axis.twinx()
        other.plot(*zip(*known["reward"], strict=True), color="C1", linewidth=0.9, alpha=0.8)
        other.set_ylabel("reward", color="C1")
