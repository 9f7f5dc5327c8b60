"""GPT-2 from transformers' own configuration class; state-dict keys are transformers', so its checkpoints load there.

Sizes of the paper: small (12 layers, 12 heads, 768: 124 M), medium (24, 16, 1024: 355 M), large (36, 20, 1280: 774 M).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from xutrain.data.base import Task
from xutrain.errors import Issue, RecipeError
from xutrain.registry import Named, model

#: size -> (layers, heads, width)
SIZES = {"tiny": (1, 2, 32), "mini": (2, 4, 64), "small": (12, 12, 768), "medium": (24, 16, 1024), "large": (36, 20, 1280)}


@model("gpt2", summary="GPT-2 of any size, weights tied; from transformers", verbs=("pretrain",))
class Gpt2:
    """Weights N(0, 0.02), residual projections 0.02 / sqrt(2 layers), no dropout by default, as nanoGPT trains it."""

    class Options(Named):
        name: str = "gpt2"
        size: Literal["tiny", "mini", "small", "medium", "large"] = Field(
            "tiny", description="layers, heads and width, where not given one by one"
        )
        layers: int | None = Field(None, ge=1, le=1000, description="number of blocks")
        heads: int | None = Field(None, ge=1, le=1000, description="attention heads; must divide width")
        width: int | None = Field(None, ge=1, le=10**6, description="size of the hidden vectors")
        context: int | None = Field(None, ge=1, description="longest window that the model can take; null: data.context")
        vocabulary: int | None = Field(
            None, ge=2, description="rows of the embedding, at least the data's tokens; null: the data's (nanoGPT pads to 50304)"
        )
        bias: bool = Field(False, description="biases in linear layers and layer norms (released GPT-2: true, nanoGPT's runs: false)")
        activation: Literal["gelu_new", "gelu"] = Field(
            "gelu_new", description="gelu_new: tanh approximation, as in released GPT-2; gelu: the exact one, as in nanoGPT"
        )
        dropout: float = Field(0.0, ge=0, lt=1, description="dropout of embeddings, attention and residuals")

    @staticmethod
    def build(options: Options, task: Task) -> nn.Module:
        """The module: tokens (b, t) -> logits (b, t, vocabulary). Raises RecipeError where data and model do not fit."""
        tokens, window = getattr(task, "vocabulary", None), int(task.input_shape[0])
        if tokens is None:
            raise RecipeError(Issue("data.name", "is no text, which gpt2 models", task.name, "for example data.name=text"))
        layers, heads, width = (
            given or size for given, size in zip((options.layers, options.heads, options.width), SIZES[options.size], strict=True)
        )
        vocabulary, context = options.vocabulary or tokens, options.context or window
        problems = []
        if vocabulary < tokens:
            problems.append(
                Issue("model.vocabulary", f"is smaller than the data's {tokens} tokens", vocabulary, f"model.vocabulary={tokens} or null")
            )
        if context < window:
            problems.append(
                Issue(
                    "model.context", f"is shorter than data.context={window}", context, f"data.context={context}, or a larger model.context"
                )
            )
        if width % heads:
            problems.append(
                Issue("model.width", f"is no multiple of model.heads={heads}", width, f"model.width={-(-width // heads) * heads}")
            )
        if problems:
            raise RecipeError(*problems)
        return _module(layers, heads, width, context, vocabulary, options)


def _module(layers: int, heads: int, width: int, context: int, vocabulary: int, options: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    class Gpt2Logits(GPT2LMHeadModel):  # type: ignore[misc]
        def forward(self, input_ids: Tensor) -> Tensor:
            logits: Tensor = super().forward(input_ids=input_ids, use_cache=False).logits
            return logits

    make: Any = GPT2Config  # transformers' stubs leave out what it passes on to its base
    config = make(
        vocab_size=vocabulary,
        n_positions=context,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        activation_function=options.activation,
        resid_pdrop=options.dropout,
        embd_pdrop=options.dropout,
        attn_pdrop=options.dropout,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    module = Gpt2Logits(config)
    if not options.bias:  # transformers' layers always have them: held at zero they take no part
        for name, parameter in module.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
                parameter.requires_grad_(False)
    return module.train()
