"""What a clinician would look at: Dice and surface distance per site and per case, who was routed where, overlays of prediction
and truth. Written into the run's artefacts as CSV, JSON and Markdown, pictures as PNG."""

from __future__ import annotations

import csv
import math
import statistics
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xutrain.engine.context import Context
from xutrain.engine.record import Record, write_json
from xutrain.loops import site_eval

if TYPE_CHECKING:
    from xutrain.loops.federated import Job
    from xutrain.loops.site_eval import Answer, Choice

Cell = str | float | int | None


def write(job: Job, ctx: Context, record: Record, said: dict[int, Answer], choice: Choice, found: Tensor | None) -> dict[str, float]:
    """All tables and pictures of the test split; returns the metrics that only they know."""
    task: Any = job.task
    answer, sites, cases = site_eval.spoken(said, choice), task.split_sites("test"), task.split_cases("test")
    shown = {i for site in sites.unique().tolist() for i in spread_out(answer.dice, sites == site, job.eval.overlays)}
    *distances, masks = predictions(job, ctx, choice, shown, job.eval.hausdorff)
    rows = []
    for i, case in enumerate(cases):
        for s, structure in enumerate(task.structures):
            row: dict[str, Cell] = {"site": task.site_names[int(sites[i])], "case": case, "sample": i, "structure": structure}
            row["seen"] = int(int(sites[i]) not in task.unseen_sites)
            row["dice"] = known(float(answer.dice[i, s]))
            row["hd95"], row["hd95_mm"] = (known(far[i][s]) if i in far else None for far in distances)
            row["model"] = name_of(job, int(choice.route[i]))
            rows.append(row)
    by_case = case_summary(rows, site_eval.of_cases(answer.counts, cases), task.structures)
    summary = {"unit_of_hd95": "pixels", "synthetic": bool(task.synthetic), "sites": site_summary(rows, by_case), "cases": by_case}
    if found is not None:
        summary["selector"] = confusion(job, choice)
    if len(said) > 1:
        summary["models"] = {
            name_of(job, m): {task.site_names[s]: known(site_eval.mean_of(a.dice, sites == s)) for s in sites.unique().tolist()}
            for m, a in said.items()
        }
    main = [r for r in rows if job.eval.sites == "all" or bool(r["seen"]) == (job.eval.sites == "seen")]
    far = _numbers(main, "hd95")
    whole = _numbers([r for r in by_case if r["site"] in {m["site"] for m in main}], "whole")
    if ctx.is_main:
        _csv(record, "dice.csv", rows)
        _csv(record, "cases.csv", [{k: v for k, v in r.items() if k != "dice"} | r["dice"] for r in by_case])
        write_json(record.artefact("dice.json"), summary)
        record.artefact("dice.md").write_text(markdown(summary), encoding="utf-8")
        if masks:
            from xutrain.loops import site_pictures

            site_pictures.draw(job, record, answer, choice, masks)
    millimetres = _numbers(main, "hd95_mm")
    means = {"test_hd95": far, "test_hd95_mm": millimetres if len(millimetres) == len(far) else [], "test_dice_cases": whole}
    return {name: statistics.fmean(values) for name, values in means.items() if values}


def _csv(record: Record, name: str, rows: list[dict[str, Any]]) -> None:
    with record.artefact(name).open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def name_of(job: Job, model: int) -> str:
    """What a reader calls a model: global, or the site that it belongs to."""
    if model == site_eval.SHARED:
        return "mean of clients" if job.method.personal and job.method.committee(job.server) is None else "global"
    if model >= len(job.parts):
        return "ensemble"
    task: Any = job.task
    own = [task.site_names[site] for site, client in site_eval.owners(job).items() if client == model]
    return own[0] if len(own) == 1 else f"client {model}"


def spread_out(dice: Tensor, rows: Tensor, count: int) -> list[int]:
    """``count`` samples of ``rows`` spread evenly over their order in Dice, the lowest first."""
    index = rows.nonzero()[:, 0]
    each = dice[index].nanmean(dim=1)
    index, each = index[~each.isnan()], each[~each.isnan()]
    order = index[each.argsort(stable=True)]
    count = min(count, len(order))
    return [int(order[int((j + 0.5) * len(order) / count)]) for j in range(count)]


