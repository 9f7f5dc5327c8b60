"""A few processes of this machine that talk to each other once, for what `xutrain doctor` and `xutrain bench` measure."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from typing import Any


def ask(target: Callable[..., None], backend: str, count: int, limit_s: float) -> Any:
    """Run ``target(backend, rank, count, store, answer)`` in ``count`` processes; what one of them sends into ``answer``.

    ``store`` is the path of a file store for them to meet at. A text instead of an answer says what went wrong; nobody is left behind.
    """
    method = "fork" if backend == "gloo" and "fork" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(method)
    with tempfile.TemporaryDirectory() as folder:
        receiver, sender = context.Pipe(duplex=False)
        children = [context.Process(target=target, args=(backend, r, count, f"{folder}/store", sender), daemon=True) for r in range(count)]
        for child in children:
            child.start()
        sender.close()
        try:
            answer = receiver.recv() if receiver.poll(limit_s) else "no answer"
        except EOFError:
            answer = "a process ended without an answer"
        for child in children:
            child.join(5)
            child.kill()
    return answer
