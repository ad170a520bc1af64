"""Hyperparameters: all at once, which of them mattered, and each against the score."""

from __future__ import annotations

from collections.abc import Sequence

from sft_ray.analysis.importance import RELIABLE_FROM, is_reliable
from sft_ray.analysis.report import charts, facts
from sft_ray.analysis.report.axes import WordAxis, axis_of, number_axis, within
from sft_ray.analysis.report.blocks import Block, Cell, Drawing, Grid, Shade, Table, Text
from sft_ray.analysis.report.charts import Frame, Mark, Strand
from sft_ray.analysis.report.looks import LAYERS, MANY, Looks
from sft_ray.analysis.report.run import Run, Trial
from sft_ray.analysis.report.words import short_name, told
from sft_ray.space import FROZEN_LAYERS

MOST_SHOWN = 10  # hyperparameters
SPREAD = 26  # pixels; dots of one value lie side by side where there are many
GOLDEN = 0.618034  # its multiples fill the room evenly
RADIUS = {"winner": 6.0, "pruned": 3.0}
MEASURES = {"finished": "final score", "first_rung": "score at the first rung"}


def hyperparameters(run: Run) -> list[Block]:
    """All settings at once, which of them mattered, and each against the score."""
    blocks: list[Block] = []
    scored = [trial for trial in run.trials if trial.value is not None]
    varied = facts.parameters(scored)
    if len(scored) < 2 or not varied:
        return blocks
    judged = facts.importance(run)
    weights = {one.name: one.share for measure in judged.values() for one in measure.parameters}
    if left_out := max(len(varied) - MOST_SHOWN, 0):
        varied = sorted(varied, key=lambda p: -weights.get(p.name, 0.0))[:MOST_SHOWN]
        words = f"The {MOST_SHOWN} most important of them are shown; {left_out} are left out."
        blocks.append(Text(words, "note"))
    looks = Looks.of(run)
    blocks.append(looks.legend(scored))
    blocks.append(_parallel(run, scored, varied, looks))
    blocks.append(Grid([_importance(measure, judged[measure]) for measure in judged]))
    slices = [_slice(run, scored, parameter, looks) for parameter in varied]
    blocks.append(Grid([*_frozen_depth(run, scored, looks), *filter(None, slices)]))
    return blocks


def _parallel(
    run: Run,
    scored: Sequence[Trial],
    varied: Sequence[facts.Parameter],
    looks: Looks,
) -> Drawing:
    values = [(parameter, [*parameter.values.values()]) for parameter in varied]
    axes = [(p, axis) for p, of_p in values if (axis := axis_of(short_name(p.name), of_p))]
    last = number_axis(run.metric, [trial.value or 0.0 for trial in scored])
    shown = looks.lines(scored)
    many = " many" if len(shown) > MANY else ""
    strands = []
    for trial in shown:
        places = [
            within(axis, parameter.values[trial.number])
            if trial.number in parameter.values
            else None
            for parameter, axis in axes
        ]
        words = "" if many else told(trial, run.metric)
        style = f"strand {looks.style(trial)}{many}"
        strands.append(Strand([*places, within(last, trial.value)], style, words))
    svg = charts.parallel([*(axis for _, axis in axes), last], strands, "Parallel coordinates")
    caption = "All settings of every trial, and its score on the right"
    left_out = len(shown) < len(scored)
    note = f"{len(shown):,} of {len(scored):,} trials are drawn." if left_out else ""
    return Drawing(svg, caption=caption, note=note, wide=True)


def _importance(measure: str, judged: facts.Judged) -> Block:
    what = MEASURES.get(measure, measure)
    if not judged.parameters:
        words = f"Importance for the {what}: too few trials to tell, n = {judged.trials}."
        return Text(words, "note")
    most = max((one.share for one in judged.parameters), default=1.0) or 1.0
    rows: list[list[Cell]] = [
        [
            short_name(one.name),
            Shade(f"{one.share:.2f}", one.share / most, is_bar=True),
            str(one.trials),
        ]
        for one in judged.parameters
    ]
    note = f"Share of the variance of the {what} (fANOVA)."
    if not judged.is_reliable:
        note += f" Unreliable: n = {judged.trials}, under {RELIABLE_FROM} trials."
    elif not all(is_reliable(one.trials) for one in judged.parameters):
        note += f" Unreliable where n is under {RELIABLE_FROM}."
    caption = f"Importance for the {what}, n = {judged.trials}"
    return Table(["hyperparameter", "importance", "n"], rows, caption=caption, note=note)


def _slice(
    run: Run,
    scored: Sequence[Trial],
    parameter: facts.Parameter,
    looks: Looks,
) -> Drawing | None:
    """Score against one hyperparameter."""
    values = {t.number: t.value for t in scored if t.value is not None}
    return _cloud(run, scored, parameter, values, run.metric, looks)


def _frozen_depth(run: Run, scored: Sequence[Trial], looks: Looks) -> list[Block]:
    """Time against the frozen depth; its score is among the slices."""
    depth = {t.number: v for t in scored if (v := t.params.get(FROZEN_LAYERS)) is not None}
    seconds = {
        t.number: 1000 / t.examples_per_second
        for t in scored
        if t.examples_per_second and t.number in depth
    }
    if len(set(map(str, depth.values()))) < 2 or not seconds:
        return []
    parameter = facts.Parameter(FROZEN_LAYERS, depth)
    label = "seconds per 1,000 examples"
    found = _cloud(run, scored, parameter, seconds, label, looks)
    return [] if found is None else [found]


def _cloud(
    run: Run,
    scored: Sequence[Trial],
    parameter: facts.Parameter,
    values: dict[int, float],
    label: str,
    looks: Looks,
) -> Drawing | None:
    """Some value of every trial against a hyperparameter; unfinished trials behind."""
    name = short_name(parameter.name)
    x = axis_of(name, [*parameter.values.values()])
    shown = [t for t in scored if t.number in parameter.values and t.number in values]
    if x is None or not shown:
        return None
    frame = Frame(x, number_axis(label, [values[trial.number] for trial in shown]))
    is_crowded = len(shown) > MANY and (isinstance(x, WordAxis) or bool(x.marked))
    marks: dict[str, list[Mark]] = {}
    for trial in shown:
        shift = SPREAD * (trial.number * GOLDEN % 1 - 0.5) if is_crowded else 0.0
        value, words = parameter.values[trial.number], told(trial, run.metric)
        mark = Mark(value, values[trial.number], words, shift)
        marks.setdefault(looks.style(trial), []).append(mark)
    drawn = [charts.dots(frame, marks[s], s, RADIUS.get(s, 4.0)) for s in LAYERS if s in marks]
    title = f"{name}: {label}"
    note = "Trials of one value are spread sideways." if is_crowded else ""
    return Drawing(frame.draw(*drawn, title=title), caption=title, note=note)