def predictions(
    job: Job, ctx: Context, choice: Choice, shown: set[int], measured: bool
) -> tuple[dict[int, list[float]], dict[int, list[float]], dict[int, Tensor]]:
    """95 % Hausdorff distance of every sample and structure (nan where a mask is empty) in pixels and, where the spacing is known, in
    millimetres; and the predicted masks of ``shown``.

    Samples for which several models speak at once (the mean over clients) are left out.
    """
    committee = job.method.committee(job.server)
    personal = committee is None and job.method.personal
    mine: list[tuple[int, list[float], list[float], Tensor | None]] = []
    task: Any = job.task
    spacings, first = task.split_spacings("test"), 0
    for i, batch in enumerate(job.task.batches("test", job.bench.eval_batch)):
        here = torch.arange(first, first + len(batch))
        first += len(batch)
        if not personal and i % ctx.processes != ctx.rank:
            continue
        placed = batch.to(ctx.device)
        for model in choice.route[here].unique().tolist():
            if personal and model not in job.workers.hosted:
                continue
            rows = (choice.route[here] == model).nonzero()[:, 0]
            outputs = _outputs(job, model, personal, placed)[rows.to(ctx.device)]
            masks, truth = (outputs > 0).cpu(), batch.targets[rows]
            unknown = [[math.nan] * masks.shape[1]] * len(rows)
            far = hausdorff(masks, truth) if measured else unknown
            gaps = spacings[here[rows]]
            millimetres = hausdorff(masks, truth, gaps) if measured and bool(gaps.isfinite().any()) else unknown
            for j, sample in enumerate(here[rows].tolist()):
                mine.append((sample, far[j], millimetres[j], masks[j] if sample in shown else None))
    everyone = [item for block in ctx.workers(ctx.processes).objects([mine]) for item in block]
    pixels, lengths = {i: far for i, far, _, _ in everyone}, {i: far for i, _, far, _ in everyone}
    return pixels, lengths, {i: mask for i, _, _, mask in everyone if mask is not None}


def _outputs(job: Job, model: int, personal: bool, batch: Any) -> Tensor:
    committee = job.method.committee(job.server)
    if personal:
        from xutrain.loops.federated_eval import load

        load(job, model)
        return site_eval.forward(job, batch)
    if committee is None:
        return site_eval.logits(job, job.method.served(job.server, {}), batch)
    if model == len(committee.own):
        return site_eval.mixed([site_eval.logits(job, vector, batch) for vector in committee.own])
    vector = committee.shared if model == site_eval.SHARED else committee.own[model]
    assert vector is not None
    return site_eval.logits(job, vector, batch)


def hausdorff(masks: Tensor, truth: Tensor, spacings: Tensor | None = None) -> list[list[float]]:
    """MONAI's 95 % Hausdorff distance, (n, S), in pixels or by ``spacings`` (n, axes); nan without either mask or spacing."""
    from monai.metrics import compute_hausdorff_distance

    found = torch.full(masks.shape[:2], math.nan, dtype=torch.float64)
    both = masks.flatten(2).any(2) & truth.bool().flatten(2).any(2)
    if spacings is not None:
        both &= spacings.isfinite().all(1)[:, None]
    for i, s in both.nonzero().tolist():
        gaps = None if spacings is None else spacings[i].tolist()
        one, other = masks[i : i + 1, s : s + 1].float(), truth[i : i + 1, s : s + 1].float()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # MONAI's own call of an option that it is about to drop
            found[i, s] = float(compute_hausdorff_distance(one, other, include_background=True, percentile=95, spacing=gaps))
    value: list[list[float]] = found.tolist()
    return value


def quartiles(values: list[float]) -> dict[str, float | int | None]:
    """Count, mean, median and quartiles."""
    if not values:
        return {"count": 0, "mean": None, "q1": None, "median": None, "q3": None}
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return {"count": len(values), "mean": statistics.fmean(values), "q1": low, "median": middle, "q3": high}


def _numbers(rows: list[dict[str, Cell]], column: str) -> list[float]:
    return [value for row in rows if isinstance(value := row[column], float)]


