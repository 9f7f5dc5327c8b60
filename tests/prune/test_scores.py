"""Exact properties of the scores, in double precision."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from prune_layer import expert, gather, rng, routing, tokens
from torch.nn import functional as F

from xutrain.engine.rng import key
from xutrain.methods.prune.base import ROLES, Chunk, Cut, Expert, Routing, Tokens, magnitude_cut
from xutrain.methods.prune.magnitude import Magnitude
from xutrain.methods.prune.masks import Pattern, row_mask
from xutrain.methods.prune.moe_pruner import MoEPruner
from xutrain.methods.prune.path import Path
from xutrain.methods.prune.random import Random
from xutrain.methods.prune.rescale import RowScales
from xutrain.methods.prune.sparsegpt import SparseGPT
from xutrain.methods.prune.wanda import Wanda

HALF = Pattern(0.5)


def build(cls: type, **options: object) -> object:
    return cls(cls.Options(name=cls.entry.name, **options))


def cut(method: object, e: Expert, x: torch.Tensor, r: Routing, which: int = 0, pattern: Pattern = HALF) -> Cut:
    sums = gather(method, e, x, method.tokens(r, which))
    return method.cut(e, {} if sums is None else sums.state(), pattern, key(0, "prune"))


def same(a: Cut, b: Cut) -> bool:
    return all(torch.equal(a.masks[r], b.masks[r]) for r in ROLES)


def test_equal_gates_give_wandas_masks_bit_for_bit() -> None:
    e, x = expert(), tokens()
    r = routing(x)
    flat = replace(r, weight=torch.full_like(r.weight, 0.5))  # a router of zeros: 1/k for every token
    assert same(cut(build(MoEPruner), e, x, flat), cut(build(Wanda), e, x, flat))
    top1 = routing(x, k=1)
    assert same(cut(build(MoEPruner), e, x, top1), cut(build(Wanda), e, x, top1))
    assert same(cut(build(MoEPruner, gate="none"), e, x, r), cut(build(Wanda), e, x, r))
    assert not same(cut(build(MoEPruner), e, x, r), cut(build(Wanda), e, x, r))


@pytest.mark.parametrize("method", [MoEPruner, Path])
def test_scaling_the_gates_of_an_expert_changes_no_mask(method: type) -> None:
    e, x = expert(), tokens()
    r = routing(x)
    assert same(cut(build(method), e, x, r), cut(build(method), e, x, replace(r, weight=r.weight * 16.0)))


def layer_output(experts: list[Expert], x: torch.Tensor, r: Routing) -> torch.Tensor:
    out = torch.zeros_like(x)
    for i, e in enumerate(experts):
        index, weight = r.routed(i)
        out.index_add_(0, index, weight.unsqueeze(1) * e(x[index]))
    return out


def test_w2_score_is_the_exact_damage_of_one_weight_to_the_layer_output() -> None:
    x = tokens()
    experts, r = [expert(seed=s) for s in range(4)], routing(x)
    method = build(MoEPruner)
    scores = method.scores(experts[1], gather(method, experts[1], x, method.tokens(r, 1)).state())["down"]
    before = layer_output(experts, x, r)
    for i, j in [(0, 0), (3, 7), (11, 19)]:
        down = experts[1].down.clone()
        down[i, j] = 0
        damage = (layer_output([experts[0], replace(experts[1], down=down), *experts[2:]], x, r) - before).norm()
        assert float(damage) == pytest.approx(float(scores[i, j]), rel=1e-12)


def test_path_score_is_exact_for_w3_and_first_order_for_w1() -> None:
    x = tokens()
    experts, r = [expert(seed=s) for s in range(4)], routing(x)
    method = build(Path)
    scores = method.scores(experts[2], gather(method, experts[2], x, method.tokens(r, 2)).state())
    before = layer_output(experts, x, r)
    m, j = 5, 3
    column = experts[2].down[:, m].norm()

    def damage(role: str, share: float) -> float:
        w = experts[2].matrix(role).clone()
        w[m, j] *= 1 - share
        return float((layer_output([*experts[:2], replace(experts[2], **{role: w}), experts[3]], x, r) - before).norm())

    assert damage("up", 1.0) == pytest.approx(float(column * scores["up"][m, j]), rel=1e-12)
    assert damage("gate", 1e-5) == pytest.approx(float(1e-5 * column * scores["gate"][m, j]), rel=1e-3)


def test_mask_is_optimal_when_gated_inputs_are_orthogonal() -> None:
    d = 8
    q, _ = torch.linalg.qr(torch.randn(d, d, generator=rng(1), dtype=torch.float64))
    g = torch.rand(d, generator=rng(2), dtype=torch.float64) + 0.1
    x = q / g.unsqueeze(1) * torch.linspace(0.5, 2, d, dtype=torch.float64)  # diag(g) x has orthogonal columns
    w = torch.randn(1, d, generator=rng(3), dtype=torch.float64)
    score = w.abs() * (g.square() @ x.square()).sqrt()

    def error(mask: torch.Tensor) -> float:
        return float((g.unsqueeze(1) * (x @ (w * ~mask).T)).square().sum())

    mask = row_mask(score, HALF)
    assert error(mask) == pytest.approx(float(score[~mask].square().sum()), rel=1e-12)
    for kept in itertools.combinations(range(d), d // 2):
        other = torch.zeros_like(mask)
        other[0, list(kept)] = True
        assert error(mask) <= error(other) + 1e-12


@pytest.mark.parametrize("method", [Wanda, MoEPruner, Path, SparseGPT])
def test_order_of_tokens_and_chunks_does_not_matter(method: type) -> None:
    e, x = expert(), tokens()
    r = routing(x)
    order = torch.randperm(len(x), generator=rng(8))
    shuffled = Routing(r.index[order], r.weight[order], r.prob[order])
    assert same(cut(build(method), e, x, r), cut(build(method), e, x[order], shuffled))
    m = build(method)
    whole, parts = (gather(m, e, x, m.tokens(r, 0), size).state() for size in (1000, 7))
    assert all(torch.allclose(whole[k], parts[k], rtol=1e-12) for k in whole)


def test_random_and_magnitude_look_at_no_data() -> None:
    e = expert()
    a, b = (build(Random).cut(e, {}, HALF, key(s, "prune")) for s in (0, 1))
    assert not same(a, b) and same(a, build(Random).cut(e, {}, HALF, key(0, "prune")))
    assert all((m.sum(1) == m.shape[1] - m.shape[1] // 2).all() for m in a.masks.values())
    rows = build(Magnitude, group="row").cut(e, {}, HALF, key())
    assert same(rows, magnitude_cut(e, HALF))
    whole = build(Magnitude).cut(e, {}, HALF, key())
    assert all(int((~m).sum()) == m.numel() // 2 + 1 for m in whole.masks.values())  # inclusive threshold


def test_metric_wins_where_gates_and_inputs_are_correlated() -> None:
    """Spec 9.7: two halves of tokens on two halves of channels with gates .9 and .1."""
    d, f, n = 64, 128, 2000
    g = rng(4)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    scale = torch.full((n, d), 0.2, dtype=torch.float64)
    scale[: n // 2, : d // 2] = scale[n // 2 :, d // 2 :] = 1
    x *= scale
    weight = torch.cat([torch.full((n // 2,), 0.9), torch.full((n // 2,), 0.1)]).double()
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    e = Expert(draw(f, d) / 8, draw(f, d) / 8, draw(d, f) / 11)
    one = Routing(torch.zeros(n, 1, dtype=torch.int64), weight.unsqueeze(1), torch.ones(n, 1, dtype=torch.float64))

    def error(method: object) -> float:
        pruned = cut(method, e, x, one).applied(e)
        gated = weight.unsqueeze(1)
        return float((gated * (e(x) - pruned(x))).norm() / (gated * e(x)).norm())

    errors = [error(build(m)) for m in (Magnitude, Wanda, MoEPruner, Path)]
    assert errors[2] < 0.8 * errors[1] and errors[3] < errors[2] + 0.005 and errors[1] < errors[0] + 0.02


def outlier_twin(e: Expert, x: torch.Tensor) -> tuple[Expert, torch.Tensor]:
    """The same function with rescaled channels, as large models have them."""
    c = torch.randn(x.shape[1], generator=rng(21), dtype=torch.float64).exp()
    u = torch.randn(e.up.shape[0], generator=rng(22), dtype=torch.float64).exp()
    return Expert(e.gate / c, e.up / c * u.unsqueeze(1), e.down / u), x * c


def test_masks_are_invariant_to_rescaled_channels_where_promised() -> None:
    e, x = expert(), tokens(200)
    r = routing(x)
    twin, scaled = outlier_twin(e, x)
    torch.testing.assert_close(twin(scaled), e(x))
    invariant = (build(Wanda), build(MoEPruner), build(MoEPruner, gate="sqrt"), build(Path), build(SparseGPT, invariant=True, gate="topk"))
    for method in invariant:
        assert same(cut(method, e, x, r), cut(method, twin, scaled, r)), method
    for method in (build(Magnitude), build(SparseGPT)):
        assert not same(cut(method, e, x, r), cut(method, twin, scaled, r))


def test_row_scales_minimise_the_gated_error_and_are_one_without_pruning() -> None:
    e, x = expert(), tokens(200)
    r = routing(x)
    method = build(MoEPruner)
    chosen = method.tokens(r, 0)
    done = cut(method, e, x, r)
    z = x[chosen.index]
    chunk = Chunk(z, chosen.weight, *e.inner(z))
    scales = RowScales(e, done.applied(e))
    scales.add(chunk)
    for role in ROLES:
        y, masked = (chunk.input(role) @ w.T for w in (e.matrix(role), done.applied(e).matrix(role)))
        gated = chosen.weight.unsqueeze(1)
        error = [float((gated * (y - scale * masked)).norm()) for scale in (1.0, scales.alpha(role), scales.alpha(role) * 1.01)]
        assert error[1] < error[0]
        free = (scales.alpha(role) > 0.5) & (scales.alpha(role) < 2)
        per_row = [(gated * (y - s * masked)).norm(dim=0)[free] for s in (scales.alpha(role), scales.alpha(role) * 1.01)]
        assert (per_row[0] <= per_row[1]).all()
        assert torch.equal(scales.cut(done).masks[role], done.masks[role])
    small = RowScales(Expert(e.gate * 1e-18, e.up, e.down), Expert(e.gate * 1e-18, e.up, e.down))
    small.add(chunk)
    assert torch.equal(small.alpha("gate"), torch.ones_like(small.alpha("gate")))
    same_weights = RowScales(e, e)
    same_weights.add(chunk)
    assert all((same_weights.alpha(role) == 1).all() for role in ROLES)


def test_zero_sparsity_is_the_identity_and_full_sparsity_is_zero() -> None:
    e, x = expert(), tokens()
    r = routing(x)
    for method in (Wanda, MoEPruner, Path, Magnitude, Random):
        nothing = cut(build(method), e, x, r, pattern=Pattern(0.0)).applied(e)
        assert all(torch.equal(nothing.matrix(role), e.matrix(role)) for role in ROLES)
        everything = cut(build(method), e, x, r, pattern=Pattern(1.0)).applied(e)
        assert not any(everything.matrix(role).any() for role in ROLES)


def test_all_tokens_reading_uses_probabilities_of_every_token() -> None:
    x = tokens()
    r = routing(x)
    chosen = build(MoEPruner, gate="all_tokens").tokens(r, 2)
    assert len(chosen.index) == len(x) and torch.equal(chosen.weight, r.prob[:, 2])
    assert F.one_hot(r.index, 4).sum() == 2 * len(x)
    assert isinstance(build(Wanda, all_tokens=True).tokens(r, 0), Tokens)


def test_sums_are_float32_where_the_forward_pass_is_bfloat16() -> None:
    wide, x = expert(), tokens()
    e = Expert(*(wide.matrix(r).bfloat16() for r in ROLES))
    r = routing(x)
    for method in (build(Wanda), build(Path), build(SparseGPT)):
        sums = gather(method, e, x.bfloat16(), Tokens(*r.routed(0)))
        assert all(s.dtype == torch.float32 for s in sums.state().values())
        done = method.cut(e, sums.state(), HALF, key())
        assert all(0.3 < float(m.float().mean()) < 0.7 for m in done.masks.values())
