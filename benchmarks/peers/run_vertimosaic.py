"""Train VertiMosaic's vertical logistic regression on the arrays that vertical.py wrote: ``PYTHON run_vertimosaic.py DATA.npz``.

Runs in VertiMosaic's own environment. Prints one JSON line: processor seconds of ``fit``, messages, bytes of payload as its
transport counts them, weights by party. DATA.npz holds one array per party (the first one is active), y in {0, 1}, and the
options of the run.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import metadata

import numpy as np
from vertimosaic.models.vfl_logistic import VFLLogisticRegression
from vertimosaic.parties.core import ActiveParty, PassiveParty
from vertimosaic.transport.core import InMemoryTransport


def main() -> None:
    with np.load(sys.argv[1]) as data:
        names = [str(name) for name in data["parties"]]
        blocks = {name: data[f"x_{name}"] for name in names}
        y, given = data["y"], json.loads(str(data["options"]))
    active = ActiveParty(names[0], blocks[names[0]], _y=y)
    passive = [PassiveParty(name, blocks[name]) for name in names[1:]]
    transport = InMemoryTransport()
    model = VFLLogisticRegression(
        learning_rate=given["lr"], max_iter=given["epochs"], l2=given["weight_decay"], batch_size=given["batch_size"], tolerance=0.0,
        gradient_clip=None, seed=given["seed"], transport=transport,
    )  # fmt: skip
    began = time.process_time()
    model.fit(active, passive)
    seconds = time.process_time() - began
    found = {
        "version": metadata.version("vertimosaic"),
        "seconds": seconds,
        "messages": len(transport.audit_log),
        "bytes": int(transport.estimated_payload_bytes),
        "scores": model.decision_function([active, *passive]).tolist(),
        "weights": {name: w.tolist() for name, w in model.weights_.items()},
        "intercept": model.intercept_,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
