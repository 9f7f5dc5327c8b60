"""What an agent answers: a law P(u; psi) over normalised hyper-parameters, and a step of REINFORCE on psi.

An agent keeps nothing in itself. Its state is a dict of tensors and scalars that a checkpoint can hold and ``improve`` changes
in place; draws come from a `Noise`, which is a function of (seed, round). ``params`` are psi, ``adam`` the optimizer's moments.
Shapes: D coordinates, n remembered samples. All tensors are float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from xutrain.engine.rng import Key
from xutrain.methods.federate.base import State
from xutrain.methods.federate.search.reinforce import adam_ascent
from xutrain.methods.federate.search.space import AgentSpace
from xutrain.registry import Named


class Noise:
    """The random numbers of one draw; ``sign`` -1 mirrors them (antithetic pairs)."""

    def __init__(self, key: Key, sign: int = 1) -> None:
        self._generator = key.generator()
        self.sign = sign

    def normal(self, n: int) -> Tensor:
        """N(0, 1), float64 of shape (n,)."""
        return self.sign * torch.randn(n, generator=self._generator, dtype=torch.float64)

    def uniform(self, n: int) -> Tensor:
        """U[0, 1), float64 of shape (n,)."""
        drawn = torch.rand(n, generator=self._generator, dtype=torch.float64)
        return drawn if self.sign > 0 else (1 - drawn).clamp(max=1 - 2.0**-53)

    @property
    def generator(self) -> torch.Generator:
        """For laws that draw otherwise (the Dirichlet's gamma numbers)."""
        return self._generator


class Agent:
    """Base of all agents.

    Class attributes:
        learns: rewards change the law.
        resamples: a draw differs from round to round, so a round that was lost may be tried again.
    """

    learns: ClassVar[bool] = True
    resamples: ClassVar[bool] = True

    class Options(Named):
        pass

    def __init__(self, options: Any, space: AgentSpace, key: Key) -> None:
        """``key`` is where initial parameters come from."""
        self.options, self.space, self.key = options, space, key

    def start(self) -> State:
        """State before the first round."""
        return {"params": {}, "adam": {}}

    def draw(self, state: State, noise: Noise) -> tuple[Tensor, State]:
        """A sample u of shape (D,), and what ``gradient`` must be given with it."""
        raise NotImplementedError

    def gradient(self, state: State, samples: Sequence[State], advantages: Tensor) -> dict[str, Tensor]:
        """Sum over the remembered samples of advantage x gradient of log P(u; psi), at the present psi.

        Args:
            samples: n dicts with ``u`` and ``given``.
            advantages: shape (n, D): every coordinate's own, equal in a row unless credit is given by client.
        """
        raise NotImplementedError

    def improve(self, state: State, samples: Sequence[State], advantages: Tensor, adam: State | None = None) -> None:
        """One ascent step on psi; Adam (its moments in ``adam``, or in the state) unless an agent says otherwise."""
        gradient = self.gradient(state, samples, advantages)
        moments = state["adam"] if adam is None else adam
        adam_ascent(state["params"], gradient, moments, self.options.lr, self.options.beta1, self.options.beta2)
        self.project(state)

    def project(self, state: State) -> None:
        """Put parameters back where they are legal."""

    def moments(self, state: State) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of every coordinate of u, for the record."""
        raise NotImplementedError
