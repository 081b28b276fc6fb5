"""The plots of the report as inline SVG that follows the page: its font, and its light or dark text colour."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from itertools import groupby

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from pocketune.memory import MemoryRow
from pocketune.sampling.choices import Asked as MixAsked
from pocketune.sampling.choices import Choice, zeroth_order_probability

ACCENT = "#6d6af0"
ZEROTH_ORDER = "#eda035"
PHASE_COLOURS = {
    "start": "#8b93a1",
    "photos": "#4f9cf0",
    "text": "#2bb3a3",
    "class images": "#c66bd6",
    "latents": "#8fae3d",
    "features": "#eda035",
    "training": "#6d6af0",
    "samples": "#e5637f",
}
_OTHER_COLOURS = ("#4f9cf0", "#2bb3a3", "#eda035", "#c66bd6", "#8fae3d", "#e5637f")
_INK = "#010203"  # stands for the page's text colour until the SVG is written
_MAX_POINTS = 600


def phase_colour(phase: str) -> str:
    """The colour of a phase, in the plot and in the table beside it."""
    return PHASE_COLOURS.get(phase) or _OTHER_COLOURS[sum(phase.encode()) % len(_OTHER_COLOURS)]


def loss_plot(losses: Sequence[float]) -> str:
    """Loss by step, raw and smoothed, as SVG."""
    figure, axes = _canvas()
    steps = np.arange(1, len(losses) + 1)
    marker = "o" if len(losses) == 1 else None
    axes.plot(steps, losses, color=ACCENT, alpha=0.3, linewidth=0.9, marker=marker)
    axes.plot(steps, smooth(losses), color=ACCENT, linewidth=2.0)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_ylim(bottom=0.0)
    return _svg(figure, name="loss")


def choices_plot(choices: Sequence[Choice], recipe: MixAsked) -> str:
    """The noise of each step of a mixed training, coloured by its kind, as SVG; lines show the probability of zeroth order."""
    figure, axes = _canvas()
    for zeroth_order, colour in ((False, ACCENT), (True, ZEROTH_ORDER)):
        steps = [step for step, choice in enumerate(choices, 1) if choice.zeroth_order is zeroth_order]
        axes.plot(steps, [choices[step - 1].noise for step in steps], ".", color=colour, markersize=3.0, alpha=0.75)
    progress, noise = np.linspace(0, 1, 41), np.linspace(0, 1, 41)
    table = [[zeroth_order_probability(recipe, noise=t, progress=u) for u in progress] for t in noise]
    levels = [share * recipe.mix_largest for share in (0.1, 0.5, 0.9)]
    if recipe.mix_largest > 0:
        axes.contour(
            1 + progress * max(len(choices) - 1, 1), noise, table, levels=levels, colors=_INK, alpha=0.45, linewidths=0.9
        )
    axes.set_xlabel("step")
    axes.set_ylabel("noise, t / T")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_ylim(0.0, 1.0)
    return _svg(figure, name="choices")


def memory_plot(rows: Sequence[MemoryRow]) -> str:
    """Resident memory by time as SVG; the darker part is anonymous, and each phase has its colour."""
    figure, axes = _canvas()
    thinned = thin(rows)
    for phase, group in groupby(range(len(thinned)), key=lambda index: thinned[index].phase):
        indices = list(group)
        part = thinned[indices[0] : indices[-1] + 2]  # up to the first row of the next phase, so that no gap shows
        seconds = [row.seconds for row in part]
        for values, alpha in (([r.rss_bytes for r in part], 0.35), ([r.anonymous_bytes for r in part], 0.6)):
            axes.fill_between(seconds, np.asarray(values) / 1e6, color=phase_colour(phase), alpha=alpha, linewidth=0)
    axes.set_xlabel("seconds")
    axes.set_ylabel("memory, MB")
    axes.set_ylim(bottom=0.0)
    return _svg(figure, name="memory")


def distance_plot(first: Sequence[Sequence[float]], last: Sequence[Sequence[float]]) -> str:
    """Distance by the number of masked blocks as SVG: the first ones and the last ones, each model pale, their means strong."""
    figure, axes = _canvas()
    for sides, colour, name in ((first, ACCENT, "first blocks"), (last, PHASE_COLOURS["features"], "last blocks")):
        for values in sides:
            axes.plot(range(len(values)), values, color=colour, alpha=0.25, linewidth=0.9)
        axes.plot(range(len(sides[0])), np.mean(np.asarray(sides), axis=0), color=colour, linewidth=2.0, label=name)
    axes.set_xlabel("blocks masked")
    axes.set_ylabel("distance")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_ylim(bottom=0.0)
    axes.legend(frameon=False, labelcolor=_INK)
    return _svg(figure, name="distance")


def smooth(values: Sequence[float]) -> NDArray[np.float64]:
    """Exponential mean over a twentieth of the values but at least five, corrected for its start at zero; shape (values,)."""
    decay = 1.0 - 1.0 / max(5, len(values) // 20)
    smoothed = np.zeros(len(values))
    total = weight = 0.0
    for index, value in enumerate(values):
        total = decay * total + (1.0 - decay) * value
        weight = decay * weight + (1.0 - decay)
        smoothed[index] = total / weight
    return smoothed


def thin(rows: Sequence[MemoryRow]) -> list[MemoryRow]:
    """Keep the highest row of each of at most `_MAX_POINTS` groups of neighbours, so that no peak is lost."""
    stride = -(-len(rows) // _MAX_POINTS) or 1
    return [max(rows[start : start + stride], key=lambda row: row.rss_bytes) for start in range(0, len(rows), stride)]


def _canvas() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, 2.9), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_alpha(0.35)
    for spine in axes.spines.values():
        spine.set_color(_INK)
    axes.tick_params(colors=_INK, length=0, labelsize=11)
    axes.xaxis.label.set(color=_INK, fontsize=11)
    axes.yaxis.label.set(color=_INK, fontsize=11)
    axes.grid(axis="y", color=_INK, alpha=0.1, linewidth=0.8)
    axes.margins(x=0.02)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure, *, name: str) -> str:
    """The `<svg>` element alone, without metadata and namespaces, which HTML does not need; `name` makes its ids unique."""
    figure.patch.set_alpha(0.0)
    figure.axes[0].patch.set_alpha(0.0)
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text[text.index("<svg") :])
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{name}-", text)
    return text.replace(_INK, "currentColor").strip()
