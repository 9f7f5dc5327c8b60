"""Pruning a Mixtral checkpoint: xutrain's stream against the stock whole-model Wanda procedure, same calibration tensor.

    python benchmarks/pruning.py --layers 11 --samples 8        # about 2 GB of bf16 weights
    python benchmarks/pruning.py --layers 2 --samples 4         # a few minutes on a busy machine

The stock procedure is what Wanda's code does, told where the experts of transformers 5 are: the whole model in memory, per
layer one sample at a time forward with statistics, a full sort of every row, one sample at a time forward again, then
save_pretrained. Each side runs in a process of its own, one thread; memory is the peak resident set above what the process
holds after its imports. GB/min counts the weights of the model.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = {"vocab_size": 2048, "hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 16, "num_key_value_heads": 4}
CONFIG |= {"num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 4096, "sliding_window": None}


def generate(folder: Path, layers: int) -> None:
    """A random Mixtral written tensor by tensor, so that making it needs no memory either."""
    import torch

    from xutrain.models.decoder import Decoder
    from xutrain.models.moe import Architecture
    from xutrain.models.shards import Target, header_of, write_aside

    config = {
        **CONFIG,
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_hidden_layers": layers,
        "torch_dtype": "bfloat16",
    }
    config |= {"rope_theta": 1e4, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in Decoder(Architecture.of(config)).state_dict().items()}
    names = sorted(shapes)
    count = max(2, layers // 2)
    files = {f"model-{i + 1:05d}-of-{count:05d}.safetensors": names[i::count] for i in range(count)}
    target = Target(folder, {f: header_of({n: ("BF16", shapes[n]) for n in held}) for f, held in files.items()})
    target.create()
    generator = torch.Generator().manual_seed(0)
    for name in names:
        shape = shapes[name]
        target.write(name, torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * shape[-1] ** -0.5)
    target.write_index()
    target.close()
    write_aside(folder / "config.json", json.dumps(config).encode())


def resident() -> int:
    """Peak resident set of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ours(folder: Path, out: Path, samples: int, length: int, compute: str) -> None:
    import torch
    import transformers.models.mixtral.modeling_mixtral  # noqa: F401  (its import counts as import)

    from xutrain.methods.prune.checkpoint import prune_checkpoint

    start, clock = resident(), spent()
    prune_checkpoint(folder, out, calibration(samples, length), method="wanda", batch=1, chunk=1024, compute=getattr(torch, compute))
    told(start, clock)


def stock(folder: Path, out: Path, samples: int, length: int) -> None:
    import torch
    from torch.nn import functional as F
    from transformers import AutoModelForCausalLM

    start, clock = resident(), spent()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, experts_implementation="eager").eval()
    tokens = calibration(samples, length)
    with torch.no_grad():
        hidden = [model.model.embed_tokens(t[None]) for t in tokens]
        rotary = model.model.rotary_emb(hidden[0], torch.arange(length)[None])
        for layer in model.model.layers:
            experts = layer.mlp.experts
            n, f = experts.down_proj.shape[0], experts.down_proj.shape[2]
            sums = [[torch.zeros(experts.hidden_dim), torch.zeros(f)] for _ in range(n)]

            def collect(
                module: object, args: tuple[torch.Tensor, ...], sums: list[list[torch.Tensor]] = sums, experts: object = experts
            ) -> None:
                x, at, _ = args
                for e in at.unique().tolist():
                    z = x[(at == e).any(1)]
                    a, b = F.linear(z, experts.gate_up_proj[e]).chunk(2, -1)  # type: ignore[attr-defined]
                    sums[e][0] += z.float().square().sum(0)
                    sums[e][1] += (F.silu(a) * b).float().square().sum(0)

            handle = experts.register_forward_pre_hook(collect)
            for h in hidden:
                layer(h, position_embeddings=rotary, attention_mask=None)
            handle.remove()
            for e in range(n):
                for weight, s in ((experts.gate_up_proj.data[e], sums[e][0]), (experts.down_proj.data[e], sums[e][1])):
                    score = weight.float().abs() * s.sqrt()
                    order = torch.sort(score, dim=-1, stable=True).indices[:, : weight.shape[1] // 2]
                    weight.scatter_(1, order, 0)
            hidden = [_first(layer(h, position_embeddings=rotary, attention_mask=None)) for h in hidden]
    model.save_pretrained(out)
    told(start, clock)


def _first(value: object) -> object:
    return value[0] if isinstance(value, tuple) else value


def calibration(samples: int, length: int):  # type: ignore[no-untyped-def]
    import torch

    return torch.randint(0, CONFIG["vocab_size"], (samples, length), generator=torch.Generator().manual_seed(1))


def spent() -> tuple[float, float]:
    """Wall and CPU seconds so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), used.ru_utime + used.ru_stime


def told(start: int, clock: tuple[float, float]) -> None:
    seconds, cpu = (now - then for now, then in zip(spent(), clock, strict=True))
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "imports": start, "peak": resident()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=11)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--folder", type=Path, help="where the generated model and the results go; a temporary folder if left out")
    parser.add_argument("--side", choices=["ours", "ours-bf16", "stock"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    if args.side:
        out = args.folder / args.side
        if args.side == "stock":
            stock(args.folder / "dense", out, args.samples, args.length)
        else:
            ours(args.folder / "dense", out, args.samples, args.length, "bfloat16" if "bf16" in args.side else "float32")
        return
    with tempfile.TemporaryDirectory() as made:
        folder = args.folder or Path(made)
        generate(folder / "dense", args.layers)
        size = sum(f.stat().st_size for f in (folder / "dense").glob("*.safetensors"))
        print(f"model {size / 1e9:.2f} GB, {args.samples} x {args.length} calibration tokens")
        print("side       seconds  cpu-s  GB/min (cpu)  peak above imports")
        for side in ("ours", "ours-bf16", "stock"):
            command = [
                sys.executable,
                __file__,
                "--side",
                side,
                "--folder",
                str(folder),
                "--samples",
                str(args.samples),
                "--length",
                str(args.length),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            got = json.loads(done.stdout.splitlines()[-1])
            rate = size / 1e9 / got["cpu_seconds"] * 60
            print(
                f"{side:10} {got['seconds']:7.1f} {got['cpu_seconds']:6.1f}  {rate:12.2f}  {(got['peak'] - got['imports']) / 1e9:.3f} GB",
                flush=True,
            )


if __name__ == "__main__":
    main()
