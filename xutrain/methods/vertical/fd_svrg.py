"""FD-SVRG: synchronous SVRG on feature slabs with tree sums (Zhang et al. 2018), a baseline.

    z_i = sum_l x_{i,l}.w_l   (one tree sum for all),    w_l <- w_l - lr [ (theta_i - theta~_i) x_{i,l} + G_l + l2 w_l ]

The step is AFSVRG's, with its theta~ and G_l; what differs is the exchange. All workers draw the same index from a common seed,
so no index travels; one binomial tree sums the products and sends the total back, so every worker holds every total; nothing is
masked, and all hold labels. Payload: 2 (q-1) scalars a step for all workers together.

Limits: the same iterates as AFSVRG in lock step with one index stream.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from xutrain.methods.vertical.afsvrg import AFSVRG
from xutrain.registry import Named, method


@method("vertical", "fd_svrg", paper="Zhang et al. 2018", summary="synchronous SVRG with unmasked tree sums", aliases=("fdsvrg",))
class FDSVRG(AFSVRG):
    """Lock step, labels everywhere, no masks."""

    class Options(Named):
        inner: int | None = Field(None, ge=1, description="Steps between snapshots; by default one pass over the samples.")

    exchange = "allreduce"
    lockstep = True

    @staticmethod
    def passes(options: Any) -> str:
        return "barrier"
