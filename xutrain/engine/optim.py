"""Momentum SGD on a flat vector, with torch.optim.SGD's arithmetic (no dampening)."""

from __future__ import annotations

from torch import Tensor

from xutrain.recipe.schema import Optimizer


class FlatSGD:
    """v <- mu v + (g + wd x);  x <- x - lr v  (Nesterov: x <- x - lr (g + wd x + mu v)).

    The buffer starts at zero, which for heavy ball equals torch's start from the first gradient.
    """

    def __init__(self, options: Optimizer) -> None:
        self.options = options
        self.velocity: Tensor | None = None

    def step(self, theta: Tensor, grad: Tensor, lr: float) -> None:
        """Update ``theta`` in place; ``grad`` is consumed."""
        o = self.options
        if o.weight_decay:
            grad = grad.add_(theta, alpha=o.weight_decay)
        if o.momentum:
            self.velocity = grad.clone() if self.velocity is None else self.velocity.mul_(o.momentum).add_(grad)
            grad = grad.add_(self.velocity, alpha=o.momentum) if o.nesterov else self.velocity
        theta.add_(grad, alpha=-lr)

    def state(self) -> dict[str, Tensor]:
        return {} if self.velocity is None else {"velocity": self.velocity}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.velocity = state.get("velocity")
