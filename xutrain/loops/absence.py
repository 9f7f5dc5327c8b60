"""Clients that are chosen for a round, receive what it sends, and never answer (``clients.dropout``).

The draw is keyed by (seed, round, client), so it is the same on every process and in a resumed run. The round then is one of those
that answer: their weights are made to sum to 1, their steps alone count, and the client that is lost keeps its state, its residual
and its place among its batches, as if it had not been chosen. Only what it was sent is counted, which is all of the round's first
exchange. At least one client answers: if all were lost, the one with the largest draw comes through.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from xutrain.engine.rng import Key
from xutrain.loops.uplink import BUFFERS, Uplink
from xutrain.methods.federate.base import FederatedMethod, Plan, Round, State


def lose(recipe: Any, chosen: tuple[int, ...], index: int) -> tuple[int, ...]:
    """Those of ``chosen`` that are lost in round ``index``, ascending."""
    if not recipe.clients.dropout:
        return ()
    draws = Key(recipe.seed, "dropout", index).uniform(recipe.clients.count)[list(chosen)].tolist()
    lost = [client for client, draw in zip(chosen, draws, strict=True) if draw < recipe.clients.dropout]
    if len(lost) == len(chosen):
        lost.remove(chosen[max(range(len(chosen)), key=draws.__getitem__)])
    return tuple(lost)


def _plan(method: FederatedMethod, server: State, setting: Round, client: int) -> Plan:
    """What a lost client was sent."""
    alone = replace(setting, clients=(client,), steps=setting.steps[:1], weights=(1.0,))
    return method.plan(server, alone, client, 0)


def count_lost(method: FederatedMethod, server: State, setting: Round, uplink: Uplink, hosted: range, buffers: int) -> None:
    """Count what the hosted lost clients were sent; ``buffers`` statistics besides, 0 where they do not travel."""
    for client in setting.lost:
        if client in hosted:
            uplink.count_plan(_plan(method, server, setting, client))
            if buffers:
                uplink.count_buffers(buffers)


def lost_numbers(method: FederatedMethod, server: State, setting: Round, down: Mapping[str, int], buffers: int) -> dict[str, int]:
    """Closed form of ``count_lost`` in numbers of 32 bits, for a forecast: ``down`` is a client's traffic in the whole round."""
    if not setting.lost:
        return {}
    first = dict(down)
    if method.exchanges > 1:
        plan = _plan(method, server, setting, setting.lost[0])
        first = {**{n: t.numel() for n, t in plan.tensors.items()}, **dict.fromkeys(plan.numbers, 1)}
    if buffers:
        first[BUFFERS] = first.get(BUFFERS, 0) + buffers
    return {name: len(setting.lost) * numbers for name, numbers in first.items()}
