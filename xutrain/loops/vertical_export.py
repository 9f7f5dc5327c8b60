"""``xutrain vertical export``: one table of coefficients from the model files that all parties give. No torch here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from xutrain.errors import Issue, UsageError


def read(path: Path) -> Any:
    """The JSON value of a file, None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def merged(files: list[tuple[Path, Any]]) -> dict[str, Any]:
    """Score = intercept + sum of coefficient times raw value; a level of a text column counts as 1 where it is the value.

    The parties' standardisation is folded into coefficients and intercept, so the result needs nothing else to score a row.

    Raises:
        UsageError: a file is no model file; files are of other runs or jobs; a party is missing or given twice.
    """
    found: dict[str, dict[str, Any]] = {}
    for path, model in files:
        if not isinstance(model, dict) or not {"party", "parties", "job", "columns", "weights", "preprocessing"} <= set(model):
            raise UsageError(Issue(str(path), "is no model file of `xutrain vertical train --party`", has_value=False))
        if model["party"] in found:
            raise UsageError(Issue(str(path), "is given twice, or of a party that is", model["party"]))
        found[model["party"]] = model
    first = next(iter(found.values()))
    for party, model in found.items():
        if (model["run"], model["job"]) != (first["run"], first["job"]):
            raise UsageError(Issue(party, f"is of another run or job than {first['party']}", model["run"]))
    missing = [p for p in first["parties"] if p not in found]
    if missing:
        raise UsageError(
            Issue("models", f"the file of {', '.join(missing)} is missing: without it there is no merged model", has_value=False)
        )
    coefficients: list[dict[str, Any]] = []
    intercept = np.zeros(np.array(first["weights"]).shape[1:])
    for party in first["parties"]:
        model = found[party]
        mean, scale, coded = _coding(model)
        for at, (column, w, m, s) in enumerate(zip(model["columns"], np.array(model["weights"]), mean, scale, strict=True)):
            if column == "intercept" and at >= coded:
                intercept = intercept + w
                continue
            intercept = intercept - w * m / s
            coefficients.append({"column": column, "party": party, "coefficient": (w / s).tolist()})
    return {
        "loss": first["loss"], "run": first["run"], "job": first["job"], "intercept": intercept.tolist(), "coefficients": coefficients,
    }  # fmt: skip


def _coding(model: dict[str, Any]) -> tuple[list[float], list[float], int]:
    """Mean and scale of every coded column, 0 and 1 for those that were taken as they are; how many were coded."""
    mean: list[float] = []
    scale: list[float] = []
    for step in model["preprocessing"].get("columns", {}).values():
        mean += step["mean"]
        scale += step["scale"]
    rest = len(model["columns"]) - len(mean)
    return mean + [0.0] * rest, scale + [1.0] * rest, len(mean)
