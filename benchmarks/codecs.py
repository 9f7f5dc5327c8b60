"""Codec speed on one core: encode with packing, unpack with decode, against a memory copy in the same run.

Usage: python benchmarks/codecs.py [--elements 25000000] [--repeats 5] [--bucket 2048] [--only orq-9 terngrad] [--json]
XUTRAIN_PURE=1 measures the path without compiled kernels.
Medians over the repeats; ns per element; "copies" is the time of both directions in copies of the vector.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import torch

import xutrain
from xutrain.methods.codecs import fast

CODECS: dict[str, dict[str, Any]] = {
    "orq-3": {"name": "orq", "levels": 3},
    "orq-5": {"name": "orq", "levels": 5},
    "orq-9": {"name": "orq", "levels": 9},
    "bingrad-b": {"name": "bingrad_b"},
    "bingrad-pb": {"name": "bingrad_pb"},
    "terngrad": {"name": "terngrad"},
    "qsgd-5": {"name": "qsgd", "levels": 5},
    "qsgd-9": {"name": "qsgd", "levels": 9},
    "scaled-sign": {"name": "scaled_sign"},
    "eden-3": {"name": "eden", "levels": 3},
    "eden-9": {"name": "eden", "levels": 9},
}

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.thread_time}


def median(work: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    """Median seconds of ``work`` by ``clock``, after one call to warm up."""
    work()
    times = []
    for _ in range(repeats):
        start = clock()
        work()
        times.append(clock() - start)
    return statistics.median(times)


def measure(elements: int, repeats: int, bucket: int, only: list[str], clock: str) -> dict[str, object]:
    """All codecs side by side in one process."""
    torch.set_num_threads(1)
    compiled = fast.load() is not None
    ticks = CLOCKS[clock]
    vector = torch.from_numpy(np.random.default_rng(0).standard_normal(elements, dtype=np.float32))
    target = torch.empty_like(vector)
    copy = median(lambda: target.copy_(vector), max(3, repeats), ticks)
    rows = []
    for label, options in CODECS.items():
        if only and label not in only:
            continue
        settings = {k: v for k, v in options.items() if k != "name"}
        codec = xutrain.codec(str(options["name"]), bucket=bucket, **settings)
        payload = codec.encode(vector, xutrain.key(0))
        encode = median(lambda c=codec: c.encode(vector, xutrain.key(0)), repeats, ticks)  # type: ignore[misc]
        decode = median(lambda c=codec, p=payload: c.decode(p), repeats, ticks)  # type: ignore[misc]
        both = encode + decode
        rows.append(
            {
                "codec": label,
                "encode_s": encode,
                "decode_s": decode,
                "both_s": both,
                "ns_per_element": 1e9 * both / elements,
                "copies": both / copy,
                "bits_per_element": payload.bits / elements,
            }
        )
    machine = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return {
        **machine,
        "elements": elements,
        "bucket": bucket,
        "repeats": repeats,
        "clock": clock,
        "load": os.getloadavg()[0],
        "compiled": compiled,
        "copy_s": copy,
        "rows": rows,
    }


def table(result: dict[str, object]) -> str:
    """The result as fixed-width text."""
    path, clock = "compiled" if result["compiled"] else "pure", result["clock"]
    lines = [
        f"{result['elements']:,} float32 elements, buckets of {result['bucket']}, one core, {path} path",
        f"copy {result['copy_s']:.4f} s, medians of {result['repeats']}, {clock} time, load {result['load']:.1f}",
        f"{'codec':<12}{'encode s':>10}{'decode s':>10}{'both s':>10}{'ns/elem':>10}{'copies':>10}{'bits/elem':>11}",
    ]
    for row in result["rows"]:  # type: ignore[attr-defined]
        numbers = f"{row['encode_s']:>10.3f}{row['decode_s']:>10.3f}{row['both_s']:>10.3f}{row['ns_per_element']:>10.2f}"
        lines.append(f"{row['codec']:<12}{numbers}{row['copies']:>10.1f}{row['bits_per_element']:>11.4f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=25_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bucket", type=int, default=2048)
    parser.add_argument("--only", nargs="*", default=[], choices=list(CODECS))
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: time of this thread alone, for a machine that is busy")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args()
    result = measure(args.elements, args.repeats, args.bucket, args.only, args.clock)
    sys.stdout.write((json.dumps(result, indent=2) if args.json else table(result)) + "\n")


if __name__ == "__main__":
    main()
