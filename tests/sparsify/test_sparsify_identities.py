"""The exact identities of SAEF and DEF, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bench_sparsify import LAYOUT, TOLERANCE, D, Problem, drive, make, sgd
from torch import Tensor

K = 4
CODECS: list[tuple[str, dict[str, Any]]] = [
    ("fp", {}),
    ("random_block", {"ratio": 4.0}),
    ("random_block", {"ratio": 4.0, "scope": "flat", "balanced": True}),
    ("random_block", {"ratio": 4.0, "scope": "grid"}),
    ("random_k", {"ratio": 4.0}),
    ("top_k", {"ratio": 5.0}),
    ("scaled_sign", {"scope": "global"}),
    ("orq", {"levels": 3}),
    ("low_rank", {"rank": 1}),
]
IDS = ["-".join([n, *map(str, o.values())]) for n, o in CODECS]
ONE_WAY = [("ef", {}), ("saef", {}), ("saef", {"average_every": 3}), ("def", {"coeff": 0.3})]
TWO_WAY = [("ef", {"two_way": True}), ("saef", {"two_way": True, "average_every": 4})]


def mean(tensors: list[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).mean(0)


def close(a: Tensor, b: Tensor, tolerance: float = TOLERANCE) -> None:
    assert float((a - b).abs().max()) < tolerance


def with_codec(codec: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    return {"codec": codec[0], **{f"codec_{k}": v for k, v in codec[1].items()}}


@pytest.mark.parametrize("codec", CODECS, ids=IDS)
@pytest.mark.parametrize(("name", "options"), [*ONE_WAY, *TWO_WAY])
def test_virtual_point(name: str, options: dict[str, Any], codec: tuple[str, dict[str, Any]]) -> None:
    """y_{t+1} = y_t - lr mean m, for every compressor, one- or two-way, with or without averaging."""
    if options.get("two_way") and codec[0] in ("random_block", "random_k", "low_rank"):
        pytest.skip("refused: the mean of such messages is compressed already")
    problem, method = Problem(K), make(name, problem=Problem(K), workers=K, **with_codec(codec), **options)
    for step in range(12):
        before = method.virtual()
        drive(method, problem, 1, first=step)
        close(method.virtual(), before - 0.05 * mean(method.velocity))


@pytest.mark.parametrize("name", ["ef", "saef", "def", "cser", "pef", "sgd"])
def test_identity_codec_is_sgd(name: str) -> None:
    problem = Problem(K)
    method = make(name, problem=problem, workers=K)
    drive(method, problem, 20)
    close(method.deploy()["x"], sgd(problem, K, 20)[-1], 1e-12)


@pytest.mark.parametrize("coeff", [0.0, 0.3, 1.0, "adaptive"])
def test_ratio_1_is_sgd_for_every_coefficient(coeff: Any) -> None:
    problem = Problem(K)
    method = make("def", "random_block", problem=problem, workers=K, coeff=coeff, codec_ratio=1.0)
    drive(method, problem, 20)
    close(method.x, sgd(problem, K, 20)[-1], 1e-12)


@pytest.mark.parametrize("codec", CODECS, ids=IDS)
def test_limits_of_the_coefficient(codec: tuple[str, dict[str, Any]]) -> None:
    """lambda 0 is EF, lambda 1 is SAEF, and CSER that sends nothing between resets is SAEF."""
    ends = {}
    for name, options in {"ef": {}, "saef": {}, "cser": {}, "def0": {"coeff": 0.0}, "def1": {"coeff": 1.0}}.items():
        problem = Problem(K)
        ends[name] = make(name[:3] if name.startswith("def") else name, problem=problem, workers=K, **with_codec(codec), **options)
        drive(ends[name], problem, 15)
    assert torch.equal(ends["def0"].x, ends["ef"].x) and torch.equal(ends["def1"].x, ends["saef"].x)
    if codec[0] not in ("orq", "scaled_sign", "top_k"):  # the codec must be odd; rounding of float32 messages aside
        close(ends["cser"].x, ends["saef"].x)
        close(ends["cser"].deploy()["y"], ends["saef"].virtual())


def reference(
    problem: Problem, block: Any, lam: float, period: int, steps: int, lr: float = 0.05, mu: float = 0.9, wd: float = 1e-2
) -> Tensor:
    """DEF written from the paper's code: p, delta and e are separate, the exchange comes after the local steps."""
    x = problem.theta.clone()
    p, m, delta = [x.clone() for _ in range(K)], [torch.zeros(D).double() for _ in range(K)], [torch.zeros(D).double() for _ in range(K)]
    for step in range(steps):
        for k in range(K):
            m[k] = mu * m[k] + problem.grad(k, step, p[k]) + wd * p[k]
            p[k] = p[k] - lr * m[k]
            delta[k] = delta[k] + lr * m[k]
        if (step + 1) % period == 0:
            at = block(step // period)
            c = torch.zeros(D).double()
            c[at] = sum(d[at] for d in delta) / K
            x = x - c
            for k in range(K):
                delta[k] = delta[k].clone()
                delta[k][at] = 0.0
                p[k] = x - lam * delta[k]
    return x


@pytest.mark.parametrize(("coeff", "period"), [(0.3, 1), (0.5, 3), (0.0, 2)])
def test_def_against_a_reference(coeff: float, period: int) -> None:
    problem = Problem(K)
    method = make("def", "random_block", problem=problem, workers=K, coeff=coeff, period=period, codec_ratio=4.0)
    drive(method, problem, 18)
    codec, ctx = method.setup.exchange.codec, method.setup.ctx
    close(method.x, reference(problem, lambda n: codec.positions(D, ctx.key("round", n)), coeff, period, 18))


def test_ef_with_local_steps_is_x_minus_p_plus_e() -> None:
    """EF with P > 1: p runs from x; the message is (x - p) + e."""
    problem, P = Problem(K), 3
    method = make("ef", "top_k", problem=problem, workers=K, period=P, codec_ratio=5.0)
    start = [v.clone() for v in method.error]
    for step in range(9):
        if step % P == 0:
            start = [v.clone() for v in method.error]
        x = method.x.clone()
        drive(method, problem, 1, first=step)
        if (step + 1) % P:
            for k in range(K):
                close(x - method.point(k) + start[k], method.error[k])


def test_local_sgd() -> None:
    """P > 1 with the identity codec: models are averaged every P steps, momenta stay local."""
    problem, P = Problem(K), 4
    method = make("def", problem=problem, workers=K, period=P, coeff=0.3)
    drive(method, problem, 12)
    x, m = problem.theta.clone(), [torch.zeros(D).double() for _ in range(K)]
    for start in range(0, 12, P):
        models = []
        for k in range(K):
            p = x.clone()
            for step in range(start, start + P):
                m[k] = 0.9 * m[k] + problem.grad(k, step, p) + 1e-2 * p
                p = p - 0.05 * m[k]
            models.append(p)
        x = mean(models)
    close(method.x, x)


@pytest.mark.parametrize("codec", CODECS, ids=IDS)
def test_one_worker_step_ahead_follows_sgd(codec: tuple[str, dict[str, Any]]) -> None:
    problem = Problem(1)
    method = make("saef", problem=problem, workers=1, **with_codec(codec))
    path = sgd(problem, 1, 25)
    for step in range(25):
        close(method.virtual(), path[step])
        close(method.point(0), path[step])
        drive(method, problem, 1, first=step)
    ef = make("ef", problem=problem, workers=1, **with_codec(codec))
    drive(ef, problem, 25)
    assert codec[0] == "fp" or float((ef.virtual() - path[-1]).abs().max()) > 1e-4


@pytest.mark.parametrize("coeff", [0.0, 0.3, 1.0])
def test_mismatch(coeff: float) -> None:
    """mean ||p^k - y||^2 = coeff^2 V + (1 - coeff)^2 M (+ ||s||^2 terms), least at M / (M + V); mean p = (1 - coeff) x + coeff y."""
    problem = Problem(K)
    method = make("def", "random_block", problem=problem, workers=K, coeff=coeff, codec_ratio=8.0)
    drive(method, problem, 10)
    bar = mean(method.error)
    m, v = float(bar.square().sum()), float(mean([(e - bar).square().sum() for e in method.error]))
    measured = float(mean([(method.point(k) - method.virtual()).square().sum() for k in range(K)]))
    assert abs(measured - (coeff**2 * v + (1 - coeff) ** 2 * m)) < TOLERANCE
    best = m / (m + v)
    assert abs(best**2 * v + (1 - best) ** 2 * m - m * v / (m + v)) < TOLERANCE and m * v / (m + v) <= min(m, v)
    close(mean([method.point(k) for k in range(K)]), (1 - coeff) * method.x + coeff * method.virtual())


@pytest.mark.parametrize("average_every", [0, 5])
def test_mismatch_two_way(average_every: int) -> None:
    """SAEF: the cross term vanishes, and right after averaging only the server's residual is left. EF: ||mean e + s||^2."""
    problem = Problem(K)
    for name in ("saef", "ef"):
        method = make(name, "top_k", problem=problem, workers=K, two_way=True, average_every=average_every, codec_ratio=5.0)
        drive(method, problem, 9)  # the exchange before gradient number 9 averages: (8 + 2) % 5 == 0
        bar, s = mean(method.error), method.server
        measured = float(mean([(method.point(k) - method.virtual()).square().sum() for k in range(K)]))
        v = float(mean([(e - bar).square().sum() for e in method.error]))
        expected = v + float(s.square().sum()) if name == "saef" else float((bar + s).square().sum())
        assert abs(measured - expected) < TOLERANCE
        assert not average_every or v < 1e-24


def test_nothing_is_lost() -> None:
    """e_T = sum of everything produced - sum of everything sent."""
    problem = Problem(K)
    method = make("ef", "top_k", problem=problem, workers=K, codec_ratio=5.0)
    produced, sent = torch.zeros(D).double(), torch.zeros(D).double()
    for step in range(10):
        x = method.x.clone()
        drive(method, problem, 1, first=step)
        produced += 0.05 * mean(method.velocity)
        sent += x - method.x
    close(mean(method.error), produced - sent)


@pytest.mark.parametrize(("name", "codec"), [("pef", "top_k"), ("powersgd", "low_rank")])
def test_what_is_sent_at_rate_zero_is_still_owed(name: str, codec: str) -> None:
    problem = Problem(K)
    method = make(name, codec, problem=problem, workers=K)
    drive(method, problem, 5)
    x, owed = method.x.clone(), [e.clone() for e in method.error]
    drive(method, problem, 1, lambda step: 0.0, first=5)
    close(method.x, x, 1e-15)
    for error, before in zip(method.error, owed, strict=True):
        assert torch.equal(error, before)


def test_lr_change_equals_gradient_units_with_the_ratio() -> None:
    """Parameter units = gradient units with e scaled by lr_before / lr."""
    problem = Problem(K)
    rate = lambda step: 0.05 if step < 6 else 0.005  # noqa: E731
    method = make("ef", "random_k", problem=problem, workers=K, codec_ratio=4.0)
    drive(method, problem, 14, rate)
    codec, ctx = method.setup.exchange.codec, method.setup.ctx
    x, e, m = problem.theta.clone(), [torch.zeros(D).double() for _ in range(K)], [torch.zeros(D).double() for _ in range(K)]
    before = rate(0)
    for step in range(14):
        at, c = codec.positions(D, ctx.key("round", step)), torch.zeros(D).double()
        for k in range(K):
            m[k] = 0.9 * m[k] + problem.grad(k, step, x) + 1e-2 * x
            p = m[k] + before / rate(step) * e[k]
            c[at] += p[at] / K
            e[k] = p.clone()
            e[k][at] = 0.0
        x = x - rate(step) * c
        before = rate(step)
    close(method.x, x)


def test_zero_init_sends_the_weights_first() -> None:
    """init: zero: x_1 = mean C(x_0 - lr m), the first gradient is still taken at x_0, and y_0 = x_0."""
    problem = Problem(K)
    ef = make("ef", "top_k", problem=problem, workers=K, init="zero", codec_ratio=5.0)
    assert torch.equal(ef.point(0), problem.theta) and float(ef.x.abs().max()) == 0
    close(ef.virtual(), problem.theta)
    drive(ef, problem, 1)
    assert int((ef.x != 0).sum()) <= K * sum(max(1, part.numel // 5) for part in LAYOUT)
    saef = make("saef", "top_k", problem=problem, workers=K, init="zero", codec_ratio=5.0)
    drive(saef, problem, 1)
    close(mean([saef.point(k) for k in range(K)]), saef.virtual())


def test_pef_and_sgd_ia_against_references() -> None:
    problem = Problem(K)
    pef = make("pef", "random_k", problem=problem, workers=K, codec_ratio=4.0)
    drive(pef, problem, 10)
    codec, ctx = pef.setup.exchange.codec, pef.setup.ctx
    x, e, m = problem.theta.clone(), [torch.zeros(D).double() for _ in range(K)], torch.zeros(D).double()
    for step in range(10):
        at, c = codec.positions(D, ctx.key("round", step)), torch.zeros(D).double()
        for k in range(K):
            e[k] = e[k] + 0.05 * problem.grad(k, step, x)
            c[at] += e[k][at] / K
            e[k][at] = 0.0
        m = 0.9 * m + c / 0.05 + 1e-2 * x
        x = x - 0.05 * m
    close(pef.x, x)

    ia = make("sgd_ia", problem=problem, workers=K, ratio=8.0)
    drive(ia, problem, 10)
    average = problem.theta.clone()
    for y in sgd(problem, K, 10)[1:]:
        average = average * 7 / 8 + y / 8
    close(ia.deploy()["x"], average)


def test_dist_ef_sgd_against_gradient_units() -> None:
    """The original keeps e in gradient units with the ratio; a homogeneous codec gives the same trajectory."""
    problem = Problem(K)
    method = make("dist_ef_sgd", "scaled_sign", problem=problem, workers=K, codec_scope="tensor", optimizer={"momentum": 0.9})
    rate = lambda step: 0.05 if step < 5 else 0.01  # noqa: E731
    drive(method, problem, 9, rate)

    def compress(v: Tensor) -> Tensor:
        out = torch.empty_like(v)
        for part in LAYOUT:
            piece = v[part.start : part.stop]
            out[part.start : part.stop] = piece.abs().mean() * torch.where(piece >= 0, 1.0, -1.0)
        return out

    zero = lambda: torch.zeros(D).double()  # noqa: E731
    x, e, m, s, before = problem.theta.clone(), [zero() for _ in range(K)], [zero() for _ in range(K)], zero(), rate(0)
    for step in range(9):
        ratio, total = before / rate(step), zero()
        for k in range(K):
            g = problem.grad(k, step, x)
            m[k] = 0.9 * m[k] + g
            p = 0.9 * m[k] + g + ratio * e[k]
            sent = compress(p)
            e[k] = p - sent
            total += sent / K
        r = total + ratio * s
        c = compress(r)
        s = r - c
        x = x - rate(step) * c
        before = rate(step)
    close(method.x, x, 1e-6)  # levels travel as float32


def test_expectation_over_masks_is_iterate_averaging() -> None:
    """One worker, lambda 1: the mean of x_T over mask seeds is the average of SGD's iterates with weight 1 / R."""
    g = torch.Generator().manual_seed(0)
    steps, masks, n, ratio = 60, 4000, 8, 4
    a = torch.randn(n, n, generator=g).double() / n**0.5
    b = torch.randn(n, generator=g).double()
    y = torch.randn(n, generator=g).double()
    average, x = y.clone(), y.expand(masks, n).clone()
    width = n // ratio
    for _ in range(steps):  # lambda 1, one worker: e = x - y, gradients at y whatever the mask
        y = y - 0.3 * a.t() @ torch.tanh(a @ y - b)
        average = average * (1 - 1 / ratio) + y / ratio
        starts = torch.randint(n, (masks, 1), generator=g)
        at = (starts + torch.arange(width)) % n
        x.scatter_(1, at, y.expand(masks, n).gather(1, at))
    assert float((x.mean(0) - average).abs().max()) < 0.002
    assert float((x.std(0)).max()) > 0.02


@pytest.mark.parametrize("codec", ["random_block", "top_k"])
def test_one_worker_steps_ahead_along_adagrad(codec: str) -> None:
    """K = 1: y of SAEF follows the local optimizer exactly, whatever is sent."""
    problem = Problem(1)
    method = make(
        "saef",
        codec,
        problem=problem,
        workers=1,
        local_optimizer="adagrad",
        optimizer={"momentum": 0.0, "weight_decay": 1e-2},
        codec_ratio=4.0,
    )
    x = torch.nn.Parameter(problem.theta.clone())
    reference = torch.optim.Adagrad([x], lr=0.05, weight_decay=1e-2, eps=1e-10)
    for step in range(15):
        drive(method, problem, 1, first=step)
        x.grad = problem.grad(0, step, x.detach())
        reference.step()
        close(method.virtual(), x.detach(), 1e-6 if codec == "top_k" else TOLERANCE)  # top-k sends float32


def test_dropped_residuals() -> None:
    """Just before every third gradient nothing is held back; y jumps to x, and only there."""
    problem = Problem(K)
    method = make("saef", "random_block", problem=problem, workers=K, reset_every=3, codec_ratio=4.0)
    for step in range(12):
        before = method.virtual()
        drive(method, problem, 1, first=step)
        held = float(method.virtual().sub(method.x).abs().max())
        if (step + 2) % 3 == 0:  # the next gradient is the third, sixth, ...
            assert held == 0 and all(torch.equal(method.point(w), method.x) for w in range(K))
        else:
            assert held > 0
            close(method.virtual(), before - 0.05 * mean(method.velocity))
