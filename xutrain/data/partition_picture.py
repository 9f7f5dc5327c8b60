"""A partition as a picture: one disc per client and class, its area the number of samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def draw(counts: np.ndarray, path: Path, title: str) -> None:
    """Draw samples per client (columns) and class (rows), ``counts`` of shape (K, C), into an image file."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    clients, classes = counts.shape
    cell = max(0.08, min(0.34, 24 / clients))
    figure = Figure(figsize=(2 + cell * clients, 1.4 + max(0.12, min(0.3, 12 / classes)) * classes), layout="constrained")
    axes = figure.subplots()
    x, y = np.meshgrid(np.arange(clients), np.arange(classes), indexing="ij")
    area = (72 * cell * 0.95) ** 2 * counts / max(1, counts.max())
    shown = counts > 0
    axes.scatter(x[shown], y[shown], s=area[shown], c=y[shown], cmap="tab20" if classes <= 20 else "viridis", linewidths=0)
    axes.set(xlim=(-0.7, clients - 0.3), ylim=(classes - 0.4, -0.6), xlabel="client", ylabel="class", title=title)
    axes.set_yticks(range(0, classes, max(1, classes // 20)))
    axes.set_xticks(range(0, clients, max(1, clients // 20)))
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.title.set_fontsize(9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
