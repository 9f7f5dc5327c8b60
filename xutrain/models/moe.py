"""Mixture-of-experts checkpoints by their on-disk names: one table, one row a family.

The names on disk are the same for transformers 4.36 to 5.x (5.x stacks the experts only in memory), and vLLM reads them
too; so nothing here depends on the module tree of a library. A dense Llama is a family with one expert a layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from xutrain.errors import DataError, Issue

_QWEN = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


@dataclass(frozen=True)
class Family:
    """How one model type stores and routes its experts."""

    model_type: str
    #: transformers' module and class prefix, for attention and rotary embedding.
    module: str
    prefix: str
    #: attribute of a layer that holds router and experts, and the names of W1, W3 and W2.
    block: str = "mlp"
    names: Mapping[str, str] = field(default_factory=lambda: _QWEN)
    experts: str | None = "num_experts"
    ffn: str = "intermediate_size"
    #: are the top-k weights renormalised: by the model always, never, or as norm_topk_prob says
    normalise: Literal["always", "config", "never"] = "config"
    shared: str | None = None
    shared_gate: bool = False


FAMILIES: dict[str, Family] = {
    f.model_type: f
    for f in (
        Family(
            "mixtral",
            "mixtral",
            "Mixtral",
            block="block_sparse_moe",
            names={"gate": "w1", "up": "w3", "down": "w2"},
            experts="num_local_experts",
            normalise="always",
        ),
        Family("qwen2_moe", "qwen2_moe", "Qwen2Moe", ffn="moe_intermediate_size", shared="shared_expert", shared_gate=True),
        Family("olmoe", "olmoe", "Olmoe"),
        Family(
            "deepseek_v2",
            "deepseek_v2",
            "DeepseekV2",
            experts="n_routed_experts",
            ffn="moe_intermediate_size",
            normalise="never",
            shared="shared_experts",
        ),
        Family("llama", "llama", "Llama", experts=None),
    )
}


@dataclass(frozen=True)
class Architecture:
    """A model's shape, read from config.json alone."""

    family: Family
    config: Mapping[str, Any]
    layers: int
    hidden: int
    ffn: int
    experts: int
    top_k: int
    vocab: int

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str = "config.json") -> Architecture:
        """Raises DataError for a model type that is not in the table, with the list of those that are, or for a variant of one
        whose experts are no plain SwiGLU."""
        if not isinstance(config, Mapping):
            raise DataError(Issue(where, "must be a mapping", config, "is this the config.json of the checkpoint?"))
        kind = config.get("model_type")
        if not isinstance(kind, str) or kind not in FAMILIES:
            raise DataError(Issue(where, "model type is not supported by xutrain prune", kind, f"supported: {', '.join(sorted(FAMILIES))}"))
        family = FAMILIES[kind]
        if (act := config.get("hidden_act") or "silu") not in ("silu", "swish"):
            raise DataError(Issue(where, "hidden_act is not supported by xutrain prune", act, "supported: silu"))
        if config.get("mlp_bias"):
            raise DataError(Issue(where, "MLPs with biases are not supported by xutrain prune", has_value=False, hint="mlp_bias is true"))
        if config.get("quantization_config"):
            hint = "dequantize the checkpoint first; pruning works on float64, float32, float16 and bfloat16 weights"
            raise DataError(Issue(where, "quantized weights are not supported by xutrain prune", has_value=False, hint=hint))

        def need(key: str, default: int | None = None) -> int:
            value = config.get(key, default)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise DataError(Issue(where, f"{key} must be a positive integer", value, "is this the config.json of the checkpoint?"))
            return value

        experts, k = 1, 1
        if family.experts is not None:
            # transformers 5 writes num_experts under a second name for some families
            experts = need(family.experts if family.experts in config else "num_experts", 8 if kind == "mixtral" else None)
            k = need("num_experts_per_tok", 2 if kind == "mixtral" else None)
        if k > experts:
            raise DataError(Issue(where, f"num_experts_per_tok {k} exceeds the {experts} experts", has_value=False))
        layers, hidden, vocab = need("num_hidden_layers"), need("hidden_size"), need("vocab_size")
        arch = cls(family, dict(config), layers, hidden, need(family.ffn), experts, k, vocab)
        if not arch.pruned_layers:
            raise DataError(Issue(where, f"none of the {layers} layers has experts", has_value=False, hint="nothing could be pruned"))
        return arch

    @classmethod
    def read(cls, folder: Path) -> Architecture:
        """The architecture of a checkpoint folder. Raises DataError when config.json is missing or unreadable."""
        file = folder / "config.json"
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(Issue(str(folder), "no config.json: not a checkpoint folder", has_value=False)) from None
        except (OSError, ValueError) as reason:
            raise DataError(Issue(str(file), f"cannot be read: {reason}", has_value=False)) from None
        return cls.of(config, str(file))

    def has_experts(self, layer: int) -> bool:
        """False for the dense layers of a mixture-of-experts model, which pruning leaves alone."""
        kind, c = self.family.model_type, self.config
        if kind == "qwen2_moe":
            return layer not in (c.get("mlp_only_layers") or []) and (layer + 1) % int(c.get("decoder_sparse_step", 1)) == 0
        if kind == "deepseek_v2":
            return layer >= int(c.get("first_k_dense_replace", 0))
        return True

    @property
    def dense(self) -> bool:
        """A model without experts, whose MLP counts as the one expert of its layer."""
        return self.family.experts is None

    @property
    def renormalised(self) -> bool:
        """The top-k weights of a token sum to one."""
        return self.family.normalise == "always" or (self.family.normalise == "config" and bool(self.config.get("norm_topk_prob", False)))

    @property
    def route_scale(self) -> float:
        return float(self.config.get("routed_scaling_factor", 1.0)) if self.family.model_type == "deepseek_v2" else 1.0

    @property
    def dtype(self) -> str:
        return str(self.config.get("dtype") or self.config.get("torch_dtype") or "float32")

    def layer_prefix(self, layer: int) -> str:
        return f"model.layers.{layer}."

    def router_name(self, layer: int) -> str:
        return f"{self.layer_prefix(layer)}{self.family.block}.gate.weight"

    def expert_name(self, layer: int, expert: int, role: str) -> str:
        """On-disk name of one matrix; role is gate (W1), up (W3) or down (W2)."""
        name = self.family.names[role]
        inner = "mlp" if self.dense else f"{self.family.block}.experts.{expert}"
        return f"{self.layer_prefix(layer)}{inner}.{name}.weight"

    def expert_names(self, layer: int) -> list[str]:
        """Names of all prunable matrices of a layer, experts in order, roles gate, up, down."""
        if not self.has_experts(layer):
            return []
        return [self.expert_name(layer, e, r) for e in range(self.experts) for r in ("gate", "up", "down")]

    @property
    def pruned_layers(self) -> list[int]:
        return [layer for layer in range(self.layers) if self.has_experts(layer)]

    @property
    def expert_parameters(self) -> int:
        """Weights of one expert."""
        return 3 * self.hidden * self.ffn
