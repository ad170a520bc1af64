"""Pictures of tables that were computed elsewhere; matplotlib without its global state."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.transforms import offset_copy

from sft_ray.analysis.ablation import COST_HEADINGS, ArmSummary
from sft_ray.analysis.report.axes import LOG_FROM

DOTS_PER_INCH = 150  # of the PNG
# From Okabe and Ito 2008: told apart with any colour vision.
BLUE, GREY = "#0072B2", "#767676"
LABEL_WIDTH = 40
PER_INCH, WIDE_PER_INCH = 9, 6  # letters of a title; Chinese ones are wider
ROW_INCHES, LINE_INCHES = 0.36, 0.18
FEWEST_FOR_A_LINE = 2
CLOSEST_TICKS, MARGIN = 0.05, 0.05  # share of the axis
BESIDE_POINTS = 8  # seeds stand beside the mean, not under its bar
SEED_SIZE, SEED_ALPHA = 11, 0.45
# Latin letters from the first, Chinese, Japanese and Korean ones from whichever is installed.
FONTS = (
    "DejaVu Sans",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "SimHei",
    "Arial Unicode MS",
)


def draw_ablation(
    summaries: Sequence[ArmSummary],
    *,
    metric: str,
    title: str,
    costs: Sequence[str] = (),
    base_values: Mapping[str, Any] | None = None,
) -> Figure:
    """Score with its intervals per arm, and one panel for each of `costs` (see `COST_HEADINGS`).

    Arms that differ in one number only are a line over it, with the base as a band; all others
    are rows.

    Args:
        base_values: dotted path -> value of the base, which puts it on the line too.
    """
    line = _over_one_number(summaries, base_values or {})
    with _style():
        if line is None:
            return _draw_rows(summaries, metric, title, costs)
        path, arms = line
        return _draw_line(summaries, path, arms, metric, title, costs)


def save_figure(figure: Figure, folder: Path, stem: str) -> list[Path]:
    """`<stem>.svg` and `<stem>.png`; the same figure gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    vector, pixels = folder / f"{stem}.svg", folder / f"{stem}.png"
    with _style():  # ticks take their font when they are drawn
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # each further pass would shift the last digits
        figure.savefig(vector, format="svg", metadata={"Date": None})
        figure.savefig(pixels, format="png", dpi=DOTS_PER_INCH)
    return [vector, pixels]


