"""Pruning a Mixtral checkpoint: xutrain's stream against the stock whole-model Wanda procedure, same calibration tensor.

    python benchmarks/pruning.py                 # about 2 GB of bf16 weights, 8 x 256 calibration tokens; minutes on one core
    python benchmarks/pruning.py --quick         # one layer, to see that it works

The stock procedure is what Wanda's code does, told where the experts of transformers 5 are: the whole model in memory, per
layer one sample at a time forward with statistics, a full sort of every row, one sample at a time forward again, then
save_pretrained. llm-compressor's Wanda runs where its environment is (python benchmarks/peers/make.py llm-compressor). Each
side runs in a process of its own, one thread, from checkpoint folder to checkpoint folder; imports are not counted, neither
in seconds nor in memory (peak resident set above what the process holds after its imports). GB/min counts the weights of the
model. bf16: the forward pass computes in the checkpoint's dtype, as both peers do; float32 is xutrain's default.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from results import Ratio, arguments, write

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
    import transformers.models.auto.configuration_auto
    import transformers.models.mixtral.modeling_mixtral  # noqa: F401  (imports are not counted on any side)

    from xutrain.methods.prune.checkpoint import prune_checkpoint

    start, clock = resident(), spent()
    prune_checkpoint(folder, out, calibration(samples, length), method="wanda", batch=1, chunk=1024, compute=getattr(torch, compute))
    told(start, clock)


def stock(folder: Path, out: Path, samples: int, length: int) -> None:
    import torch
    import transformers.models.mixtral.modeling_mixtral  # noqa: F401
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


def compressor(folder: Path, out: Path, samples: int, length: int) -> None:
    """llm-compressor's one-shot Wanda on the experts, as its documentation runs it."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    start, clock = resident(), spent()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokens = calibration(samples, length).tolist()
    data = Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * length] * samples})
    modifier = WandaPruningModifier(sparsity=0.5, mask_structure="0:0", targets=["re:.*experts.*(w1|w2|w3|gate_proj|up_proj|down_proj)$"])
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"x": 0}, "x")), pad_token="x")  # asked for, not used
    calibrated = {"num_calibration_samples": samples, "max_seq_length": length, "shuffle_calibration_samples": False}
    oneshot(model=model, processor=words, dataset=data, recipe=modifier, output_dir=str(out), **calibrated)
    told(start, clock)


SIDES = {"ours": "xutrain, float32", "ours-bf16": "xutrain, bf16", "stock": "stock Wanda, whole model", "llm-compressor": "llm-compressor"}


def zeros(folder: Path) -> float:
    """Share of zeros among the expert weights of a result, from one expert of the first layer: that it pruned at all."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as held:
            for name in held.keys():  # noqa: SIM118
                if "layers.0." in name and "experts" in name:
                    weight = held.get_tensor(name)
                    return float((weight == 0).float().mean())
    return 0.0


def measure(side: str, folder: Path, samples: int, length: int, interpreter: str) -> dict[str, Any] | str:
    """What one side took in a process of its own, or why it gave nothing."""
    command = [interpreter, __file__, "--side", side, "--folder", str(folder), "--samples", str(samples), "--length", str(length)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["ended without a message"])[-1][:300]
    got: dict[str, Any] = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    got["zeros"] = zeros(folder / side)
    shutil.rmtree(folder / side)
    return got


def run_side(args: argparse.Namespace) -> None:
    out = args.folder / args.side
    if args.side == "stock":
        stock(args.folder / "dense", out, args.samples, args.length)
    elif args.side == "llm-compressor":
        compressor(args.folder / "dense", out, args.samples, args.length)
    else:
        ours(args.folder / "dense", out, args.samples, args.length, "bfloat16" if "bf16" in args.side else "float32")


def compare(folder: Path, args: argparse.Namespace) -> None:
    sys.path.insert(0, str(Path(__file__).parent / "peers"))
    from make import python as peer

    generate(folder / "dense", args.layers)
    size = sum(f.stat().st_size for f in (folder / "dense").glob("*.safetensors"))
    print(f"model {size / 1e9:.2f} GB, {args.samples} x {args.length} calibration tokens, one thread")
    rows: list[dict[str, Any]] = []
    found: dict[str, dict[str, Any]] = {}
    notes = []
    for side, title in SIDES.items():
        interpreter = peer("llm-compressor") if side == "llm-compressor" else Path(sys.executable)
        got = "its environment is not there: python benchmarks/peers/make.py llm-compressor" if interpreter is None else ""
        got = got or measure(side, folder, args.samples, args.length, str(interpreter))
        if isinstance(got, str):
            notes.append(f"{title}: not measured, {got}")
            print(notes[-1], flush=True)
            continue
        found[side] = got
        peak = (got["peak"] - got["imports"]) / 1e9
        row = {"side": title, "model GB": round(size / 1e9, 2), "seconds": round(got["seconds"], 1), "CPU s": round(got["cpu_seconds"], 1)}
        row |= {
            "GB/min": round(size / 1e9 / got["seconds"] * 60, 2),
            "peak GB above imports": round(peak, 3),
            "zeros": round(got["zeros"], 3),
        }
        rows.append(row)
        print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    ratios = []
    for side in ("stock", "llm-compressor"):
        for mine in ("ours-bf16", "ours"):
            if side in found and mine in found:
                a, b = found[mine], found[side]
                memory = (a["peak"] - a["imports"]) / (b["peak"] - b["imports"])
                aims = ("<= 0.25", ">= 3") if mine == "ours-bf16" else ("", "")
                ratios.append(Ratio(f"peak memory, {SIDES[mine]} / {SIDES[side]}", round(memory, 3), aims[0]))
                ratios.append(Ratio(f"CPU time, {SIDES[side]} / {SIDES[mine]}", round(b["cpu_seconds"] / a["cpu_seconds"], 2), aims[1]))
    for ratio in ratios:
        print(f"{ratio.name}: {ratio.value} {f'(aim {ratio.aim})' if ratio.aim else ''}")
    write(args.json, "Pruning a Mixtral from disk to disk", rows, ratios, notes=notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=11, help="0.18 GB each")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--folder", type=Path, help="where the generated model and the results go; a temporary folder if left out")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    arguments(parser)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    if args.quick:
        args.layers, args.samples, args.length = 1, 2, 128
    if args.side:
        run_side(args)
    elif args.folder:
        compare(args.folder, args)
    else:
        with tempfile.TemporaryDirectory() as made:
            compare(Path(made), args)


if __name__ == "__main__":
    main()
