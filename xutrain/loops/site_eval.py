"""Segmentation measured sample by sample, by the site that each sample comes from, for whatever a method serves.

Every model that may speak for a sample is run on every test batch once; who speaks (the selector, the true site, everybody) is
then a choice of rows. Batch i is computed by process i mod P (a client's own model: where the client is hosted), so the
numbers do not depend on P. Dice is per sample and structure at threshold 0.5; samples whose truth is empty are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xutrain.data.base import Batch
from xutrain.engine.context import Context
from xutrain.engine.record import Record
from xutrain.errors import Issue, RecipeError
from xutrain.loops import site_tables
from xutrain.methods.federate.base import Committee

if TYPE_CHECKING:
    from xutrain.loops.federated import Job

#: losses (n,), Dice (n, S) and its counts (n, S, 3) of a batch, as they cross between processes
Measured = tuple[list[float], list[list[float]], list[list[list[float]]]]
SHARED = -1
GAMMAS = (0.0, 0.5, 0.7, 0.9, 0.95, 0.99, 1.0)
QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class Answer:
    """What one model (or an ensemble) makes of a split.

    Attributes:
        losses: (n,).
        dice: (n, S), nan where the truth is empty.
        counts: (n, S, 3), pixels of prediction and truth together, of the prediction, of the truth; nan where several models speak.
    """

    losses: Tensor
    dice: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Choice:
    """Who speaks for every sample: ``route`` int64 (n,), a client or SHARED; ``likely`` (n,) argmax and ``sure`` (n,) its probability."""

    route: Tensor
    likely: Tensor | None = None
    sure: Tensor | None = None


def applies(job: Job) -> bool:
    """Masks of several sites."""
    return hasattr(job.task, "split_sites")


def owners(job: Job) -> dict[int, int]:
    """Site -> the client that holds all its training samples; sites that several clients share are left out."""
    sites = job.task.sites
    assert sites is not None
    held: dict[int, set[int]] = {}
    for client, shard in enumerate(job.parts):
        for site in sites[shard.train].unique().tolist():
            held.setdefault(site, set()).add(client)
    return {site: min(clients) for site, clients in held.items() if len(clients) == 1}


def owner_of_samples(job: Job, split: str) -> Tensor:
    """Client of every sample's site, SHARED where no client holds it."""
    known = {} if job.method.pooled else owners(job)
    return torch.tensor([known.get(site, SHARED) for site in job.task.split_sites(split).tolist()], dtype=torch.int64)  # type: ignore[attr-defined]


def answers(job: Job, ctx: Context, split: str, *, ensemble: bool = False) -> dict[int, Answer]:
    """Answers of every model on every sample of ``split``: SHARED, or the clients' numbers; theirs is followed by the ensemble's."""
    committee = job.method.committee(job.server)
    if committee is None and job.method.personal:
        from xutrain.loops.federated_eval import load

        mine = []
        for client in job.workers.hosted:
            load(job, client)
            mine.append([_score(job, batch) for batch in job.task.batches(split, job.bench.eval_batch)])
        blocks = job.workers.objects(mine)
        return {client: _join(blocks[client]) for client in range(len(blocks))}
    models = {SHARED: job.method.served(job.server, {})} if committee is None else _members(committee)
    found: list[tuple[int, dict[int, Any]]] = []
    for i, batch in enumerate(job.task.batches(split, job.bench.eval_batch)):
        if i % ctx.processes == ctx.rank:
            placed = batch.to(ctx.device)
            outputs = {name: logits(job, vector, placed) for name, vector in models.items()}
            scored = {name: _measure(job, out, placed) for name, out in outputs.items()}
            if committee is not None and (ensemble or committee.rule == "ensemble"):
                scored[len(committee.own)] = _measure(job, mixed([outputs[k] for k in range(len(committee.own))]), placed)
            found.append((i, scored))
    blocks = [scored for _, scored in sorted(_everyone(ctx, found), key=lambda item: item[0])]
    return {name: _join([block[name] for block in blocks]) for name in blocks[0]}


def _everyone(ctx: Context, mine: list[Any]) -> list[Any]:
    return [item for block in ctx.workers(ctx.processes).objects([mine]) for item in block]


def _members(committee: Committee) -> dict[int, Tensor]:
    members = dict(enumerate(committee.own))
    return members if committee.shared is None else {SHARED: committee.shared, **members}


def logits(job: Job, vector: Tensor, batch: Batch) -> Tensor:
    """The model's logits in evaluation mode, with the server's statistics."""
    job.bench.point(vector)
    if job.policy != "none":
        job.replica.load_buffers(job.buffers)
    return forward(job, batch)