def site_summary(rows: list[dict[str, Cell]], by_case: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a site and structure: Dice of samples and of whole cases, surface distance, with median and quartiles."""
    keys = list(dict.fromkeys((r["site"], r["structure"], r["seen"]) for r in rows))
    found = []
    for site, structure, seen in keys:
        mine = [r for r in rows if r["site"] == site and r["structure"] == structure]
        missed = sum(1 for r in mine if r["dice"] is not None and r["hd95"] is None)
        whole = _numbers([r for r in by_case if r["site"] == site and r["structure"] == structure], "whole")
        found.append({"site": site, "structure": structure, "seen": bool(seen), "dice": quartiles(_numbers(mine, "dice")),
                      "whole_cases": quartiles(whole),
                      "hd95": quartiles(_numbers(mine, "hd95")),
                      "hd95_mm": quartiles(_numbers(mine, "hd95_mm")), "without_distance": missed})  # fmt: skip
    return found


def case_summary(rows: list[dict[str, Cell]], whole: dict[str, list[float]], structures: tuple[str, ...]) -> list[dict[str, Any]]:
    """One row a case (volume or subject) and structure: ``whole`` is Dice over the pixels of all its samples, ``dice`` that of each."""
    grouped: dict[tuple[Cell, Cell, Cell], list[dict[str, Cell]]] = {}
    for row in rows:
        grouped.setdefault((row["site"], row["case"], row["structure"]), []).append(row)
    return [
        {
            "site": site,
            "case": case,
            "structure": structure,
            "whole": known(whole[str(case)][structures.index(str(structure))]),
            "dice": quartiles(_numbers(mine, "dice")),
        }
        for (site, case, structure), mine in grouped.items()
    ]


def confusion(job: Job, choice: Choice) -> list[dict[str, Any]]:
    """One row a site: how many of its samples the selector gives to each client, and how many are sent to which model."""
    assert choice.likely is not None and choice.sure is not None
    task: Any = job.task
    committee = job.method.committee(job.server)
    assert committee is not None
    limits = committee.gamma if isinstance(committee.gamma, tuple) else (committee.gamma,) * len(job.parts)
    sites, clients = task.split_sites("test"), range(len(job.parts))
    found = []
    for site in sites.unique().tolist():
        rows = sites == site
        found.append(
            {
                "site": task.site_names[site],
                "seen": site not in task.unseen_sites,
                "likely": {name_of(job, k): int((choice.likely[rows] == k).sum()) for k in clients},
                "sent": {name_of(job, k): int((choice.route[rows] == k).sum()) for k in (site_eval.SHARED, *clients)},
                "followed_above": {name_of(job, k): value for k, value in enumerate(limits)},
                "largest_probability": {f"q{round(100 * q)}": float(choice.sure[rows].quantile(q)) for q in site_eval.QUANTILES},
            }
        )
    return found


def markdown(summary: dict[str, Any]) -> str:
    """The summary for a reader."""
    lines = ["# Segmentation of the test cases", ""]
    if summary["synthetic"]:
        lines += ["**Synthetic data: generated images, no patients.**", ""]
    head = ["site", "trained on", "structure", "samples", "Dice mean", "q1", "median", "q3", "cases", "Dice of whole cases", "median"]
    head += ["HD95 mean (px)", "HD95 median", "HD95 mean (mm)", "HD95 median (mm)", "no distance"]
    lines += [_row(head), "|" + "---|" * len(head)]
    for r in summary["sites"]:
        d, w, h, mm = r["dice"], r["whole_cases"], r["hd95"], r["hd95_mm"]
        cells = [r["site"], "yes" if r["seen"] else "no", r["structure"], d["count"], *(d[c] for c in ("mean", "q1", "median", "q3"))]
        lines.append(
            _row([*cells, w["count"], w["mean"], w["median"], h["mean"], h["median"], mm["mean"], mm["median"], r["without_distance"]])
        )
    if "selector" in summary:
        names = list(summary["selector"][0]["likely"])
        sent = list(summary["selector"][0]["sent"])
        head = ["site", "trained on", *(f"says {n}" for n in names), *(f"sent to {n}" for n in sent), "largest p: q10", "median", "q90"]
        lines += ["", "## Selector: what it says, and where the image goes", "", _row(head), "|" + "---|" * len(head)]
        for r in summary["selector"]:
            q = r["largest_probability"]
            cells = [r["site"], "yes" if r["seen"] else "no", *r["likely"].values(), *r["sent"].values(), q["q10"], q["q50"], q["q90"]]
            lines.append(_row(cells))
        limits = ", ".join(f"{name} {value:.3f}" for name, value in summary["selector"][0]["followed_above"].items())
        lines += ["", f"The selector is followed above: {limits}."]
    if "models" in summary:
        sites = list(next(iter(summary["models"].values())))
        lines += ["", "## Dice of every model on every site", "", _row(["model", *sites]), "|" + "---|" * (len(sites) + 1)]
        lines += [_row([name, *found.values()]) for name, found in summary["models"].items()]
    return "\n".join(lines) + "\n"


def _row(cells: list[Any]) -> str:
    return "| " + " | ".join("–" if c is None else f"{c:.3f}" if isinstance(c, float) else str(c) for c in cells) + " |"
