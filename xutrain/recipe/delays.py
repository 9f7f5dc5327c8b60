"""When a pipeline's stages see a batch: p, q and m of DSP(p; m), in ticks. Pure arithmetic, no torch.

Stage k forwards batch f = n - P_k in its iteration n and, in the same iteration, receives the error gradient of batch
b = f - m_k. All-zero delays are back-propagation; p = 0, q = 1 is Features Replay's and DDG's schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xutrain.errors import Issue, RecipeError


@dataclass(frozen=True)
class Delays:
    """The preset delays of a pipeline of K stages.

    Attributes:
        p: ticks from stage k's forward of a batch to stage k+1's (length K, the last is 0).
        m: index difference between the batch that stage k forwards and the one whose error gradient it receives in the
            same iteration; where the gradient is applied at once this is the staleness of stage k (length K, last 0).
        local: the stage answers downwards in the iteration of the forward (decoupled neural interfaces).
    """

    p: tuple[int, ...]
    m: tuple[int, ...]
    local: bool = False

    @property
    def stages(self) -> int:
        return len(self.p)

    @property
    def answers(self) -> tuple[int, ...]:
        """Index difference between the forwarded batch and the one whose input gradient the stage sends down."""
        return (0,) * self.stages if self.local else self.m

    @property
    def q(self) -> tuple[int, ...]:
        """Ticks from stage k+1's backward of a batch to stage k's: q_k = m_k - m_{k+1} - p_k."""
        return (*(self.m[k] - self.answers[k + 1] - self.p[k] for k in range(self.stages - 1)), 0)

    @property
    def lags(self) -> tuple[int, ...]:
        """P_k = sum of p_i below k: ticks by which stage k trails stage 0 in the forward stream."""
        return tuple(sum(self.p[:k]) for k in range(self.stages))

    def drained(self, batches: int) -> int:
        """Ticks until every stage is done with ``batches`` batches: N + m_0, for DSP."""
        return batches + max(lag + m for lag, m in zip(self.lags, self.m, strict=True)) if batches else 0

    def sent(self, boundary: int, ticks: int, batches: int) -> tuple[int, int]:
        """Messages that crossed boundary k|k+1 upwards and downwards after ``ticks`` ticks of a run of ``batches`` batches."""
        up = ticks - self.lags[boundary]
        down = ticks - self.lags[boundary + 1] - self.answers[boundary + 1]
        return min(max(up, 0), batches), min(max(down, 0), batches)

    def __str__(self) -> str:
        return f"({','.join(map(str, self.p))};{','.join(map(str, self.m))})"


def check(p: Sequence[int], m: Sequence[int], stages: int, where: str = "method") -> Delays:
    """``DSP(p; m)`` for ``stages`` stages.

    Raises:
        RecipeError: lengths differ from the number of stages, a last delay is not 0, or some p_k < 1 or q_k < 1; names
            the stage and the smallest valid value.
    """
    problems = []
    for name, values in (("p", p), ("m", m)):
        if len(values) != stages:
            hint = f"one value per stage, the last is 0: for example {name}={_tightest(stages)[name == 'm']}"
            problems.append(Issue(f"{where}.{name}", f"has {len(values)} values for {stages} stages", list(values), hint))
        elif values[-1] != 0:
            problems.append(Issue(f"{where}.{name}", "the last stage has no delay: the last value must be 0", list(values)))
    if not problems:
        for k in range(stages - 2, -1, -1):
            smallest = m[k + 1] + p[k] + 1
            if p[k] < 1:
                problems.append(
                    Issue(f"{where}.p", f"stage {k} must delay its activations by at least 1 tick", list(p), f"smallest valid p_{k} is 1")
                )
            elif m[k] < smallest:
                reason = f"stage {k} needs m_{k} >= m_{k + 1} + p_{k} + 1, or its error gradient would have to arrive before it is made"
                problems.append(Issue(f"{where}.m", reason, list(m), f"smallest valid m_{k} is {smallest}"))
    if problems:
        raise RecipeError(*problems)
    return Delays(tuple(p), tuple(m))


def dsp(p: Sequence[int] | None, q: Sequence[int] | None, m: Sequence[int] | None, stages: int, where: str = "method") -> Delays:
    """The delays that a recipe describes by p and m, by p and q, or not at all (all ones, the tightest).

    ``p`` and ``q`` may leave out the last value, which is 0; m_k is the sum of p_i + q_i from k on.
    """
    up = _padded(p, stages) if p is not None else [1] * (stages - 1) + [0]
    if m is not None and q is not None:
        raise RecipeError(
            Issue(where, "says both q and m, which follow from each other", {"q": list(q), "m": list(m)}, "leave one of them out")
        )
    if m is not None:
        return check(up, m, stages, where)
    down = _padded(q, stages) if q is not None else [1] * (stages - 1) + [0]
    if len(up) != stages or len(down) != stages:
        name, values = ("p", up) if len(up) != stages else ("q", down)
        raise RecipeError(Issue(f"{where}.{name}", f"has {len(values)} values for {stages} stages", list(values), "one per boundary"))
    return check(up, [sum(up[k:]) + sum(down[k:]) for k in range(stages)], stages, where)


def _padded(values: Sequence[int], stages: int) -> list[int]:
    return [*values, 0] if len(values) == stages - 1 else list(values)


def _tightest(stages: int) -> tuple[list[int], list[int]]:
    return [1] * (stages - 1) + [0], [2 * (stages - 1 - k) for k in range(stages)]


def locked(stages: int) -> Delays:
    """Back-propagation: no delays."""
    return Delays((0,) * stages, (0,) * stages)


def delayed(stages: int) -> Delays:
    """Features Replay, DDG and 1F1B: activations in the same tick, error gradients one tick a boundary: m_k = K-1-k."""
    return Delays((0,) * stages, tuple(stages - 1 - k for k in range(stages)))
