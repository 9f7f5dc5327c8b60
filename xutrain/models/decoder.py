"""Decoder layers whose parameters carry their on-disk names: attention from transformers, norms, router and experts ours.

One layer at a time can be filled from a checkpoint without its experts (pruning streams those), or a whole small model
can be built in memory (training, distillation). State-dict keys equal checkpoint keys in both cases.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xutrain.errors import DataError, Issue
from xutrain.models.moe import Architecture
from xutrain.models.shards import Source


def attention_config(arch: Architecture) -> Any:
    """transformers' config object, with the attention kernel that is causal without a mask."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[arch.family.model_type].from_dict(dict(arch.config))
        config._attn_implementation = "sdpa"
        _class(arch, "RotaryEmbedding")(config=config)
    except Exception as reason:  # whatever transformers finds wrong with it
        what = f"transformers refuses it: {type(reason).__name__}: {' '.join(str(reason).split())}"
        raise DataError(Issue("config.json", what, has_value=False, hint="is this the config.json of the checkpoint?")) from None
    return config


def _class(arch: Architecture, name: str) -> Any:
    module = importlib.import_module(f"transformers.models.{arch.family.module}.modeling_{arch.family.module}")
    return getattr(module, arch.family.prefix + name)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean square in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class SwiGLU(nn.Module):
    """W2( silu(W1 x) * (W3 x) ), its three Linears under the family's names."""

    def __init__(self, arch: Architecture, ffn: int, names: dict[str, str] | None = None) -> None:
        super().__init__()
        self.names = dict(names or arch.family.names)
        for role, (rows, columns) in {"gate": (ffn, arch.hidden), "up": (ffn, arch.hidden), "down": (arch.hidden, ffn)}.items():
            self.add_module(self.names[role], nn.Linear(columns, rows, bias=False))

    def matrix(self, role: str) -> Tensor:
        weight = self.get_submodule(self.names[role]).weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.matrix("gate"))) * F.linear(x, self.matrix("up")), self.matrix("down"))


