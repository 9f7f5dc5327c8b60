"""Codec speed on one core: encode with packing, unpack with decode, against a memory copy in the same run.

    python benchmarks/codecs.py [--elements 25000000] [--repeats 5] [--bucket 2048] [--only orq-9 terngrad] [--path both] [--json FILE]

Medians over the repeats; ns per element; "copies" is the time of both directions in copies of the vector. The paths with and
without compiled kernels run in processes of their own. GRACE (2022) is on no package registry: "terngrad, GRACE's rules" and
"qsgd, GRACE's rules" are our own writing of the operations that its torch code does on a flat gradient (one scale per tensor,
a byte per symbol, unpacked), to compare costs; they are not GRACE.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))
import numpy as np
import torch
from results import Ratio, arguments, median, write
from torch import Tensor

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


class TernGradByGraceRules:
    """Clip at 2.5 standard deviations, keep a sign with probability |v| / max, send int8 and one float."""

    def encode(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        deviation = torch.sqrt(torch.mean((vector - torch.mean(vector)) ** 2))
        limit = 2.5 * float(deviation)
        clipped = torch.clamp(vector, -limit, limit)
        magnitude = clipped.abs()
        scale = magnitude.max()
        signs = clipped.sign() * scale
        signs[torch.empty_like(vector).uniform_(0, float(scale)) >= magnitude] = 0
        return signs.sign().to(torch.int8), scale.view(1)

    def decode(self, sent: tuple[Tensor, Tensor]) -> Tensor:
        return sent[0].float() * sent[1]


class QSGDByGraceRules:
    """s levels of the L2 norm, random rounding between neighbours, send int8 and one float."""

    def __init__(self, levels: int) -> None:
        self.levels = levels

    def encode(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        norm = vector.norm().view(1)
        place = self.levels / norm * vector.abs()
        below = place.floor()
        up = (torch.empty_like(vector).uniform_() < place - below).float()
        return ((below + up) * vector.sign()).to(torch.int8), norm

    def decode(self, sent: tuple[Tensor, Tensor]) -> Tensor:
        return sent[1] / self.levels * sent[0].float()


GRACE = {"terngrad, GRACE's rules": TernGradByGraceRules(), "qsgd, GRACE's rules": QSGDByGraceRules(127)}


def measure(elements: int, repeats: int, bucket: int, only: list[str], clock: str) -> dict[str, Any]:
    """All codecs side by side in one process."""
    torch.set_num_threads(1)
    compiled = fast.load() is not None
    ticks = CLOCKS[clock]
    vector = torch.from_numpy(np.random.default_rng(0).standard_normal(elements, dtype=np.float32))
    target = torch.empty_like(vector)
    copy = median(lambda: target.copy_(vector), max(3, repeats), ticks)
    rows = []

    def add(label: str, encode: Callable[[], Any], decode: Callable[[Any], Any], bits: Callable[[Any], int]) -> None:
        sent = encode()
        there, back = median(encode, repeats, ticks), median(lambda: decode(sent), repeats, ticks)
        both, size = there + back, bits(sent) / elements
        row = {"codec": label, "encode s": there, "decode s": back, "both s": both, "ns/element": 1e9 * both / elements}
        rows.append({**row, "copies": both / copy, "bits/element": size})

    for label, options in CODECS.items():
        if only and label not in only:
            continue
        codec = xutrain.codec(options["name"], bucket=bucket, **{k: v for k, v in options.items() if k != "name"})
        add(label, lambda c=codec: c.encode(vector, xutrain.key(0)), codec.decode, lambda sent: sent.bits)  # type: ignore[misc]
    for label, peer in GRACE.items():
        if not only or label in only:
            add(label, lambda p=peer: p.encode(vector), peer.decode, lambda sent: 8 * sent[0].numel() + 32)  # type: ignore[misc]
    return {"elements": elements, "bucket": bucket, "clock": clock, "compiled": compiled, "copy_s": copy, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """The result as fixed-width text."""
    path = "compiled" if result["compiled"] else "pure"
    lines = [
        f"{result['elements']:,} float32 elements, buckets of {result['bucket']}, one core, {path} path, {result['clock']} time",
        f"copy {result['copy_s']:.4f} s ({4 * result['elements'] / result['copy_s'] / 1e9:.1f} GB/s), load {os.getloadavg()[0]:.1f}",
        f"{'codec':<26}{'encode s':>10}{'decode s':>10}{'both s':>10}{'ns/elem':>10}{'copies':>10}{'bits/elem':>11}",
    ]
    for row in result["rows"]:
        numbers = f"{row['encode s']:>10.3f}{row['decode s']:>10.3f}{row['both s']:>10.3f}{row['ns/element']:>10.2f}"
        lines.append(f"{row['codec']:<26}{numbers}{row['copies']:>10.1f}{row['bits/element']:>11.4f}")
    return "\n".join(lines)


def payload_bits() -> dict[int, float]:
    """Bits per element of the packed symbols alone, without levels, at a length that fills whole groups."""
    from xutrain.methods.codecs.packing import packed_bytes

    return {levels: 8 * packed_bytes(levels, 120_000) / 120_000 for levels in (3, 5, 9)}


def aims(found: dict[str, dict[str, Any]]) -> list[Ratio]:
    """What was aimed at, from the results of both paths; times scaled to 25 million elements."""
    exact = {3: "== 1.6", 5: "== 2.3333333333", 9: "== 3.2"}
    ratios = [Ratio(f"bits per element of packed symbols, {s} levels", v, exact[s]) for s, v in payload_bits().items()]
    for path, limit in (("compiled", 0.25), ("pure", 0.6)):
        if path not in found:
            continue
        rows = {r["codec"]: r for r in found[path]["rows"]}
        scale = 25e6 / found[path]["elements"]
        if "orq-9" in rows:
            ratios.append(Ratio(f"ORQ-9, 25 M elements there and back, {path}, s", scale * rows["orq-9"]["both s"], f"<= {limit}"))
        for ours, theirs, share in (("orq-3", "terngrad, GRACE's rules", 0.21), ("orq-9", "qsgd, GRACE's rules", 0.42)):
            if ours in rows and theirs in rows:
                ratios.append(Ratio(f"{theirs} / {ours}, time, {path}", rows[theirs]["both s"] / rows[ours]["both s"], ">= 1"))
                if path == "compiled":
                    bits = rows[ours]["bits/element"] / rows[theirs]["bits/element"]
                    ratios.append(Ratio(f"{ours} / {theirs}, bytes", bits, f"<= {share}"))
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=25_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bucket", type=int, default=2048)
    parser.add_argument("--only", nargs="*", default=[], choices=[*CODECS, *GRACE])
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: time of this thread alone, for a machine that is busy")
    parser.add_argument("--path", choices=["both", "compiled", "pure"], default="both")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments(parser)
    args = parser.parse_args()
    if args.quick:
        args.elements, args.repeats = min(args.elements, 1_000_000), 2
    if args.child:
        print(json.dumps(measure(args.elements, args.repeats, args.bucket, args.only, args.clock)))
        return
    found: dict[str, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    notes = [f"{args.elements:,} float32 elements, buckets of {args.bucket}, one core, medians of {args.repeats}, {args.clock} time."]
    for path in ("compiled", "pure") if args.path == "both" else (args.path,):
        command = [sys.executable, __file__, "--child", "--elements", str(args.elements), "--repeats", str(args.repeats)]
        command += ["--bucket", str(args.bucket), "--clock", args.clock, *(["--only", *args.only] if args.only else [])]
        environment = {**os.environ, "XUTRAIN_PURE": "1" if path == "pure" else ""}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        result = json.loads(done.stdout.splitlines()[-1])
        if path == "compiled" and not result["compiled"]:
            notes.append("numba is not installed: there is no compiled path here.")
            continue
        found[path] = result
        print(table(result), flush=True)
        notes.append(f"{path}: a copy of the vector takes {result['copy_s']:.4f} s.")
        rows += [{"table": path, **row} for row in result["rows"]]
    ratios = aims(found)
    for ratio in ratios:
        print(f"{ratio.name}: {ratio.value:.4g} ({ratio.aim}: {'met' if ratio.met else 'missed'})")
    write(args.json, "Codecs on one core", rows, ratios, notes=notes)


if __name__ == "__main__":
    main()
