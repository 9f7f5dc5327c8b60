"""The table of verbs: which recipe class, which loop, which methods, which papers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Family:
    """One verb of the command line."""

    verb: str
    help: str
    loop: str
    recipe: str
    papers: tuple[str, ...]
    default: str
    actions: str | None = None

    @property
    def built(self) -> bool:
        """The loop, the recipe class and at least one method are there."""
        files = (self.loop, self.recipe.split(":")[0])
        there = all(_PACKAGE.parent.joinpath(*name.split(".")).with_suffix(".py").is_file() for name in files)
        return there and any(f.stem not in ("__init__", "base") for f in (_PACKAGE / "methods" / self.verb).glob("*.py"))


def _family(verb: str, help: str, loop: str, papers: tuple[str, ...], default: str, actions: bool = False) -> Family:
    recipe = f"xutrain.recipe.{verb}:{verb.capitalize()}Recipe"
    return Family(verb, help, f"xutrain.loops.{loop}", recipe, papers, default, f"xutrain.cli.{verb}" if actions else None)


FAMILIES: dict[str, Family] = {
    f.verb: f
    for f in (
        _family("quantize", "Train with quantized gradients: BinGrad, ORQ and every baseline.", "data_parallel", ("2002.11082",), "orq"),
        _family(
            "sparsify",
            "Train with error feedback: SAEF, DEF, DEF-A and every baseline.",
            "data_parallel",
            ("2008.05823", "2004.05298"),
            "def",
        ),
        _family(
            "federate",
            "Train across clients: DOMO, FedSM, Auto-FedRL and their baselines.",
            "federated",
            ("2102.03970", "2203.10144", "2203.06338"),
            "domo",
        ),
        _family(
            "pipeline",
            "Train a pipeline of stages with diversely stale parameters: DSP. Also: pipeline plan, schedule, stragglers.",
            "pipelined",
            ("1909.02625",),
            "dsp",
            actions=True,
        ),
        _family(
            "vertical",
            "Train between parties that hold different features: AFSGD/AFSVRG/AFSAGA-VP.",
            "vertical",
            ("2008.06233",),
            "afsgd",
            actions=True,
        ),
        _family("prune", "Prune mixture-of-experts checkpoints: MoE-Pruner and baselines.", "pruning", ("2410.12013",), "moe_pruner"),
        _family(
            "pretrain", "Pre-train GPT-2 with distributed sign momentum and local steps: DSM.", "data_parallel", ("2411.17866",), "dsm"
        ),
    )
}