@contextmanager
def _style() -> Iterator[None]:
    installed = set(fontManager.get_font_names())
    settings: Any = {  # newer matplotlib types the names of settings, older does not
        "font.family": [font for font in FONTS if font in installed],
        "font.size": 10,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": GREY,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.formatter.useoffset": False,
        "grid.color": "#E6E6E6",
        "legend.frameon": False,
        "text.parse_math": False,  # a label may hold a dollar sign
        "svg.fonttype": "none",  # text stays text: found, copied, any script
        "svg.hashsalt": "sft_ray",
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # No installed font has the sign: the SVG still does, for the reader's fonts.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)
        yield


def _over_one_number(
    summaries: Sequence[ArmSummary], base_values: Mapping[str, Any]
) -> tuple[str, list[tuple[float, ArmSummary]]] | None:
    """The one path that all arms but the base change, and the arms by its value."""
    others = [summary for summary in summaries if not summary.is_base]
    paths = {tuple(summary.arm.changes) for summary in others}
    if len(others) < FEWEST_FOR_A_LINE or len(paths) > 1 or len(next(iter(paths))) != 1:
        return None
    [[path]] = paths
    arms = [(summary.arm.changes[path], summary) for summary in others]
    if not all(_is_number(value) for value, _ in arms):
        return None
    if _is_number(base_values.get(path)):
        arms += [(base_values[path], summary) for summary in summaries if summary.is_base]
    return path, sorted(arms, key=lambda arm: arm[0])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _draw_rows(
    summaries: Sequence[ArmSummary], metric: str, title: str, costs: Sequence[str]
) -> Figure:
    labels = [_wrapped(summary.arm.label) for summary in summaries]
    lines = [1 + label.count("\n") for label in labels]
    closest = max((LINE_INCHES * (1 + (a + b) / 2) for a, b in pairwise(lines)), default=0.0)
    height = 1.5 + max(ROW_INCHES, closest) * max(len(labels), 2)
    width = 7.4 + 2.2 * len(costs)
    figure, (panel, *cost_panels) = _panels(
        width, height, title, 1, 1 + len(costs), width_ratios=[2.2] + [1] * len(costs)
    )
    rows = range(len(summaries))
    for row, summary in zip(rows, summaries, strict=True):
        colour = GREY if summary.is_base else BLUE
        if summary.score is None:
            panel.annotate(
                "no run finished",
                (0.02, row),
                xycoords=("axes fraction", "data"),
                va="center",
                color=GREY,
            )
            continue
        _mark(panel, summary, row, colour, across=True)
    for summary in summaries:
        if summary.is_base and summary.score:
            panel.axvline(summary.score.mean, color=GREY, linewidth=1, zorder=1)
            if summary.score.low is not None and summary.score.high is not None:
                panel.axvspan(summary.score.low, summary.score.high, color=GREY, alpha=0.15, lw=0)
    panel.set_xlabel(metric)
    panel.locator_params(axis="x", nbins=6)
    panel.set_yticks(rows, labels)
    panel.set_ylim(len(summaries) - 0.4, -0.6)  # the first arm on top
    _legend(figure, panel)
    for cost, cost_panel in zip(costs, cost_panels, strict=True):
        heading, unit = COST_HEADINGS[cost]
        for row, summary in zip(rows, summaries, strict=True):
            value = getattr(summary, cost)
            if value is not None:
                colour = GREY if summary.is_base else BLUE
                cost_panel.barh(row, value / unit, height=0.5, color=colour, alpha=0.75)
        cost_panel.set_xlabel(heading)
        cost_panel.set_yticks(rows, [""] * len(summaries))
        cost_panel.set_ylim(panel.get_ylim())
        cost_panel.set_xlim(left=0)
    for axes in (panel, *cost_panels):
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
    return figure


def _draw_line(
    summaries: Sequence[ArmSummary],
    path: str,
    arms: Sequence[tuple[float, ArmSummary]],
    metric: str,
    title: str,
    costs: Sequence[str],
) -> Figure:
    figure, (panel, *cost_panels) = _panels(
        7.0, 4.2 + 1.8 * len(costs), title, 1 + len(costs), 1, height_ratios=[2] + [1] * len(costs)
    )
    for axes in (panel, *cost_panels):
        _number_axis(axes, [value for value, _ in arms])
        axes.tick_params(labelbottom=axes is [panel, *cost_panels][-1])
    base = next((summary for summary in summaries if summary.is_base), None)
    scored = [(value, summary) for value, summary in arms if summary.score]
    for value, summary in scored:
        _mark(panel, summary, value, BLUE, across=False)
    panel.plot(
        [value for value, _ in scored],
        [summary.score.mean for _, summary in scored if summary.score],
        color=BLUE,
        linewidth=1.5,
    )
    for value, summary in arms:
        if not summary.score:
            panel.annotate(
                "no run finished",
                (value, 0.02),
                xycoords=("data", "axes fraction"),
                rotation=90,
                ha="center",
                color=GREY,
            )
    if base and base.score:
        panel.axhline(base.score.mean, color=GREY, linewidth=1)
        if base.score.low is not None and base.score.high is not None:
            panel.axhspan(base.score.low, base.score.high, color=GREY, alpha=0.15, lw=0)
    panel.set_ylabel(metric)
    _legend(figure, panel)
    for cost, cost_panel in zip(costs, cost_panels, strict=True):
        heading, unit = COST_HEADINGS[cost]
        known = [(value, summary) for value, summary in arms if getattr(summary, cost) is not None]
        cost_panel.plot(
            [value for value, _ in known],
            [getattr(summary, cost) / unit for _, summary in known],
            color=BLUE,
            marker="o",
            linewidth=1.5,
        )
        if base and getattr(base, cost) is not None:
            cost_panel.axhline(getattr(base, cost) / unit, color=GREY, linewidth=1)
        cost_panel.set_ylabel(heading.replace(" (", "\n("))
        cost_panel.set_ylim(bottom=0)
    for axes in (panel, *cost_panels):
        axes.grid(visible=False, axis="x")
    [panel, *cost_panels][-1].set_xlabel(path.removeprefix("train."))
    return figure


def _panels(
    width: float, height: float, title: str, rows: int, columns: int, **ratios: Any
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.09))
    FigureCanvasAgg(figure)
    # The layout makes room for a title's lines, not for its length.
    letters = int(width * (PER_INCH if title.isascii() else WIDE_PER_INCH))
    wrapped = "\n".join(textwrap.wrap(title, letters))
    figure.suptitle(wrapped, x=0.01, ha="left", fontsize=12)
    panels = figure.subplots(rows, columns, squeeze=False, **ratios)
    return figure, list(panels.flat)


