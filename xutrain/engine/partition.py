"""A network cut into K consecutive blocks: by layer count, by parameters, by measured time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xutrain.errors import Issue, RecipeError
from xutrain.recipe.pipeline import Split


def layers_of(module: Any) -> list[nn.Module]:
    """The layers whose composition is the network. Raises RecipeError for a network that does not say them."""
    if hasattr(module, "layers"):
        return list(module.layers())
    if isinstance(module, nn.Sequential):
        return list(module)
    raise RecipeError(
        Issue(
            "model.name",
            "cannot be cut into stages: it does not list its layers",
            type(module).__name__,
            "use a model with layers(), such as mlp, cnn, resnet_cifar",
        )
    )


def cut(module: nn.Module, stages: int, split: Split, costs: Sequence[float] | None = None) -> list[int]:
    """First layer of each of the ``stages`` blocks, and the number of layers at the end.

    Args:
        costs: measured seconds of every layer, which ``by: time`` needs.

    Raises:
        RecipeError: more stages than layers, a cut beyond the last layer, or a parameter that two blocks share.
    """
    layers = layers_of(module)
    total = len(layers)
    if stages > total:
        raise RecipeError(
            Issue("stages", f"the network has only {total} layers to cut", stages, f"at most stages={total}, or a deeper model")
        )
    if split.cuts is not None:
        bounds = [0, *split.cuts, total]
        if bounds[-2] >= total:
            raise RecipeError(Issue("split.cuts", f"the network has layers 0 to {total - 1}", split.cuts, "every stage needs a layer"))
    elif split.by == "layers":
        bounds = _even(total, stages)
    elif split.by == "parameters":
        bounds = balanced([float(sum(p.numel() for p in layer.parameters())) for layer in layers], stages)
    else:
        assert costs is not None
        bounds = balanced(list(costs), stages)
    _refuse_ties(module, layers, bounds)
    return bounds


def _even(total: int, stages: int) -> list[int]:
    """Pieces of ceil(L/K) layers, the last one shorter (the family's code); of equal size up to 1 where that leaves one empty."""
    size = -(-total // stages)
    if size * (stages - 1) < total:
        return [*range(0, size * stages, size), total]
    return [round(i * total / stages) for i in range(stages + 1)]


def balanced(costs: Sequence[float], stages: int, fits: Callable[[int, int], bool] = lambda block, start: True) -> list[int]:
    """Cut points that make the most costly block as cheap as can be; no block is empty (dynamic programming, O(L^2 K)).

    ``fits`` says whether a block may begin at a layer; where it leaves no way to cut, the result is empty.
    """
    total = len(costs)
    upto = [0.0]
    for cost in costs:
        upto.append(upto[-1] + cost)
    best = [upto[i] if fits(0, 0) else float("inf") for i in range(total + 1)]
    choices: list[list[int]] = []
    for block in range(2, stages + 1):
        now, chosen = [float("inf")] * (total + 1), [0] * (total + 1)
        for end in range(block, total + 1):
            for start in (i for i in range(block - 1, end) if fits(block - 1, i)):
                worst = max(best[start], upto[end] - upto[start])
                if worst < now[end]:
                    now[end], chosen[end] = worst, start
        best, choices = now, [*choices, chosen]
    if best[total] == float("inf"):
        return []
    bounds = [total]
    for chosen in reversed(choices):
        bounds.append(chosen[bounds[-1]])
    return [*([0] if bounds[-1] else []), *reversed(bounds)]


def _refuse_ties(module: nn.Module, layers: Sequence[nn.Module], bounds: Sequence[int]) -> None:
    names = {id(p): n for n, p in module.named_parameters(remove_duplicate=False)}
    owner: dict[int, int] = {}
    for k in range(len(bounds) - 1):
        for layer in layers[bounds[k] : bounds[k + 1]]:
            for parameter in layer.parameters():
                if owner.setdefault(id(parameter), k) != k:
                    name = names.get(id(parameter), "a parameter")
                    what = f"stages {owner[id(parameter)]} and {k} share {name}: one stage must own every weight"
                    raise RecipeError(
                        Issue(
                            "model",
                            what,
                            has_value=False,
                            hint="untie the weights, or cut so that both uses fall into one stage (split.cuts)",
                        )
                    )


def block_of(layers: Sequence[nn.Module], start: int, stop: int) -> nn.Sequential:
    """One stage's block. Layers that work in place are told not to: a stage keeps its input for the recomputation."""
    block = nn.Sequential(*layers[start:stop])
    _keep_inputs(block)
    return block


def _keep_inputs(block: nn.Module) -> None:
    for part in block.modules():
        if getattr(part, "inplace", False) is True:
            setattr(part, "inplace", False)  # noqa: B010, nn.Module declares its attributes as tensors


def layer_seconds(layers: Sequence[nn.Module], inputs: Tensor, repeats: int = 3) -> list[tuple[float, float]]:
    """Measured (forward, backward) seconds of each layer on one batch, best of ``repeats``. Leaves statistics alone; no layer works in
    place, as in ``block_of``."""
    for layer in layers:
        _keep_inputs(layer)
    states = [{n: b.clone() for n, b in layer.named_buffers()} for layer in layers]
    found = [(float("inf"), float("inf"))] * len(layers)
    for _ in range(repeats + 1):
        x = inputs
        for i, layer in enumerate(layers):
            leaf = x.detach().requires_grad_() if x.is_floating_point() else x
            began = _clock(x)
            y = layer(leaf)
            middle = _clock(x)
            wrt = [t for t in (leaf, *layer.parameters()) if t.requires_grad]
            if y.requires_grad and wrt:
                torch.autograd.grad(y, wrt, torch.ones_like(y), allow_unused=True)
            found[i] = (min(found[i][0], middle - began), min(found[i][1], _clock(x) - middle))
            x = y.detach()
    for layer, state in zip(layers, states, strict=True):
        for name, buffer in layer.named_buffers():
            buffer.copy_(state[name])
    return found


def _clock(x: Tensor) -> float:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    return time.perf_counter()
