"""Every method against its formula, written by weight versions instead of queues: w_k^v are stage k's weights after v updates.

In a segment of batches that begins at s, with empty queues, stage k forwards batch b at version max(s, b - m_k) and has made b updates
when b's gradient is applied. So h_{k+1} = F_k(h_k; w_k^fwd), and the gradient is taken at w_k^b (DSP, FR, PipeMare) or at w_k^fwd (DDG,
PipeDream, FDG). Float64, three of four stages of different depth, batch norm, weight decay, a schedule, and drains in the middle.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.pipeline.conftest import make, watch
from xutrain.engine.context import Context
from xutrain.loops.pipeline_job import build

Weights = dict[str, Tensor]
N, SIZE, LR, MU, DECAY = 17, 20, 0.2, 0.8, 0.01


class Reference:
    """Trains blocks of linear, batch norm and tanh layers; keeps every version of their weights and running statistics."""

    def __init__(self, chosen: Any, p: list[int], m: list[int], *, at_forward: bool = False, segment: int = N) -> None:
        job = build(chosen, Context(chosen.seed))
        self.blocks = [stage.block for stage in job.stages]
        self.p, self.m, self.at_forward, self.segment = p, m, at_forward, segment
        self.batches = [job.task.draw(b, 0, 1, SIZE, chosen.seed) for b in range(N)]
        self.test = next(iter(job.task.batches("test", 50)))
        self.w = [[{n: q.detach().clone() for n, q in block.named_parameters()}] for block in self.blocks]
        self.running = [[{n: q.clone() for n, q in block.named_buffers()}] for block in self.blocks]
        self.moments: list[dict[str, tuple[Tensor, Tensor]]] = [{} for _ in self.blocks]

    def forward(self, k: int, w: Weights, x: Tensor, running: Weights | None = None, seen: Weights | None = None) -> Tensor:
        """F_k: with the batch's statistics (noted in ``seen``), or with ``running`` ones."""
        for i, layer in enumerate(self.blocks[k]):
            if isinstance(layer, nn.Flatten):
                x = x.reshape(len(x), -1)
            elif isinstance(layer, nn.Linear):
                x = x @ w[f"{i}.weight"].T + w[f"{i}.bias"]
            elif isinstance(layer, nn.Sequential):
                z = x @ w[f"{i}.0.weight"].T + w[f"{i}.0.bias"]
                if running is None:
                    mean, var = z.mean(0), z.var(0, unbiased=False)
                    if seen is not None:
                        seen[f"{i}.1.running_mean"], seen[f"{i}.1.running_var"] = mean.detach(), z.detach().var(0)
                else:
                    mean, var = running[f"{i}.1.running_mean"], running[f"{i}.1.running_var"]
                x = torch.tanh((z - mean) / (var + 1e-5).sqrt() * w[f"{i}.1.weight"] + w[f"{i}.1.bias"])
            else:
                x = x.double()
        return x

    def train(self) -> Reference:
        for b in range(N):
            start = b - b % self.segment
            h = [self.batches[b].inputs]
            fwd = [max(start, b - m) for m in self.m]
            for k in range(len(self.blocks) - 1):
                h.append(self.forward(k, self.w[k][fwd[k]], h[k]))
            g = None
            for k in reversed(range(len(self.blocks))):
                g = self.backward(k, b, h[k], g, self.w[k][fwd[k]] if self.at_forward else self.present(k, b))
        return self

    def backward(self, k: int, b: int, x: Tensor, g: Tensor | None, at: Weights) -> Tensor | None:
        """Update stage k by batch b; the gradient by its input."""
        w, leaf, seen = {n: q.clone().requires_grad_() for n, q in at.items()}, x.clone().requires_grad_(k > 0), dict[str, Tensor]()
        y = self.forward(k, w, leaf, seen=seen)
        if g is None:
            y = -torch.log_softmax(y, 1)[torch.arange(SIZE), self.batches[b].targets].mean()
        found = torch.autograd.grad(y, [*w.values(), *([leaf] if k else [])], g)
        grads = {n: self.factor(k) * q for n, q in zip(w, found, strict=False)}
        rate = LR * (1 - b / N) * self.rate(k, b)
        self.w[k].append({n: self.step(k, n, b, q, grads[n], rate) for n, q in self.w[k][b].items()})
        before = self.running[k][b]
        self.running[k].append({n: 0.9 * q + 0.1 * seen[n] if n in seen else q + 1 for n, q in before.items()})
        return found[-1] if k else None

    def step(self, k: int, name: str, b: int, w: Tensor, grad: Tensor, rate: float) -> Tensor:
        """Nesterov momentum: v <- mu v + (G + lambda w), w <- w - alpha (G + lambda w + mu v)."""
        grad = grad + DECAY * w
        v = MU * self.moments[k][name][0] + grad if b else grad
        self.moments[k][name] = (v, v)
        return w - rate * (grad + MU * v)

    def present(self, k: int, b: int) -> Weights:
        return self.w[k][b]

    def factor(self, k: int) -> float:
        return 1.0

    def rate(self, k: int, b: int) -> float:
        return 1.0

    def test_loss(self, updated: list[int], forwarded: list[int]) -> float:
        """On the test images, each stage at its own version; statistics are counted in the pass that has a graph."""
        x = self.test.inputs
        for k, (v, ahead) in enumerate(zip(updated, forwarded, strict=True)):
            x = self.forward(k, self.w[k][v], x, running=self.running[k][ahead if self.at_forward else v])
        return float(-torch.log_softmax(x, 1)[torch.arange(len(x)), self.test.targets].mean())