def route(arch: Architecture, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the model's router does with logits (T, n): indices (T, k), weights (T, k) and softmax over all (T, n), float32."""
    prob = logits.float().softmax(-1)
    scores = prob
    if arch.config.get("topk_method") == "group_limited_greedy":
        groups, keep = int(arch.config["n_group"]), int(arch.config["topk_group"])
        best = prob.view(len(prob), groups, -1).amax(-1).topk(keep, -1).indices
        allowed = torch.zeros(len(prob), groups, device=prob.device).scatter_(1, best, 1.0)
        scores = prob * allowed.repeat_interleave(arch.experts // groups, 1)
    weight, index = scores.topk(arch.top_k, -1)
    if arch.renormalised:
        weight = weight / weight.sum(-1, keepdim=True)
    return index, weight * arch.route_scale, prob


class MoE(nn.Module):
    """Router, experts (optional), shared experts."""

    def __init__(self, arch: Architecture, experts: bool = True) -> None:
        super().__init__()
        self.arch = arch
        self.gate = nn.Linear(arch.hidden, arch.experts, bias=False)
        if experts:
            self.experts = nn.ModuleList(SwiGLU(arch, arch.ffn) for _ in range(arch.experts))
        if arch.family.shared:
            key = "shared_expert_intermediate_size"
            ffn = int(arch.config[key]) if key in arch.config else arch.ffn * int(arch.config.get("n_shared_experts") or 1)
            self.add_module(arch.family.shared, SwiGLU(arch, ffn))
        if arch.family.shared_gate:
            self.shared_expert_gate = nn.Linear(arch.hidden, 1, bias=False)

    def logits(self, x: Tensor) -> Tensor:
        """The router's, (T, n); DeepSeek's works in float32 whatever the model does."""
        if self.arch.family.model_type != "deepseek_v2":
            return self.gate(x)  # type: ignore[no-any-return]
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(wide), self.gate.weight.to(wide))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return route(self.arch, self.logits(x))

    def always(self, x: Tensor) -> Tensor | None:
        """What every token gets besides its routed experts."""
        if self.arch.family.shared is None:
            return None
        y: Tensor = self.get_submodule(self.arch.family.shared)(x)
        return torch.sigmoid(self.shared_expert_gate(x)) * y if self.arch.family.shared_gate else y

    def forward(self, x: Tensor, trace: list[Any] | None = None) -> Tensor:
        """x (T, d). ``trace`` receives (x, index, weight, prob)."""
        index, weight, prob = self.route(x)
        if trace is not None:
            trace.append((x, index, weight, prob))
        out = self.always(x)
        out = torch.zeros_like(x) if out is None else out
        for e, expert in enumerate(self.experts):
            token, slot = (index == e).nonzero(as_tuple=True)
            if len(token):
                out = out.index_add(0, token, expert(x[token]) * weight[token, slot].to(x.dtype).unsqueeze(1))
        return out


class Layer(nn.Module):
    """One decoder layer: h + attention(norm(h)), then + experts(norm(.))."""

    def __init__(self, arch: Architecture, index: int, config: Any, experts: bool = True) -> None:
        super().__init__()
        self.arch, self.index = arch, index
        eps = float(config.rms_norm_eps)
        self.self_attn = _class(arch, "Attention")(config, layer_idx=index)
        self.input_layernorm = RMSNorm(arch.hidden, eps)
        self.post_attention_layernorm = RMSNorm(arch.hidden, eps)
        self.sparse = arch.has_experts(index) and not arch.dense
        if self.sparse:
            self.add_module(arch.family.block, MoE(arch, experts))
        elif experts or not arch.dense:
            self.mlp = SwiGLU(arch, int(arch.config["intermediate_size"]))

    @property
    def block(self) -> MoE:
        moe = self.get_submodule(self.arch.family.block)
        assert isinstance(moe, MoE)
        return moe

    def attend(self, h: Tensor, rotary: Any) -> Tensor:
        """h (b, s, d) after attention and its residual."""
        out = self.self_attn(hidden_states=self.input_layernorm(h), position_embeddings=rotary, attention_mask=None)
        return h + out[0]

    def forward(self, h: Tensor, rotary: Any, trace: list[Any] | None = None) -> Tensor:
        h = self.attend(h, rotary)
        x = self.post_attention_layernorm(h)
        if not self.sparse:
            if trace is not None and self.arch.dense:  # one expert that every token reaches
                flat = x.view(-1, x.shape[-1])
                ones = flat.new_ones(len(flat), 1)
                trace.append((flat, torch.zeros_like(ones, dtype=torch.int64), ones, ones))
            return h + self.mlp(x)
        return h + self.block(x.view(-1, x.shape[-1]), trace).view_as(x)


class Rotary:
    """cos and sin (or their complex form) for positions 0 .. length-1."""

    def __init__(self, arch: Architecture, config: Any, device: torch.device | None = None) -> None:
        window = getattr(config, "sliding_window", None)
        self.window = int(window) if window else None
        self.module = _class(arch, "RotaryEmbedding")(config=config)
        if device is not None:
            self.module = self.module.to(device)
        self._held: dict[tuple[int, torch.dtype], Any] = {}

    def __call__(self, h: Tensor) -> Any:
        length = h.shape[1]
        if self.window is not None and length > self.window:
            hint = f"use sequences of at most {self.window} tokens"
            raise DataError(Issue("sequence length", "exceeds the model's sliding window", length, hint))
        if (length, h.dtype) not in self._held:
            self._held = {(length, h.dtype): self.module(h[:1], torch.arange(length, device=h.device).unsqueeze(0))}
        return self._held[length, h.dtype]


class Decoder(nn.Module):
    """A whole model in memory; ``state_dict`` has the checkpoint's names."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.arch = arch
        config = attention_config(arch)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(arch.vocab, arch.hidden)
        self.model.layers = nn.ModuleList(Layer(arch, i, config) for i in range(arch.layers))
        self.model.norm = RMSNorm(arch.hidden, float(config.rms_norm_eps))
        self.lm_head = nn.Linear(arch.hidden, arch.vocab, bias=False)
        if arch.config.get("tie_word_embeddings"):
            self.lm_head.weight = self.model.embed_tokens.weight
        self.rotary = Rotary(arch, config)

    @property
    def layers(self) -> nn.ModuleList:
        layers = self.model.layers
        assert isinstance(layers, nn.ModuleList)
        return layers

    def initialise(self, generator: torch.Generator, std: float = 0.02) -> None:
        """Normal weights with standard deviation ``std``, norms one, biases (of attention, where a family has them) zero."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, std, generator=generator)
                elif name.endswith(".bias"):
                    parameter.zero_()

    def load(self, source: Source) -> None:
        """Fill every parameter from a checkpoint."""
        state = {name: source.read(name).float() for name in self.state_dict() if name in source}
        if self.arch.config.get("tie_word_embeddings"):
            state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
        source.need(n for n in self.state_dict() if n not in state)
        self.load_state_dict(state)

    def forward(self, tokens: Tensor, trace: list[Any] | None = None) -> Tensor:
        """Logits (b, s, vocab) for tokens (b, s)."""
        h = self.model.embed_tokens(tokens)  # type: ignore[operator]
        for layer in self.layers:
            h = layer(h, self.rotary(h), trace)
        return self.lm_head(self.model.norm(h))  # type: ignore[operator, no-any-return]


def load_layer(arch: Architecture, source: Source, index: int, config: Any, dtype: torch.dtype, device: torch.device) -> Layer:
    """One layer without its routed experts, filled from a checkpoint."""
    with torch.device("meta"):
        layer = Layer(arch, index, config, experts=False)
    prefix = arch.layer_prefix(index)
    state = {name: source.read(prefix + name).to(device, dtype) for name in layer.state_dict()}
    layer.load_state_dict(state, assign=True)
    return layer.eval()
