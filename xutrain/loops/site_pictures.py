"""Overlays of prediction and truth, one PNG a site."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xutrain.engine.record import Record

if TYPE_CHECKING:
    from xutrain.loops.federated import Job
    from xutrain.loops.site_eval import Answer, Choice

#: truth and prediction, told apart by colour-blind readers and by their line style
TRUTH, PREDICTION = "#f0e442", "#00b4ff"


def flat(image: Tensor, truth: Tensor, found: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Image (C, H, W) and masks (S, H, W): of volumes the axial slice with most truth, the same one for every structure."""
    if image.ndim == 3:
        return image, truth, found
    depth = int(truth.sum((0, 2, 3)).argmax())
    return image[:, depth], truth[:, depth], found[:, depth]


def draw(job: Job, record: Record, answer: Answer, choice: Choice, masks: dict[int, Tensor]) -> None:
    """``overlay-<site>.png``: a column a sample (lower Dice first), the image above, with outlines below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from xutrain.loops.site_tables import name_of

    task: Any = job.task
    sites, first, wanted = task.split_sites("test"), 0, dict[int, tuple[Tensor, Tensor]]()
    for batch in task.batches("test", job.bench.eval_batch):
        for i in range(len(batch)):
            if first + i in masks:
                wanted[first + i] = (batch.inputs[i], batch.targets[i])
        first += len(batch)
    for site in sites.unique().tolist():
        samples = sorted((i for i in masks if int(sites[i]) == site), key=lambda i: float(answer.dice[i].nanmean()))
        if not samples:
            continue
        figure = Figure(figsize=(2.6 * len(samples) + 0.4, 5.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, len(samples), squeeze=False)
        for column, i in enumerate(samples):
            image, truth, found = flat(*wanted[i], masks[i])
            picture = image.permute(1, 2, 0).clamp(0, 1) if len(image) == 3 else image.mean(0)  # photographs in their colours
            for line in (0, 1):
                axes[line][column].set_axis_off()
                axes[line][column].imshow(picture.numpy(), cmap="gray", interpolation="nearest")
            for s in range(len(truth)):
                for mask, colour, style in ((truth[s], TRUTH, "solid"), (found[s], PREDICTION, "dashed")):
                    if bool(torch.any(mask > 0)) and not bool(torch.all(mask > 0)):
                        axes[1][column].contour(mask.float().numpy(), levels=[0.5], colors=colour, linestyles=style, linewidths=1.6)
            dice = float(answer.dice[i].nanmean())
            axes[0][column].set_title(f"Dice {dice:.2f}\nby {name_of(job, int(choice.route[i]))}", fontsize=9)
        handles = [Line2D([], [], color=TRUTH, label="truth"), Line2D([], [], color=PREDICTION, linestyle="dashed", label="prediction")]
        legend = figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=9, frameon=True)
        legend.get_frame().set_facecolor("#444444")
        for text in legend.get_texts():
            text.set_color("white")
        kind = "" if site not in task.unseen_sites else ", not trained on"
        figure.suptitle(f"{task.site_names[site]}{kind}{' (synthetic)' if task.synthetic else ''}", fontsize=10)
        figure.savefig(record.artefact(f"overlay-{task.site_names[site]}.png"), dpi=110, metadata={"Software": None})
