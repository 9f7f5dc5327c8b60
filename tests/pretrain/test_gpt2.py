"""GPT-2 against its equations, written out by hand in float64, and what it starts from."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xutrain.engine.replica import Replica
from xutrain.recipe import resolve

TASK: Any = SimpleNamespace(name="text", vocabulary=37, input_shape=(11,))


def build(**options: Any) -> nn.Module:
    part, chosen = resolve.options("model", "gpt2", {"layers": 2, "heads": 3, "width": 12, **options}, verb="pretrain")
    torch.manual_seed(0)
    module: nn.Module = part.build(chosen, TASK)
    return module


def logits(w: dict[str, Tensor], tokens: Tensor, heads: int, gelu: Any) -> Tensor:
    """Pre-norm blocks, causal attention, tied head."""

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    length = tokens.shape[1]
    x = w["transformer.wte.weight"][tokens] + w["transformer.wpe.weight"][:length]
    hidden = torch.ones(length, length).triu(1).bool()
    for layer in range(2):
        block = f"transformer.h.{layer}"
        q, k, v = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").chunk(3, dim=-1)
        )
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(hidden, -math.inf).softmax(-1)
        x = x + linear((weights @ v).transpose(1, 2).flatten(2), f"{block}.attn.c_proj")
        x = x + linear(gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")), f"{block}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["transformer.wte.weight"].T


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
def test_logits_are_those_of_the_equations(activation: str, bias: bool) -> None:
    module = build(activation=activation, bias=bias).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.5)
    tokens = torch.randint(37, (2, 9), generator=generator)

    def gelu(x: Tensor) -> Tensor:
        if activation == "gelu":
            return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    wanted = logits(dict(module.state_dict()), tokens, 3, gelu)
    torch.testing.assert_close(module(tokens), wanted, rtol=0, atol=1e-10)


def test_start_and_what_is_trained() -> None:
    """N(0, 0.02), residual projections 0.02 / sqrt(2 layers), no biases, one tied embedding, dropout off."""
    module = build(layers=3, heads=4, width=64)
    weights = dict(module.named_parameters())
    for name, parameter in weights.items():
        if parameter.ndim == 2:
            wanted = 0.02 / math.sqrt(6) if name.endswith("c_proj.weight") else 0.02
            deviation = float(parameter.detach().std())
            assert abs(deviation / wanted - 1) < 5 / math.sqrt(2 * parameter.numel()), name
        else:
            assert bool((parameter == (1.0 if name.endswith("weight") else 0.0)).all()), name
            assert parameter.requires_grad == name.endswith("weight"), name
    width = 64
    assert Replica(module).numel == (37 + 11) * width + 3 * (12 * width * width + 2 * width) + width
