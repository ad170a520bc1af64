"""The course of the search: its progress, every trial's curve, its Pareto set, its trials."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from sft_ray.analysis import ablation_tables
from sft_ray.analysis.ablation import COST_HEADINGS
from sft_ray.analysis.report import charts, facts
from sft_ray.analysis.report.axes import NumberAxis, number_axis
from sft_ray.analysis.report.blocks import Block, Drawing, Grid, Legend, Table, Text
from sft_ray.analysis.report.charts import Frame, Mark
from sft_ray.analysis.report.looks import MANY, STATE_STYLE, Looks, state_legend
from sft_ray.analysis.report.run import Run
from sft_ray.analysis.report.words import figure, time_unit, told
from sft_ray.screen import count, short_params

MOST_TRIALS = 50  # rows of the table of trials
CURVES = (960, 340)  # width and height


def progress(run: Run) -> list[Block]:
    """The best score so far, over time and over cost."""
    blocks: list[Block] = []
    steps = [step for step in facts.progress(run) if step.value is not None]
    if len(steps) < 2 or not any(step.best is not None for step in steps):
        return blocks
    y = number_axis(run.metric, [step.value for step in steps if step.value is not None])
    panels: list[Block] = []
    if all(step.seconds is not None for step in steps):
        seconds = [step.seconds or 0.0 for step in steps]
        panels.append(_best_so_far(steps, seconds, y, "since the first trial", "over time"))
    spent = [step.worker_seconds for step in steps]
    panels.append(_best_so_far(steps, spent, y, "of all workers", "over cost"))
    blocks.append(state_legend(STATE_STYLE[step.state] for step in steps))
    blocks.append(Grid(panels))
    return blocks


def curves(run: Run) -> list[Block]:
    """Every trial's score by percent of its own schedule, and what the rungs did."""
    blocks: list[Block] = []
    drawn = [trial for trial in run.trials if trial.curve]
    if not drawn:
        return blocks
    looks = Looks.of(run)
    y = number_axis(run.metric, [score for trial in drawn for _, score in trial.curve])
    frame = Frame(NumberAxis("percent of the trial's own schedule", 0, 101), y, *CURVES)
    shown = looks.lines(drawn)
    many = " many" if len(shown) > MANY else ""
    lines = [
        charts.line(
            frame,
            trial.curve,
            f"curve {looks.style(trial)}{many}",
            "" if many else told(trial, run.metric),
        )
        for trial in shown
    ]
    best = [trial for trial in drawn if trial.number == looks.winner]
    marks = [Mark(p, s, f"{p:g} %: {s:.4f}") for trial in best for p, s in trial.curve]
    dots = charts.dots(frame, marks, "winner", 3.5)
    rungs = facts.rungs(run)
    title = "Score by percent of the schedule"
    svg = frame.draw(*lines, dots, title=title, verticals=[rung.percent for rung in rungs])
    beyond = sum(not 0 <= y.place(score) <= 1 for t in drawn for _, score in t.curve)
    notes = [f"{count(beyond, 'score')} far off the others lie outside."] if beyond else []
    if len(shown) < len(drawn):
        notes.append(f"{len(shown):,} of {len(drawn):,} trials are drawn.")
    blocks.append(looks.legend(drawn))
    drawing = Drawing(svg, note=" ".join(notes), wide=True)
    if not rungs:
        blocks.append(drawing)
        return blocks
    rows = [[f"{rung.percent} %", str(rung.reached), str(rung.stopped)] for rung in rungs]
    head = ["rung", "trials that reached it", "stopped there"]
    note = "Dashed lines: rungs, at which a trial goes on only if it is among the best so far."
    blocks += [drawing, Table(head, rows, note=note)]
    return blocks


