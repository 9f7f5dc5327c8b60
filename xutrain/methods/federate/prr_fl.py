"""PRR-FL: every client has a personal model and a deputy; only the deputies meet, in the frequencies of their weights.

Chen et al., MICCAI 2021 (personalized retrogress-resilient federated learning); rules as in the authors' code. Server, per
weight W_k of two or more axes, as a matrix (conv (N, C, d1, d2, ...) is permuted to (C d1, d2 ... N)):

    W_k <- Re F^-1[A_k exp(i arg F W_k)],   A_k = mean_j |F W_j| inside the window, |F W_k| outside      other parameters: the mean
    recover     first stage, or s_d < .7 s_p           deputy: loss + KL(personal || deputy);   personal: loss
    exchange    s_d >= .7 s_p, or later s_d < .9 s_p   both: loss + KL from the other
    sublimate   s_d >= .9 s_p after exchange           personal: loss + KL(deputy || personal);   deputy: loss

F is the 2-D FFT; the window is the middle of the shifted amplitude, a share L = .7 + (t/T) (.95 - .7) of each side. (The code divides
the sum of amplitudes by a fixed 4, its number of clients; here by K.) The other lines are a client's stages (equal parts of the local
steps; the paper's are its epochs), on scores s_d, s_p of deputy and personal model. Teachers are fixed. Nets with running statistics
are refused.

Limits: one stage a round is always exchange; a share of 0 exchanges no frequency, only the other parameters; equal deputies
come back as they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from xutrain.methods.federate.base import FederatedMethod, Plan, Problem, Reply, Round, State, Teachable, Traffic
from xutrain.methods.federate.local_steps import adam, memory_of
from xutrain.registry import Named, method

Stage = Literal["recover", "exchange", "sublimate"]


def window(side: int, share: float) -> slice:
    """The central ``share`` of an axis, end exclusive."""
    half = int(side * share / 2)
    return slice(side // 2 - half, side // 2 + half)


def as_matrix(weight: Tensor) -> Tensor:
    """(C d1, d2 ... N) of a conv weight (N, C, d1, d2, ...); a linear weight as it is."""
    if weight.ndim == 2:
        return weight
    turned = weight.movedim(0, -1)
    return turned.reshape(turned.shape[0] * turned.shape[1], -1)


def as_weight(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of ``as_matrix``."""
    if len(shape) == 2:
        return matrix
    return matrix.reshape(*shape[1:], shape[0]).movedim(-1, 0)


def exchange_frequencies(weights: Sequence[Tensor], share: float) -> list[Tensor]:
    """Every client's weight with its low frequencies' amplitude replaced by the clients' mean."""
    shape = tuple(weights[0].shape)
    spectra = [torch.fft.fft2(as_matrix(w)) for w in weights]
    amplitudes = [torch.fft.fftshift(s.abs()) for s in spectra]
    mean = torch.stack(amplitudes).mean(dim=0)
    rows, columns = window(mean.shape[0], share), window(mean.shape[1], share)
    found = []
    for spectrum, amplitude in zip(spectra, amplitudes, strict=True):
        amplitude = amplitude.clone()
        amplitude[rows, columns] = mean[rows, columns]
        back = torch.fft.ifft2(torch.polar(torch.fft.ifftshift(amplitude), spectrum.angle())).real
        found.append(as_weight(back, shape))
    return found


@method("federate", "prr_fl", summary="a personal model and a deputy per client; deputies share the low frequencies of their weights")
class PrrFL(FederatedMethod):
    personal = True
    adaptive = True
    plain = True
    without_buffers = True

    class Options(Named):
        name: Literal["prr_fl"] = "prr_fl"
        first_share: float = Field(0.7, ge=0, le=1, description="Share L of the frequencies that are averaged, at the start.")
        last_share: float = Field(0.95, ge=0, le=1, description="Share L at the end.")
        stages: int = Field(
            1, ge=1, description="Parts of a round's local steps between which the roles are decided; the paper: its epochs."
        )

    options: Any

    def server_state(self, model: Tensor) -> State:
        return {"model": model.clone(), "deputies": [model.clone() for _ in range(self.federation.clients)]}

    def plan(self, server: State, round: Round, client: int, exchange: int = 0) -> Plan:
        plan = super().plan(server, round, client, exchange)
        plan.tensors = {"model": server["deputies"][client]}
        return plan

    def step(self, state: State, plan: Plan, problem: Problem) -> Reply:
        deputy = plan.tensors["model"].clone()
        own = state["own"].clone() if "own" in state else deputy.clone()
        mine, theirs = memory_of(self.federation, state, "personal"), memory_of(self.federation, state, "deputy")
        stages, stage = self.options.stages, "exchange"
        for s in range(stages):
            if stages > 1:
                stage = "recover" if s == 0 else self.next_stage(stage, score(problem, deputy), score(problem, own))
            for p in range(plan.steps * s // stages, plan.steps * (s + 1) // stages):
                up = self.gradient(problem, own, deputy if stage != "recover" else None, p).clone()
                down = self.gradient(problem, deputy, own if stage != "sublimate" else None, p)
                own.add_(up if mine is None else adam(up, mine), alpha=-plan.lr)
                deputy.add_(down if theirs is None else adam(down, theirs), alpha=-plan.lr)
        state["own"] = own
        return Reply({"model": deputy})

    def next_stage(self, stage: str, deputy: float, own: float) -> Stage:
        """The role of the next stage, from the scores of both models."""
        if deputy < 0.7 * own:
            return "recover"
        return "sublimate" if stage != "recover" and deputy >= 0.9 * own else "exchange"

    def gradient(self, problem: Problem, point: Tensor, teacher: Tensor | None, step: int) -> Tensor:
        if teacher is None or not isinstance(problem, Teachable):
            return problem.gradient(point, step)
        return problem.taught_gradient(point, teacher, step)

    def merge(self, server: State, round: Round, replies: Iterable[Reply], exchange: int = 0) -> None:
        for client, vector in [(r.client, r.tensors["model"]) for r in replies]:
            server["deputies"][client] = vector
        share = self.share(round.index)
        deputies = server["deputies"]
        mean = torch.stack(deputies).mean(dim=0)
        new = [mean.clone() for _ in deputies]
        for (_, start, stop), shape in zip(self.federation.names, self.federation.shapes, strict=True):
            if len(shape) < 2:
                continue
            for vector, weight in zip(new, exchange_frequencies([d[start:stop].view(shape) for d in deputies], share), strict=True):
                vector[start:stop] = weight.reshape(-1)
        server["deputies"], server["model"] = new, mean

    def share(self, index: int) -> float:
        """L of a round."""
        o = self.options
        return float(o.first_share + index / max(self.federation.rounds, 1) * (o.last_share - o.first_share))

    def served(self, server: State, state: State) -> Tensor:
        own: Tensor = state["own"] if "own" in state else server["model"]
        return own

    def traffic(self, numel: int, previous_lr: float | None = None) -> Traffic:
        return Traffic(down={"model": numel}, up={"model": numel})


def score(problem: Problem, point: Tensor) -> float:
    """Dice on the client's own training samples, accuracy where there is none."""
    found = problem.evaluate(point, "train")
    return found.get("dice", found.get("accuracy", -found.get("loss", 0.0)))
