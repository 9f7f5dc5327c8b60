"""Zero-shot tasks of lm-evaluation-harness on a checkpoint folder (the ``eval`` extra)."""

from __future__ import annotations

from pathlib import Path

from xutrain.errors import DataError, Issue

#: The nine tasks of arXiv:2410.12013, Tables 3 and 4; the reported number is plain accuracy, the mean counts each once.
PAPER_TASKS = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "mmlu", "openbookqa", "piqa", "rte", "winogrande")


def zero_shot(folder: Path, tasks: list[str], device: str) -> dict[str, float]:
    """Accuracy (not length-normalised) of each task, and their mean. Raises DataError without the extra."""
    try:
        import lm_eval
    except ImportError:
        raise DataError(Issue("evaluation.tasks", "lm-eval is not installed", tasks, "pip install 'xutrain[eval]'")) from None
    found = lm_eval.simple_evaluate(model="hf", model_args=f"pretrained={folder}", tasks=tasks, num_fewshot=0, device=device)
    scores = {f"accuracy_{task}": float(found["results"][task]["acc,none"]) for task in tasks}
    return {**scores, "accuracy": sum(scores.values()) / len(scores)}