def _wrapped(label: str) -> str:
    """Breaks between changes rather than within one."""
    changes = [change.replace(" ", "\N{NO-BREAK SPACE}") for change in label.split(", ")]
    lines = textwrap.wrap(", ".join(changes), LABEL_WIDTH, break_on_hyphens=False)
    return "\n".join(lines).replace("\N{NO-BREAK SPACE}", " ")


def _mark(panel: Axes, summary: ArmSummary, place: float, colour: str, *, across: bool) -> None:
    """Mean, interval if there is more than one run, and the runs; `across`: along the x axis."""
    score = summary.score
    assert score
    reach = None
    if score.low is not None and score.high is not None:
        reach = [[score.mean - score.low], [score.high - score.mean]]
    panel.errorbar(
        [score.mean] if across else [place],
        [place] if across else [score.mean],
        xerr=reach if across else None,
        yerr=None if across else reach,
        fmt="o",
        color=colour,
        markerfacecolor=colour if summary.is_told_apart or summary.is_base else "white",
        markersize=6,
        elinewidth=1.6,
        capsize=3,
        zorder=3,
    )
    seeds = list(summary.values.values())
    places = [place] * len(seeds)
    x, y = (seeds, places) if across else (places, seeds)
    beside = {"y": -BESIDE_POINTS} if across else {"x": BESIDE_POINTS}
    shifted = offset_copy(panel.transData, panel.get_figure(root=True), units="points", **beside)
    panel.scatter(
        x, y, s=SEED_SIZE, color=colour, alpha=SEED_ALPHA, linewidths=0, transform=shifted
    )
    panel.update_datalim(list(zip(x, y, strict=True)))  # a shifted series does not do so itself


def _legend(figure: Figure, panel: Axes) -> None:
    """From empty series, so that it says the same whatever finished."""
    panel.errorbar(
        [],
        [],
        xerr=[],
        fmt="o",
        color=BLUE,
        label="mean, 95 % interval (filled: differs from base)",
    )
    panel.scatter([], [], s=SEED_SIZE, color=BLUE, alpha=SEED_ALPHA, linewidths=0, label="one seed")
    panel.fill_between([], [], color=GREY, alpha=0.3, linewidth=0, label="base and its interval")
    figure.legend(loc="outside lower left", ncols=3, fontsize=9)


def _number_axis(axes: Axes, values: Sequence[float]) -> None:
    """A tick at every value that was tried, unless they crowd; logarithmic over a wide span."""
    positive = [value for value in values if value > 0]
    if positive and min(values) >= 0 and max(positive) > LOG_FROM * min(positive):
        if min(values) > 0:
            axes.set_xscale("log")
        else:  # zero stands one decade left of the smallest
            axes.set_xscale("symlog", linthresh=min(positive))
    ticks = sorted(set(values))
    scale = axes.transScale
    places = [float(scale.transform((value, 1.0))[0]) for value in ticks]
    span = (places[-1] - places[0]) or 1.0
    edges = places[0] - MARGIN * span, places[-1] + MARGIN * span
    axes.set_xlim(*(float(scale.inverted().transform((edge, 1.0))[0]) for edge in edges))
    if all(right - left >= CLOSEST_TICKS * span for left, right in pairwise(places)):
        axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
        axes.set_xticks([], minor=True)