def forward(job: Job, batch: Batch) -> Tensor:
    """Logits of the model that the module points at, in evaluation mode."""
    module = job.replica.module
    module.eval()
    with torch.no_grad():
        outputs: Tensor = module(batch.inputs).float()
    module.train()
    return outputs


def mixed(outputs: list[Tensor]) -> Tensor:
    """Logits of the mean of the sigmoids."""
    return torch.logit(torch.stack(outputs).sigmoid().mean(dim=0), eps=1e-6)


def _score(job: Job, batch: Batch) -> Measured:
    placed = batch.to(job.bench.ctx.device)
    return _measure(job, forward(job, placed), placed)


def _measure(job: Job, outputs: Tensor, batch: Batch) -> Measured:
    task: Any = job.task
    return task.losses(outputs, batch).tolist(), task.dice(outputs, batch).tolist(), task.counts(outputs, batch).tolist()


def _join(blocks: list[Measured]) -> Answer:
    columns = ([row for block in blocks for row in block[part]] for part in range(3))
    return Answer(*(torch.tensor(rows, dtype=torch.float64) for rows in columns))


def probabilities(job: Job, ctx: Context, split: str, committee: Committee) -> Tensor | None:
    """The selector's softmax of every sample, (n, K)."""
    if committee.selector is None:
        return None
    extra = job.extras["selector"]
    mine = [
        (i, extra.probabilities(committee.selector, batch.to(ctx.device).inputs).tolist())
        for i, batch in enumerate(job.task.batches(split, job.bench.eval_batch))
        if i % ctx.processes == ctx.rank
    ]
    rows = [row for _, block in sorted(_everyone(ctx, mine), key=lambda item: item[0]) for row in block]
    return torch.tensor(rows, dtype=torch.float64)


def check(task: Any, wanted: str) -> None:
    """Refuse to measure on unseen sites where there are none. Raises RecipeError."""
    if wanted == "unseen" and hasattr(task, "unseen_sites") and not task.unseen_sites:
        hint = "take seen or all, or add a site to data.unseen"
        raise RecipeError(Issue("eval.sites", "every site of the data trains", wanted, hint))


def choose(committee: Committee, owner: Tensor, found: Tensor | None, rule: str | None = None, gamma: float | None = None) -> Choice:
    """Who speaks for every sample under ``rule`` (the committee's by default). Equal probabilities: the lowest client."""
    rule, limit = rule or committee.rule, committee.gamma if gamma is None else gamma
    likely = sure = None
    if found is not None:
        sure, likely = found.max(dim=1).values, found.argmax(dim=1)
    if rule == "super":
        assert likely is not None and sure is not None
        above = sure > (torch.tensor(limit, dtype=sure.dtype)[likely] if isinstance(limit, tuple) else limit)
        return Choice(torch.where(above, likely, torch.full_like(likely, SHARED)), likely, sure)
    if rule == "ensemble":
        return Choice(torch.full_like(owner, len(committee.own)), likely, sure)
    return Choice(owner if rule in ("oracle", "own") else torch.full_like(owner, SHARED), likely, sure)


def spoken(said: dict[int, Answer], choice: Choice) -> Answer:
    """The chosen model's answer on every sample; where nobody is chosen and no shared model exists, the mean over the clients."""
    some = next(iter(said.values()))
    losses, dice, counts = torch.empty_like(some.losses), torch.empty_like(some.dice), torch.full_like(some.counts, math.nan)
    for name in choice.route.unique().tolist():
        rows = choice.route == name
        if name in said:
            losses[rows], dice[rows], counts[rows] = said[name].losses[rows], said[name].dice[rows], said[name].counts[rows]
        else:
            losses[rows] = torch.stack([a.losses[rows] for a in said.values()]).mean(0)
            dice[rows] = torch.stack([a.dice[rows] for a in said.values()]).mean(0)
    return Answer(losses, dice, counts)


def of_cases(counts: Tensor, cases: Sequence[str]) -> dict[str, list[float]]:
    """Dice of every case (volume or subject) and structure over all its samples; nan where no truth, or no single model, is in it."""
    total: dict[str, Tensor] = {}
    for row, case in zip(counts, cases, strict=True):
        total[case] = total[case] + row if case in total else row
    return {c: torch.where(n[:, 2] > 0, 2 * n[:, 0] / (n[:, 1] + n[:, 2]), math.nan).tolist() for c, n in total.items()}