class Momentum(Reference):
    def step(self, k: int, name: str, b: int, w: Tensor, grad: Tensor, rate: float) -> Tensor:
        grad = grad + DECAY * w
        v = MU * self.moments[k][name][0] + grad if b else grad
        self.moments[k][name] = (v, v)
        return w - rate * v


class Adam(Reference):
    def step(self, k: int, name: str, b: int, w: Tensor, grad: Tensor, rate: float) -> Tensor:
        grad = grad + DECAY * w
        first, second = self.moments[k].get(name, (torch.zeros_like(w), torch.zeros_like(w)))
        first, second = MU * first + (1 - MU) * grad, 0.99 * second + 0.01 * grad**2
        self.moments[k][name] = (first, second)
        return w - rate * (first / (1 - MU ** (b + 1))) / ((second / (1 - 0.99 ** (b + 1))).sqrt() + 1e-8)


class Shrunk(Reference):
    def factor(self, k: int) -> float:
        return float(0.7 ** (len(self.blocks) - 1 - k))


class Corrected(Reference):
    """PipeMare: alpha / tau^(1 - b / anneal), and u = w - tau d with d the decayed mean of steps."""

    def rate(self, k: int, b: int) -> float:
        return float(self.m[k] ** -(1 - min(b / 9, 1))) if self.m[k] else 1.0

    def present(self, k: int, b: int) -> Weights:
        if not self.m[k]:
            return self.w[k][b]
        gamma = 0.3 ** (1 / self.m[k])
        found = {}
        for name, w in self.w[k][b].items():
            d = sum((1 - gamma) * gamma ** (b - 1 - i) * (self.w[k][i + 1][name] - self.w[k][i][name]) for i in range(b))
            found[name] = w - self.m[k] * d
        return found


class Synthetic(Reference):
    """DNI: stage k forwards batch b at w^b and updates at once by the synthesizer's gradient, which has learnt from batches 0..b-3."""

    def __init__(self, chosen: Any, p: list[int], m: list[int], **words: Any) -> None:
        super().__init__(chosen, p, m, **words)
        job = build(chosen, Context(chosen.seed))
        self.models = [stage.memory["model"] for stage in job.stages[:-1]]
        self.lr = chosen.method.synthesizer_lr
        self.known: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.models]
        self.adam: list[list[tuple[Tensor, Tensor]]] = [
            [(torch.zeros_like(q), torch.zeros_like(q)) for q in m.parameters()] for m in self.models
        ]

    def train(self) -> Reference:
        for b in range(N):
            x, below = self.batches[b].inputs, None
            for k in range(len(self.blocks)):
                y = self.forward(k, self.w[k][b], x)
                g = None
                if k < len(self.models):
                    if b >= 3:
                        self.learn(k, b - 3)
                    g = self.models[k](y).detach()
                down = self.backward(k, b, x, g, self.w[k][b])
                if below is not None:
                    self.known[k - 1].append((below, down))
                x = below = y
        return self

    def learn(self, k: int, b: int) -> None:
        """Adam's update b of synthesizer k by mean squared error."""
        h, g = self.known[k][b]
        wrt = list(self.models[k].parameters())
        grads = torch.autograd.grad((self.models[k](h) - g).square().mean(), wrt)
        for i, (q, grad) in enumerate(zip(wrt, grads, strict=True)):
            first, second = self.adam[k][i]
            first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
            self.adam[k][i] = (first, second)
            q.data -= self.lr * (first / (1 - 0.9 ** (b + 1))) / ((second / (1 - 0.999 ** (b + 1))).sqrt() + 1e-8)


