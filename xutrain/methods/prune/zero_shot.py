"""Zero-shot tasks of lm-evaluation-harness on a checkpoint folder (the ``eval`` extra)."""

from __future__ import annotations

import os
from pathlib import Path

from xutrain.errors import DataError, Issue

#: The nine tasks of arXiv:2410.12013, Tables 3 and 4; the reported number is plain accuracy, the mean counts each once.
PAPER_TASKS = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "mmlu", "openbookqa", "piqa", "rte", "winogrande")


def check(tasks: list[str], task_folder: str | None) -> None:
    """Raises DataError without the extra or the folder; asked before the pruning too."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise DataError(Issue("evaluation.tasks", "lm-eval is not installed", tasks, "pip install 'xutrain[eval]'")) from None
    if task_folder is not None and not Path(task_folder).is_dir():
        raise DataError(Issue("evaluation.task_folder", "no such folder", task_folder, "a folder with lm-eval task files (*.yaml)"))


def zero_shot(folder: Path, tasks: list[str], device: str, *, task_folder: str | None = None, limit: int | None = None) -> dict[str, float]:
    """Accuracy (not length-normalised) of each task, and their mean.

    Args:
        folder: a checkpoint with its tokenizer. tasks: names of lm-eval, or of the files in ``task_folder``.
        limit: at most so many documents per task.

    Raises:
        DataError: without the extra, for an unknown task, a task without accuracy, or data that cannot be had.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    check(tasks, task_folder)
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = None if task_folder is None else TaskManager(include_path=task_folder, include_defaults=False)
    if manager is None or any(t not in manager.all_tasks for t in tasks):  # lm-eval's own index takes it half a minute
        manager = TaskManager(include_path=task_folder)
    if unknown := [t for t in tasks if t not in manager.all_tasks]:
        where = f"lm-eval or {task_folder}" if task_folder else "lm-eval; evaluation.task_folder adds your own"
        raise DataError(Issue("evaluation.tasks", f"no such task in {where}", unknown, "list them: lm-eval ls tasks"))
    try:
        found = lm_eval.simple_evaluate(
            model="hf", model_args=f"pretrained={folder}", tasks=tasks, num_fewshot=0, device=device, limit=limit, task_manager=manager
        )
    except (OSError, ValueError) as reason:  # no network, no tokenizer in the folder, a malformed task file
        hint = "the folder needs its tokenizer; lm-eval's own tasks need their data in the Hugging Face cache or a network"
        raise DataError(Issue("evaluation.tasks", f"lm-eval failed: {reason}", tasks, hint)) from None
    results = found["results"]
    if without := [t for t in tasks if "acc,none" not in results.get(t, {})]:
        raise DataError(Issue("evaluation.tasks", "has no metric acc", without, "choose single tasks that report acc"))
    scores = {f"accuracy_{task}": float(results[task]["acc,none"]) for task in tasks}
    return {**scores, "accuracy": sum(scores.values()) / len(scores)}
