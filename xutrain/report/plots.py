"""Pictures of a report: curves with bands over seeds and points, as SVG that follows the page's colours, and as PNG."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

#: stand-ins for the page's own colours, replaced in the SVG by what the style sheet says
_INK, _GRID = "#010203", "#040506"
#: readable on white and on near-black
COLOURS = ("#3a86c8", "#e07b1a", "#2a9d63", "#d1495b", "#8e6cc0", "#a3703f", "#1aa3b5", "#d46aa8", "#7f8a94", "#9a9a1f")
_DASHES = ("-", "--", "-.", ":")
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
_BITS = ("bits", "bits_up", "bits_down")
WORDS = {"bits": "bits sent, all participants", "bits_up": "bits sent, all participants", "time": "seconds of one run"}


def svg(panel: dict[str, Any], number: int) -> str:
    """One panel as an SVG element without a fixed size, to stand inside HTML."""
    text = _render(panel, "svg", ink=_INK, grid=_GRID, salt=f"panel{number}").decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace(_INK, "currentColor").replace(_GRID, "var(--line)")
    text = re.sub(r'\bid="([^"]+)"', rf'id="p{number}-\1"', text)  # several pictures share one page
    text = re.sub(r'((?:xlink:)?href=")#', rf"\1#p{number}-", text)
    text = text.replace("url(#", f"url(#p{number}-")
    return re.sub(
        r'<svg [^>]*?viewBox="([^"]+)"[^>]*>',
        r'<svg viewBox="\1" xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img">',
        text,
        count=1,
    )


def png(panel: dict[str, Any], path: Path) -> Path:
    """One panel as a picture file on white."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_render(panel, "png", ink="#1b1f24", grid="#dfe3e8", salt="png"))
    return path


def _render(panel: dict[str, Any], kind: str, *, ink: str, grid: str, salt: str) -> bytes:
    import matplotlib

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.size": 10,
        "font.family": "sans-serif",
        "axes.edgecolor": ink,
        "axes.labelcolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "text.color": ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": grid,
        "grid.linewidth": 0.7,
        "axes.grid": True,
        "axes.axisbelow": True,
    }
    with matplotlib.rc_context(style):
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullLocator

        rows = -(-len(panel["series"]) // 3)
        figure = Figure(figsize=(6.4, 3.7 + 0.22 * rows), layout="constrained")
        axes = figure.add_subplot()
        for index, series in enumerate(panel["series"]):
            _series(axes, panel, series, index)
        axes.set_xlabel(_label(panel["x"]) + (" (logarithmic)" if panel["log_x"] else ""))
        axes.set_ylabel(_label(panel["y"]) + (" (logarithmic)" if panel["log_y"] else ""))
        if panel["log_x"]:
            axes.set_xscale("log")
        elif panel["x"] in ("step", "round", "epoch"):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins="auto", steps=[1, 2, 5, 10]))
        if panel["log_y"]:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            if low > 0 and high < 20 * low:  # less than a decade or so: plain numbers
                axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
                axes.yaxis.set_minor_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        if panel["x"] in _BITS and not panel["log_x"]:
            axes.xaxis.set_major_formatter(EngFormatter(unit="bit"))
        if panel["kind"] == "columns" and panel["log_x"]:  # the numbers themselves
            places = sorted({p["x"] for s in panel["series"] for p in s["points"]})
            axes.set_xticks(places, [f"{at:g}" for at in places])
            axes.xaxis.set_minor_locator(NullLocator())
        if kind == "png":
            axes.set_title(panel["title"], fontsize=11, loc="left")
        figure.legend(loc="outside lower center", ncols=min(3, len(panel["series"])), frameon=False, fontsize=9, labelcolor=ink)
        stream = io.BytesIO()
        figure.savefig(stream, format=kind, transparent=kind == "svg", dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return stream.getvalue()


def _series(axes: Any, panel: dict[str, Any], series: dict[str, Any], index: int) -> None:
    colour = COLOURS[index % len(COLOURS)]
    points = series["points"]
    x, y = [p["x"] for p in points], [p["mean"] for p in points]
    std = [p["std"] or 0.0 for p in points]
    mark, dash = _MARKS[index % len(_MARKS)], _DASHES[index // len(COLOURS) % len(_DASHES)]
    if panel["kind"] != "curve":
        line = mark if panel["kind"] == "points" else mark + dash
        bars = std if any(std) else None
        axes.errorbar(x, y, yerr=bars, fmt=line, color=colour, linewidth=1.6, capsize=3, markersize=6, label=series["label"])
        return
    axes.plot(x, y, dash, color=colour, linewidth=1.6, label=series["label"])
    axes.plot(x[-1:], y[-1:], mark, color=colour, markersize=6)
    if any(std):
        low = [m - s for m, s in zip(y, std, strict=True)]
        high = [m + s for m, s in zip(y, std, strict=True)]
        floor = min((v for v in y if v > 0), default=1.0) / 10
        axes.fill_between(x, [max(v, floor) for v in low] if panel["log_y"] else low, high, color=colour, alpha=_band(panel), linewidth=0)


def _band(panel: dict[str, Any]) -> float:
    """How dark a band is: where many lie upon each other the curves must still be seen."""
    return 0.16 if len(panel["series"]) <= 5 else 0.07


def _label(name: str) -> str:
    return WORDS.get(name, name.replace("_", " "))