def pareto(run: Run) -> list[Block]:
    """What every saving costs, in a search with several objectives."""
    blocks: list[Block] = []
    rows = facts.pareto(run)
    if not rows:
        return blocks
    members = {row["trial"] for row in rows}
    panels = []
    for cost in run.costs:
        heading, unit = COST_HEADINGS[cost]
        shown = [
            (trial, (trial.costs[cost] or 0.0) / unit, trial.value or 0.0)
            for trial in run.trials
            if trial.is_complete
        ]
        if not shown:
            continue
        x = number_axis(heading, [value for _, value, _ in shown])
        frame = Frame(x, number_axis(run.metric, [score for _, _, score in shown]))
        marks = {
            style: [
                Mark(value, score, told(trial, run.metric))
                for trial, value, score in shown
                if (trial.number in members) is (style == "winner")
            ]
            for style in ("complete faint", "winner")
        }
        drawn = [charts.dots(frame, of_style, style) for style, of_style in marks.items()]
        panels.append(Drawing(frame.draw(*drawn, title=f"{run.metric} against {heading}")))
    headings = (COST_HEADINGS[cost][0] for cost in run.costs)
    head = ["trial", run.metric, *headings, "settings"]
    settings = {trial.number: short_params(trial.params) for trial in run.trials}
    table = [
        [
            str(row["trial"]),
            f"{row['score']:.4f}",
            *(ablation_tables.shown(row[cost] / COST_HEADINGS[cost][1]) for cost in run.costs),
            settings.get(row["trial"], ""),
        ]
        for row in rows
    ]
    words, last = (
        "None is better than these in every objective at once.",
        frozenset({len(head) - 1}),
    )
    blocks += [
        Text(words),
        Legend({"winner": "in the Pareto set", "complete": "other COMPLETE trials"}),
        Grid(panels),
        Table(head, table, words=last, long=last),
    ]
    return blocks


def trials(run: Run) -> list[Block]:
    """The best of them in a table, and where the rest is."""
    blocks: list[Block] = []
    ordered = facts.best_first(run)
    if len(ordered) < 2:
        return blocks
    winner = run.winner.number if run.winner else None
    shown = ordered[:MOST_TRIALS]
    rows = [
        [
            str(trial.number),
            trial.state,
            trial.role,
            figure(trial.value),
            f"{trial.schedule_percent:g}",
            f"{trial.slot_seconds:,.1f}",
            short_params(trial.params),
        ]
        for trial in shown
    ]
    marked = frozenset(i for i, trial in enumerate(shown) if trial.number == winner)
    head = ["trial", "state", "role", run.metric, "percent", "seconds", "settings"]
    note = "COMPLETE trials by score; then the others by how far they got. Bold: the winner."
    if left_out := len(ordered) - len(shown):
        note += f" {count(left_out, 'more trial')} stand in the file that this writes: sft-ray "
        note += f"results {shlex.quote(run.store.location)} --out trials.csv"
    last = len(head) - 1
    words, long = frozenset({1, 2, last}), frozenset({last})
    blocks.append(Table(head, rows, words, long, marked, note=note))
    return blocks


def _best_so_far(
    steps: Sequence[facts.Step], places: Sequence[float], y: NumberAxis, what: str, how: str
) -> Drawing:
    divisor, unit = time_unit(max(places))
    x = number_axis(f"{unit} {what}", [place / divisor for place in places], from_zero=True)
    frame = Frame(x, y)
    marks: dict[str, list[Mark]] = {}
    corners: list[tuple[float, float]] = []
    for step, place in zip(steps, places, strict=True):
        words = f"trial {step.trial}: {step.value:.4f}, {step.state}"
        mark = Mark(place / divisor, step.value or 0.0, words)
        marks.setdefault(STATE_STYLE[step.state], []).append(mark)
        if step.best is not None and (not corners or step.best != corners[-1][1]):
            corners.append((place / divisor, step.best))
    drawn = [charts.dots(frame, marks[s], s, 3.5) for s in sorted(marks, reverse=True)]
    best = charts.stairs(frame, corners, x.high, "best", "best COMPLETE trial so far")
    title = f"Best {y.label} so far {how}"
    return Drawing(frame.draw(best, *drawn, title=title), caption=title)