DELAYED = [3, 2, 1, 0]
ODD_P, ODD_M = [1, 3, 2, 0], [11, 8, 3, 0]  # q = 2, 2, 1
DSP = {"name": "dsp", "p": ODD_P, "m": ODD_M}


def _check(folder: Path, method: Any, kind: type[Reference], p: list[int], m: list[int], segment: int = N, **words: Any) -> None:
    rest = {
        "stages": 4,
        "split__cuts": "[3,4,7]",
        "model__depth": 6,
        "model__double": "true",
        "model__norm": "true",
        "train__steps": N,
        "optimizer__lr": LR,
        "optimizer__momentum": MU,
        "optimizer__nesterov": "true",
        "optimizer__weight_decay": DECAY,
        "schedule__name": "linear",
        "eval__every": 3,
        **words,
    }
    chosen = make(method, **rest)
    expected = kind(chosen, p, m, at_forward=chosen.method_name in ("ddg", "pipedream", "fdg"), segment=segment).train()
    pipeline = watch(chosen, folder)
    for k, stage in enumerate(pipeline.job.stages):
        for name, tensor in [*stage.block.named_parameters(), *stage.block.named_buffers()]:
            last = {**expected.w[k][N], **expected.running[k][N]}[name]
            assert torch.allclose(tensor.double(), last.double(), rtol=1e-9, atol=1e-12), (k, name)
    lags = [sum(p[:k]) for k in range(4)]
    lines = {line["step"]: line["value"] for line in pipeline.record.read() if line["name"] == "test_loss"}
    assert set(lines) == {*range(3, N, 3), N}
    for done, loss in lines.items():
        start = (done - 1) - (done - 1) % segment
        stop = min(start + segment, N)
        ahead = [min(stop, done + lags[-1] - lags[k]) for k in range(4)]
        made = [done if done == stop else min(stop, max(start, done + lags[-1] - lags[k] - m[k])) for k in range(4)]
        assert loss == pytest.approx(expected.test_loss(made, ahead), rel=1e-7), (done, made)


@pytest.mark.parametrize(
    ("method", "kind", "p", "m"),
    [
        ("bp", Reference, [0] * 4, [0] * 4),
        (DSP, Reference, ODD_P, ODD_M),
        ("fr", Reference, [0] * 4, DELAYED),
        ("ddg", Reference, [0] * 4, DELAYED),
        ("pipedream", Reference, [0] * 4, DELAYED),
        ({**DSP, "name": "fdg", "shrink": 0.7}, Shrunk, ODD_P, ODD_M),
        ({"name": "dni", "synthesizer_lr": 0.002}, Synthetic, [1, 1, 1, 0], [0] * 4),
        ({**DSP, "name": "pipemare", "anneal": 9, "decay": 0.3}, Corrected, ODD_P, ODD_M),
    ],
    ids=["bp", "dsp", "fr", "ddg", "pipedream", "fdg", "dni", "pipemare"],
)
def test_every_method_follows_its_formula(tmp_path: Path, method: Any, kind: type[Reference], p: list[int], m: list[int]) -> None:
    _check(tmp_path, method, kind, p, m)


def test_plain_momentum_and_adam(tmp_path: Path) -> None:
    _check(tmp_path, DSP, Momentum, ODD_P, ODD_M, optimizer__nesterov="false")
    words = {"optimizer__name": "adam", "optimizer__nesterov": "false", "optimizer__beta2": 0.99}
    _check(tmp_path, DSP, Adam, ODD_P, ODD_M, **words)


@pytest.mark.parametrize("method", [DSP, "ddg"], ids=["dsp", "ddg"])
def test_queues_that_run_empty_at_checkpoints(tmp_path: Path, method: Any) -> None:
    """Segments of 5 batches, shorter than the staleness of the lowest stages."""
    p, m = (ODD_P, ODD_M) if method is DSP else ([0] * 4, DELAYED)
    _check(tmp_path, method, Reference, p, m, segment=5, checkpoint__every=5)