def served(job: Job, ctx: Context, split: str, *, ensemble: bool = False) -> tuple[dict[int, Answer], Choice, Tensor | None]:
    """Answers of all models, who is chosen, and the selector's probabilities."""
    said, owner = answers(job, ctx, split, ensemble=ensemble), owner_of_samples(job, split)
    committee = job.method.committee(job.server)
    if committee is not None:
        found = probabilities(job, ctx, split, committee)
        return said, choose(committee, owner, found), found
    return said, Choice(owner if job.method.personal else torch.full_like(owner, SHARED)), None


def mean_of(dice: Tensor, rows: Tensor | None = None) -> float:
    """Mean over samples of the mean over the structures that a sample has; nan without any."""
    each = (dice if rows is None else dice[rows]).nanmean(dim=1)
    known = each[~each.isnan()]
    return float(known.mean()) if len(known) else math.nan


def measure(job: Job, ctx: Context, split: str) -> dict[str, float]:
    """Loss and Dice of a split; of the test split also by site, with seen and unseen sites apart, and how the selector routes."""
    said, choice, found = served(job, ctx, split)
    answer = spoken(said, choice)
    if split != "test":
        return {f"{split}_loss": float(answer.losses.mean()), f"{split}_dice": mean_of(answer.dice)}
    return by_site(job, answer, choice, found)


def rows_of(job: Job, which: str) -> Tensor:
    """Test samples of seen, unseen or all sites, bool (n,)."""
    task: Any = job.task
    sites = task.split_sites("test")
    unseen = torch.isin(sites, torch.tensor(list(task.unseen_sites), dtype=sites.dtype))
    return torch.ones_like(unseen) if which == "all" else unseen if which == "unseen" else ~unseen


def by_site(job: Job, answer: Answer, choice: Choice, found: Tensor | None) -> dict[str, float]:
    """The metrics of the test split under the names that records use."""
    task: Any = job.task
    sites, seen, unseen = task.split_sites("test"), rows_of(job, "seen"), rows_of(job, "unseen")
    main = rows_of(job, job.eval.sites)
    values = {"test_loss": float(answer.losses[main].mean()), "test_dice": mean_of(answer.dice, main)}
    values["test_dice_seen"] = mean_of(answer.dice, seen)
    if bool(unseen.any()):
        values["test_dice_unseen"] = mean_of(answer.dice, unseen)
    for site in sites.unique().tolist():
        values[f"test_dice_site_{task.site_names[site]}"] = mean_of(answer.dice, sites == site)
    if len(task.structures) > 1:
        for i, name in enumerate(task.structures):
            values[f"test_dice_{name}"] = mean_of(answer.dice[:, i : i + 1], main)
    if found is not None:
        assert choice.likely is not None and choice.sure is not None
        owner = owner_of_samples(job, "test")
        known = owner != SHARED
        values["test_selector_accuracy"] = float((choice.likely[known] == owner[known]).double().mean())
        values["test_routed_global"] = float((choice.route[main] == SHARED).double().mean())
        for q in QUANTILES:
            values[f"test_selector_q{round(100 * q)}"] = float(choice.sure[main].quantile(q))
    return {name: value for name, value in values.items() if not math.isnan(value)}


def finish(job: Job, ctx: Context, record: Record) -> dict[str, float]:
    """Measurements of the end: other rules and thresholds on the same models, cross-test, Hausdorff distance, tables, pictures."""
    said, choice, found = served(job, ctx, "test", ensemble=True)
    committee, owner, main = job.method.committee(job.server), owner_of_samples(job, "test"), rows_of(job, job.eval.sites)
    values: dict[str, float] = {}
    if committee is not None:
        values["test_dice_with_ensemble"] = mean_of(spoken(said, choose(committee, owner, found, "ensemble")).dice, main)
    if committee is not None and found is not None:
        for rule, label in (("shared", "global"), ("oracle", "oracle")):
            values[f"test_dice_with_{label}"] = mean_of(spoken(said, choose(committee, owner, found, rule)).dice, main)
        for gamma in GAMMAS:
            chosen = choose(committee, owner, found, "super", gamma)
            values[f"test_dice_gamma_{gamma:g}"] = mean_of(spoken(said, chosen).dice, main)
            values[f"test_routed_gamma_{gamma:g}"] = float((chosen.route[main] == SHARED).double().mean())
    clients = [name for name in said if name != SHARED and name < len(job.parts)]
    known = owner != SHARED
    if len(clients) > 1 and bool(known.any()):
        others = [mean_of(said[k].dice, known & (owner != k)) for k in clients]
        values["test_dice_cross"] = sum(others) / len(others)
    values.update(site_tables.write(job, ctx, record, said, choice, found))
    return {name: value for name, value in values.items() if not math.isnan(value)}
