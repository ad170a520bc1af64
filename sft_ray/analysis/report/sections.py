"""From plain values to the blocks of a page, one function per section."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any

from sft_ray.analysis import ablation
from sft_ray.analysis.importance import RELIABLE_FROM
from sft_ray.analysis.report import charts, search
from sft_ray.analysis.report.answers import MATRIX_UP_TO, Answers, ClassScore, answers
from sft_ray.analysis.report.axes import NumberAxis, axis_of, number_axis
from sft_ray.analysis.report.blocks import (
    Block,
    Cell,
    Code,
    Drawing,
    Fold,
    Grid,
    Legend,
    Section,
    Shade,
    Table,
    Text,
    Tile,
    Tiles,
)
from sft_ray.analysis.report.charts import Frame, Mark, Strand, Whisker
from sft_ray.analysis.report.run import Run, Trial, reading
from sft_ray.recipes import YARDSTICK
from sft_ray.run_store import CONFIRMATION, ERROR_LOG, EXPERIMENT, RESULTS
from sft_ray.screen import count, duration, short_params

MOST_TRIALS = 50  # rows of the table of trials
MOST_AXES = 10  # of parallel coordinates, and slices
MOST_CLASSES = 25  # rows before the rest is folded away
MOST_CAUSES = 30
MOST_LETTERS = 300  # of an example's text
LOG_LETTERS = 6000  # of the end of errors.log
STATE_STYLE = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "fail", "RUNNING": "running"}
STATE_WORDS = {
    "complete": "COMPLETE",
    "pruned": "PRUNED: stopped early",
    "fail": "FAIL",
    "running": "running",
}


def outcome(run: Run, price: float | None) -> Section:
    """What came out, and how sure that is."""
    section = Section("outcome", "Outcome")
    found = search.outcome(run)
    spent = sum(part.seconds for part in search.spending(run))
    if run.unfinished:
        section.blocks.append(Text(f"No result yet. {run.unfinished}", "warning"))
    if found is None:
        ended = "No trial has reached the end of its schedule"
        causes = ", and every one failed" if _all_failed(run.trials) else ""
        section.blocks.append(Text(f"{ended}{causes}.", "warning"))
        section.blocks.append(Tiles(_cost_tiles(run, spent, price)))
        return section
    tiles = [_score_tile(run, found)]
    if found.gain is not None and found.params != _default_params(run):
        interval = _interval(found.gain_low, found.gain_high, "+.4f")
        note = f"{run.metric} over the default recipe"
        tiles.append(Tile("gain", f"{found.gain:+.4f}", f"{note}{interval}"))
    if found.test:
        tested = found.test["metrics"].get(run.metric)
        if tested is not None:
            note = f"{found.test['num_examples']} examples, scored once"
            tiles.append(Tile("test split", f"{tested:.4f}", note))
    section.blocks.append(Tiles([*tiles, *_cost_tiles(run, spent, price)]))
    section.blocks += [*map(Text, how_sure(run, found))]
    section.blocks.append(Grid([_settings_table(run, found), _metrics_table(found)]))
    return section


def how_sure(run: Run, found: search.Outcome) -> list[str]:
    """In words: what the figure is of, and what to do to know better."""
    metric, expected = run.metric, found.expected
    if not found.is_complete:
        return [
            "No trial reached the end of its schedule: the winner is the one that came furthest, "
            "and would likely have scored otherwise at its end."
        ]
    if expected is None:
        value = found.search_value
        shown = "" if value is None else f" {metric} {value:.4f}"
        if not run.is_search:
            return [
                f"How sure: one training with one seed reached{shown} on the validation split. "
                "Another seed would give another score; nothing here says how far off."
            ]
        trials = count(len(run.trials), "trial")
        return [
            f"How sure:{shown} is one score with one seed, the best of {trials} on the same "
            "validation split. The best of many noisy scores flatters. For a mean with an "
            f"interval over fresh seeds: sft-ray confirm {shlex.quote(run.store.location)}"
        ]
    parts = [
        f"How sure: over {expected['n']} fresh seeds the configuration reaches {metric} "
        f"{expected['mean']:.4f} on average{_interval(expected['low'], expected['high'])}."
    ]
    if found.flattered is not None and found.search_value is not None:
        kind = "flattered by" if found.flattered >= 0 else "was too low by"
        parts.append(
            f"The search had scored it {found.search_value:.4f}: it {kind} "
            f"{abs(found.flattered):.4f}."
        )
    if found.gain is not None and found.gain_low is not None:
        is_clear = found.gain_low > 0
        words = "lies above zero" if is_clear else "includes zero: the gain may be chance"
        parts.append(f"The interval of the gain over the default recipe {words}.")
    if found.test is None:
        parts.append("No test split was scored.")
    return [" ".join(parts)]


def progress(run: Run) -> Section:
    """The best score so far, over time and over cost."""
    section = Section("progress", "Progress")
    steps = [step for step in search.progress(run) if step.value is not None]
    if len(steps) < 2 or not any(step.best is not None for step in steps):
        return section
    y = number_axis(run.metric, [step.value for step in steps if step.value is not None])
    panels: list[Block] = []
    if all(step.seconds is not None for step in steps):
        seconds = [step.seconds or 0.0 for step in steps]
        panels.append(_best_so_far(steps, seconds, y, "since the first trial", "over time"))
    spent = [step.worker_seconds for step in steps]
    panels.append(_best_so_far(steps, spent, y, "of all workers", "over cost"))
    styles = dict.fromkeys(STATE_STYLE[step.state] for step in steps)
    section.blocks.append(Legend({style: STATE_WORDS[style] for style in styles}))
    section.blocks.append(Grid(panels))
    return section


def curves(run: Run) -> Section:
    """Every trial's score by percent of its own schedule, and what the rungs did."""
    section = Section("curves", "Learning curves")
    drawn = [trial for trial in run.trials if trial.curve]
    if not drawn:
        return section
    winner = run.winner.number if run.winner else None
    y = number_axis(run.metric, [score for trial in drawn for _, score in trial.curve])
    x = NumberAxis("percent of the trial's own schedule", 0, 101)
    frame = Frame(x, y, 640, 360)
    many = " many" if len(drawn) > 100 else ""

    def layer(trial: Trial) -> tuple[bool, bool, int]:
        return trial.number == winner, trial.is_complete, trial.number

    lines = [
        charts.line(
            frame,
            trial.curve,
            "curve winner" if trial.number == winner else f"curve {_style(trial)}{many}",
            _told(trial, run.metric),
        )
        for trial in sorted(drawn, key=layer)
    ]
    best = [trial for trial in drawn if trial.number == winner]
    marks = [Mark(p, s, f"{p:g} %: {s:.4f}") for trial in best for p, s in trial.curve]
    dots = charts.dots(frame, marks, "winner", 3.5)
    rungs = search.rungs(run)
    title = "Score by percent of the schedule"
    svg = frame.draw(*lines, dots, title=title, verticals=[rung.percent for rung in rungs])
    beyond = sum(not 0 <= y.place(score) <= 1 for t in drawn for _, score in t.curve)
    note = f"{count(beyond, 'score')} far off the others lie outside the picture." if beyond else ""
    styles = dict.fromkeys(_style(trial) for trial in drawn if trial.number != winner)
    legend = {"winner": f"trial {winner}, the winner"} if best else {}
    section.blocks.append(Legend(legend | {style: STATE_WORDS[style] for style in styles}))
    drawing = Drawing(svg, note=note, wide=True)
    if not rungs:
        section.blocks.append(drawing)
        return section
    rows = [
        [f"{rung.percent} %", str(rung.reached), str(rung.stopped)]
        for rung in rungs
    ]
    head = ["rung", "trials that reached it", "stopped there"]
    note = "Dashed lines: rungs, at which a trial goes on only if it is among the best so far."
    section.blocks += [drawing, Table(head, rows, note=note)]
    return section


def hyperparameters(run: Run) -> Section:
    """All settings at once, which of them mattered, and each against the score."""
    section = Section("hyperparameters", "Hyperparameters")
    scored = [trial for trial in run.trials if trial.value is not None]
    varied = search.parameters(scored)
    judged = search.importance(run)
    if len(scored) < 2 or not varied:
        return section
    weights = {one.name: one.share for measure in judged.values() for one in measure.parameters}
    if left_out := max(len(varied) - MOST_AXES, 0):
        varied = sorted(varied, key=lambda p: -weights.get(p.name, 0.0))[:MOST_AXES]
        words = f"The {MOST_AXES} most important of them are shown; {left_out} are left out."
        section.blocks.append(Text(words, "note"))
    winner = run.winner.number if run.winner else None
    bands = search.bands(run)
    complete = any(trial.is_complete for trial in scored)
    legend = {"winner": "the winner"} if winner is not None else {}
    if complete:
        legend |= {"band4": "best fifth", "band2": "middle", "band0": "worst fifth"}
    if any(not trial.is_complete for trial in scored):
        legend["pruned"] = "did not finish"
    section.blocks.append(Legend(legend))
    section.blocks.append(_parallel(run, scored, varied, bands, winner))
    section.blocks.append(Grid([_importance(measure, judged[measure]) for measure in judged]))
    slices = [_slice(run, scored, parameter, bands, winner) for parameter in varied]
    section.blocks.append(Grid([*_frozen_depth(run, scored, bands, winner), *filter(None, slices)]))
    return section


def pareto(run: Run) -> Section:
    """What every saving costs, in a search with several objectives."""
    section = Section("pareto", "Pareto set")
    rows = search.pareto(run)
    if not rows:
        return section
    members = {row["trial"] for row in rows}
    panels = []
    for cost in run.costs:
        heading, unit = ablation.COSTS[cost]
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
                Mark(value, score, _told(trial, run.metric))
                for trial, value, score in shown
                if (trial.number in members) is (style == "winner")
            ]
            for style in ("complete faint", "winner")
        }
        drawn = [charts.dots(frame, of_style, style) for style, of_style in marks.items()]
        panels.append(Drawing(frame.draw(*drawn, title=f"{run.metric} against {heading}")))
    head = ["trial", run.metric, *(ablation.COSTS[cost][0] for cost in run.costs), "settings"]
    settings = {trial.number: short_params(trial.params) for trial in run.trials}
    table = [
        [
            str(row["trial"]),
            f"{row['score']:.4f}",
            *(ablation.shown(row[cost] / ablation.COSTS[cost][1]) for cost in run.costs),
            settings.get(row["trial"], ""),
        ]
        for row in rows
    ]
    words = "Nothing is better than these trials in every objective at once."
    section.blocks += [
        Text(words),
        Legend({"winner": "in the Pareto set", "complete": "other COMPLETE trials"}),
        Grid(panels),
        Table(head, table, words=frozenset({len(head) - 1})),
    ]
    return section


def confirmation(run: Run) -> Section:
    """The best configurations and the default recipe on fresh seeds."""
    section = Section("confirm", "Confirmation on fresh seeds")
    tree = run.store.read_json(CONFIRMATION)
    if tree is None:
        return section
    with reading(run.store.path_of(CONFIRMATION)):
        metric, test = tree["metric"], tree["test"] or {}
        rows, whiskers = [], []
        for one in tree["configurations"]:
            expected, over = one["expected"], one["over_default"]
            tested = test.get(one["arm"], {}).get("metrics", {}).get(metric)
            rows.append(
                [
                    one["arm"] + (" (behind)" if one["behind"] else ""),
                    _figure(one["search_value"]),
                    _figure(expected and expected["mean"]),
                    _bounds(expected),
                    str(expected["n"]) if expected else "0",
                    _figure(one["flattered"], "+.4f"),
                    _figure(over and over["difference"], "+.4f"),
                    _bounds(over, "+.4f"),
                    _figure(tested),
                    short_params(one["params"]),
                ]
            )
            values = list(one["scores"].values())
            bounds = [expected and expected[name] for name in ("mean", "low", "high")]
            is_default = one["arm"] == YARDSTICK
            whiskers.append(Whisker(one["arm"], *bounds, values, is_main=is_default))
    head = ["configuration", "search", "mean", "95 % interval", "seeds", "flattered by"]
    head += ["over default", "95 % interval", "test", "settings"]
    note = (
        f"{metric}. Intervals: Student t over seeds, for the difference paired by seed, each for "
        "itself. `flattered by`: search score minus mean, in the better direction. best/ holds the "
        "model of the first seed, which was settled before it ran."
    )
    marked = frozenset({0})
    table = Table(head, rows, words=frozenset({0, len(head) - 1}), marked=marked, note=note)
    section.blocks += [*_intervals(whiskers, metric, "default recipe"), table]
    return section


def ablations(run: Run) -> Section:
    """What each change costs, per ablation around this run."""
    section = Section("ablations", "Ablations")
    for path in run.store.files_below("ablations"):
        parts = path.split("/")
        if len(parts) != 3 or parts[2] != "ablation.json":
            continue
        with reading(run.store.path_of(path)):
            tree = run.store.read_json(path)
            metric, summaries = tree["metric"], ablation.from_tree(tree)
            head, *rows = ablation.table(summaries, metric)
            marked = {i for i, summary in enumerate(summaries) if summary.is_told_apart}
            whiskers = [
                Whisker(
                    summary.arm.label,
                    summary.score.mean if summary.score else None,
                    summary.score.low if summary.score else None,
                    summary.score.high if summary.score else None,
                    list(summary.values.values()),
                    is_main=summary.is_base,
                )
                for summary in summaries
            ]
            notes = " ".join(ablation.notes_on(summaries, metric))
        section.blocks += [
            *_intervals(whiskers, metric, "base", caption=str(tree["name"])),
            Table(head, rows, marked=frozenset(marked), note=f"Bold: told from the base. {notes}"),
        ]
    return section


def mistakes(run: Run) -> Section:
    """What the winner confuses, and its hardest examples."""
    section = Section("mistakes", "The winner's mistakes")
    found = answers(run)
    if found is None:
        return section
    if found.wrong is not None:
        share = found.wrong / max(found.rows, 1)
        words = f"{found.wrong:,} of {found.rows:,} validation rows have a wrong answer"
        section.blocks.append(Text(f"{words} ({share:.1%})."))
    section.blocks += _confusions(found)
    if found.points:
        section.blocks.append(_scatter(found.points))
    if found.classes:
        section.blocks += _class_table(found.classes)
    if found.hardest:
        section.blocks.append(_hardest(found))
    return section


def trials(run: Run) -> Section:
    """The best of them in a table, and where the rest is."""
    section = Section("trials", "Trials")
    ordered = search.best_first(run)
    if len(ordered) < 2:
        return section
    winner = run.winner.number if run.winner else None
    shown = ordered[:MOST_TRIALS]
    rows = [
        [
            str(trial.number),
            trial.state,
            trial.role,
            _figure(trial.value),
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
    words = frozenset({1, 2, len(head) - 1})
    section.blocks.append(Table(head, rows, words=words, marked=marked, note=note))
    return section


def failures(run: Run) -> Section:
    """Why trials ended early."""
    section = Section("errors", "Early ends and errors")
    causes = search.causes(run)
    rows = [
        [cause.state, cause.reason, str(len(cause.trials)), _numbers(cause.trials)]
        for cause in causes[:MOST_CAUSES]
    ]
    if rows:
        more = len(causes) - len(rows)
        note = f"{count(more, 'rarer reason')} left out." if more else ""
        words = frozenset({0, 1, 3})
        head = ["state", "reason", "trials", "numbers"]
        section.blocks.append(Table(head, rows, words=words, note=note))
    if restarts := sum(trial.restarts for trial in run.trials):
        words = f"Trials were restarted {count(restarts, 'time')} after their workers had died."
        section.blocks.append(Text(words))
    log = run.store.read_text(ERROR_LOG)
    if log:
        cut = f"{ERROR_LOG}, its last {LOG_LETTERS:,} letters"
        summary = cut if len(log) > LOG_LETTERS else ERROR_LOG
        section.blocks.append(Fold(summary, [Code(log[-LOG_LETTERS:].strip())]))
    return section


def cost(run: Run, price: float | None) -> Section:
    """Worker time, and what it cost."""
    section = Section("cost", "Cost")
    spent = search.spending(run)
    if not spent:
        return section
    total = search.Spent(
        "total",
        sum(part.runs for part in spent),
        sum(part.train_seconds for part in spent),
        sum(part.eval_seconds for part in spent),
        sum(part.overhead_seconds for part in spent),
    )
    rows: list[list[Cell]] = []
    for part in [*spent, total] if len(spent) > 1 else spent:
        seconds = (part.train_seconds, part.eval_seconds, part.overhead_seconds, part.seconds)
        dollars = [] if price is None else [f"${part.dollars(price):,.2f}"]
        rows.append([part.name, str(part.runs), *map(duration, seconds), *dollars])
    head = ["", "runs", "training", "evaluation", "overhead", "all"]
    head += [] if price is None else ["dollars"]
    tree = run.result.tree
    parts = [f"Time of all workers, {run.workers} per trial."]
    if tree.get("wall_seconds") is not None:
        what = "search" if run.is_search else "training"
        parts.append(f"The {what} took {duration(tree['wall_seconds'])} by the clock")
        started = tree.get("startup_seconds")
        parts[-1] += f", {duration(started)} of it to start." if started else "."
    if price is not None:
        parts.append(f"At ${price:g} per worker and hour; idle and starting workers not counted.")
    else:
        parts.append("With --price DOLLARS per worker and hour this table counts money too.")
    section.blocks.append(Table(head, rows, note=" ".join(parts)))
    return section


def environment(run: Run) -> Section:
    """Versions, hardware and fingerprints."""
    section = Section("environment", "Environment")
    found = run.environment
    plain = {**found, **(found.get("packages") or {})}
    plain.pop("packages", None)
    rows = [
        [name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value)]
        for name, value in plain.items()
        if value is not None
    ]
    if rows:
        half = (len(rows) + 1) // 2
        words = frozenset({0, 1})
        tables = [Table(["", ""], part, words=words) for part in (rows[:half], rows[half:]) if part]
        section.blocks.append(Grid(tables))
    return section


def reproduce(run: Run) -> Section:
    """The commands, and the experiment they need."""
    place = shlex.quote(run.store.location)
    verb = "search" if run.is_search else "train"
    file = shlex.quote(run.store.path_of(EXPERIMENT))
    lines = [f"sft-ray {verb} {file} name=again    # the same from the start"]
    if run.result.is_finished:
        lines.append(f"sft-ray verify {place}    # best/ scored again; files, data, versions")
        if run.winner is not None and run.is_search:
            lines.append(f"sft-ray replay {place} --trial {run.winner.number}    # one trial again")
        if run.is_search:
            lines.append(f"sft-ray confirm {place}    # fresh seeds, and the test split once")
    words = (
        f"All random numbers follow seed {run.experiment.seed}: the same experiment, data and "
        "versions on the same machine give the same numbers."
    )
    resolved = run.store.read_text(EXPERIMENT) or ""
    blocks: list[Block] = [Text(words), Code("\n".join(lines))]
    return Section("reproduce", "Reproduce", [*blocks, Fold(EXPERIMENT, [Code(resolved)])])


# -- parts ---------------------------------------------------------------------------------------


def _score_tile(run: Run, found: search.Outcome) -> Tile:
    if found.expected is not None:
        expected = found.expected
        bounds = _interval(expected["low"], expected["high"])
        note = f"mean of {count(expected['n'], 'fresh seed')}{bounds}"
        return Tile(run.metric, f"{expected['mean']:.4f}", note)
    value = found.validation.get(run.metric, found.search_value)
    so_far = " so far" if run.unfinished else ""
    who = f"best of {len(run.trials)} trials{so_far}" if run.is_search else "one training"
    shown = "–" if value is None else f"{value:.4f}"
    return Tile(run.metric, shown, f"validation split, {who}, not confirmed")


def _cost_tiles(run: Run, spent: float, price: float | None) -> list[Tile]:
    tiles = []
    if run.is_search:
        states: dict[str, int] = {}
        for trial in run.trials:
            states[trial.state] = states.get(trial.state, 0) + 1
        told = ", ".join(f"{number:,} {state}" for state, number in states.items())
        tiles.append(Tile("trials", f"{len(run.trials):,}", told or "none yet"))
    note = "of all workers, everything included"
    if price is not None:
        note = f"{note}: ${spent / 3600 * price:,.2f}"
    return [*tiles, Tile("worker time", duration(spent), note)]


def _settings_table(run: Run, found: search.Outcome) -> Table:
    """The winner's settings beside the default recipe's."""
    default = _default_params(run)
    who = "the default recipe" if found.trial is None else f"trial {found.trial}"
    names = [*found.params, *(name for name in default or {} if name not in found.params)]
    others = [] if default is None or default == found.params else ["default recipe"]
    rows = []
    for name in names:
        values = [found.params.get(name), *([(default or {}).get(name)] if others else [])]
        rows.append([_short_name(name), *(_value(value) for value in values)])
    return Table(["setting", who, *others], rows, caption="Settings of the winner")


def _metrics_table(found: search.Outcome) -> Table:
    tested = (found.test or {}).get("metrics", {})
    head = ["metric", "validation", *(["test"] if tested else [])]
    rows = [
        [name, f"{value:.4f}", *([_figure(tested.get(name))] if tested else [])]
        for name, value in found.validation.items()
    ]
    words = "Scores of exactly the weights in best/." if found.validation else ""
    return Table(head, rows, caption="Scores of the winner", note=words)


def _best_so_far(
    steps: Sequence[search.Step], places: Sequence[float], y: NumberAxis, what: str, how: str
) -> Drawing:
    divisor, unit = _unit(max(places))
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


def _parallel(
    run: Run,
    scored: Sequence[Trial],
    varied: Sequence[search.Parameter],
    bands: dict[int, int],
    winner: int | None,
) -> Drawing:
    values = [(parameter, [*parameter.values.values()]) for parameter in varied]
    axes = [(p, axis) for p, of_p in values if (axis := axis_of(_short_name(p.name), of_p))]
    last = number_axis(run.metric, [trial.value or 0.0 for trial in scored])
    many = " many" if len(scored) > 100 else ""

    def layer(trial: Trial) -> tuple[bool, int, int]:
        return trial.number == winner, bands.get(trial.number, -1), trial.number

    strands = []
    for trial in sorted(scored, key=layer):
        places = [
            axis.place(parameter.values[trial.number])
            if trial.number in parameter.values
            else None
            for parameter, axis in axes
        ]
        style = f"band{bands[trial.number]}" if trial.number in bands else _style(trial)
        if trial.number == winner:
            style, of_many = "winner", ""
        else:
            of_many = many
        told = _told(trial, run.metric)
        ends = [*places, min(max(last.place(trial.value or 0.0), 0.0), 1.0)]
        strands.append(Strand(ends, f"strand {style}{of_many}", told))
    svg = charts.parallel([*(axis for _, axis in axes), last], strands, "Parallel coordinates")
    caption = "All settings of every trial, and its score on the right"
    return Drawing(svg, caption=caption, wide=True)


def _importance(measure: str, judged: search.Judged) -> Table:
    what = {"finished": "final score", "first_rung": "score at the first rung"}
    most = max((one.share for one in judged.parameters), default=1.0) or 1.0
    rows: list[list[Cell]] = [
        [
            _short_name(one.name),
            Shade(f"{one.share:.2f}", one.share / most, is_bar=True),
            str(one.trials),
        ]
        for one in judged.parameters
    ]
    note = f"Share of the variance of the {what.get(measure, measure)} (fANOVA)."
    if not judged.parameters:
        note = "Too few trials to tell."
    elif not judged.is_reliable:
        note += f" Unreliable: n = {judged.trials}, under {RELIABLE_FROM} trials."
    caption = f"Importance for the {what.get(measure, measure)}, n = {judged.trials}"
    return Table(["hyperparameter", "importance", "n"], rows, caption=caption, note=note)


def _slice(
    run: Run,
    scored: Sequence[Trial],
    parameter: search.Parameter,
    bands: dict[int, int],
    winner: int | None,
) -> Drawing | None:
    """Score against one hyperparameter."""
    values = {t.number: t.value for t in scored if t.value is not None}
    return _cloud(run, scored, parameter, values, run.metric, bands, winner)


def _frozen_depth(
    run: Run, scored: Sequence[Trial], bands: dict[int, int], winner: int | None
) -> list[Block]:
    """Time against the frozen depth; its score is among the slices."""
    depth = {t.number: v for t in scored if (v := t.params.get(search.FROZEN_LAYERS)) is not None}
    seconds = {
        t.number: 1000 / t.examples_per_second
        for t in scored
        if t.examples_per_second and t.number in depth
    }
    if len(set(map(str, depth.values()))) < 2 or not seconds:
        return []
    parameter = search.Parameter(search.FROZEN_LAYERS, depth)
    label = "training seconds per 1,000 examples"
    found = _cloud(run, scored, parameter, seconds, label, bands, winner)
    return [] if found is None else [found]


def _cloud(
    run: Run,
    scored: Sequence[Trial],
    parameter: search.Parameter,
    values: dict[int, float],
    label: str,
    bands: dict[int, int],
    winner: int | None,
) -> Drawing | None:
    """Some value of every trial against a hyperparameter; unfinished trials behind."""
    name = _short_name(parameter.name)
    x = axis_of(name, [*parameter.values.values()])
    shown = [t for t in scored if t.number in parameter.values and t.number in values]
    if x is None or not shown:
        return None
    frame = Frame(x, number_axis(label, [values[trial.number] for trial in shown]))
    marks: dict[str, list[Mark]] = {}
    for trial in sorted(shown, key=lambda t: bands.get(t.number, -1)):
        style = f"band{bands[trial.number]}" if trial.number in bands else _style(trial)
        if trial.number == winner:
            style = "winner"
        words = _told(trial, run.metric)
        mark = Mark(parameter.values[trial.number], values[trial.number], words)
        marks.setdefault(style, []).append(mark)
    order = ["fail", "running", "pruned", *(f"band{i}" for i in range(search.BANDS)), "winner"]
    radius = {"winner": 6.0, "pruned": 3.0}
    drawn = [charts.dots(frame, marks[s], s, radius.get(s, 4.0)) for s in order if s in marks]
    title = f"{name}: {label}"
    return Drawing(frame.draw(*drawn, title=title), caption=title)


def _intervals(
    whiskers: Sequence[Whisker], metric: str, main: str, caption: str = ""
) -> list[Block]:
    """Means and intervals over seeds; none where nothing finished."""
    ends = [v for w in whiskers for v in (*w.values, w.mean, w.low, w.high) if v is not None]
    if not ends:
        return []
    svg = charts.whiskers(whiskers, number_axis(metric, ends), f"{metric} over seeds {caption}")
    legend = {"complete": "mean and 95 % interval", "seed": "one seed", "base": main}
    return [Legend(legend), Drawing(svg, caption=caption)]


def _confusions(found: Answers) -> list[Block]:
    if found.matrix:
        rows: list[list[Cell]] = []
        for truth, counts in zip(found.labels, found.matrix, strict=True):
            total = sum(counts) or 1
            shades = [
                Shade(str(number) if number else "", number / total, is_right=label == truth)
                for number, label in zip(counts, found.labels, strict=True)
            ]
            rows.append([truth, *shades])
        note = "Rows: the true label; columns: the answer. Shade: share of the row."
        return [
            Table(["true \\ answer", *found.labels], rows, caption="Confusion matrix", note=note)
        ]
    if found.confusions:
        pairs = [[one.truth, one.predicted, str(one.count)] for one in found.confusions]
        caption = "Commonest confusions"
        note = f"{len(found.labels)} labels are too many for a matrix, which shows up to "
        note += f"{MATRIX_UP_TO}."
        words = frozenset({0, 1})
        return [Table(["true", "answer", "rows"], pairs, words, caption=caption, note=note)]
    return []


def _class_table(classes: Sequence[ClassScore]) -> list[Block]:
    head = ["label", "n", "precision", "recall", "F1"]
    rows: list[list[Cell]] = [
        [
            one.name,
            str(one.support),
            _figure(one.precision, ".3f"),
            _figure(one.recall, ".3f"),
            "" if one.f1 is None else Shade(f"{one.f1:.3f}", one.f1, is_bar=True),
        ]
        for one in classes
    ]
    caption = "By label"
    blocks: list[Block] = [Table(head, rows[:MOST_CLASSES], caption=caption)]
    if rest := rows[MOST_CLASSES:]:
        blocks.append(Fold(f"{len(rest)} rarer labels", [Table(head, rest)]))
    return blocks


def _scatter(points: Sequence[tuple[float, float]]) -> Drawing:
    """Predicted against true values, with the line of equal ones."""
    values = [value for point in points for value in point]
    x, y = number_axis("true value", values), number_axis("predicted value", values)
    frame = Frame(x, y)
    equal = charts.line(frame, [(x.low, x.low), (x.high, x.high)], "equal", "predicted = true")
    marks = [Mark(t, p, f"true {t:.4g}, predicted {p:.4g}") for t, p in points]
    drawn = charts.dots(frame, marks, "complete faint", 2.5)
    title = "Predicted against true value"
    return Drawing(frame.draw(equal, drawn, title=title), caption=title)


def _hardest(found: Answers) -> Table:
    fields = [*found.hardest[0].shown]
    head = ["row", *fields, "true", "answer", "error" if found.wrong is None else "how sure"]
    rows = [
        [str(one.row)]
        + [_cut(one.shown.get(name, "")) for name in fields]
        + [_cut(one.truth), _cut(one.predicted), one.note + (" ✓" if one.wrong is False else "")]
        for one in found.hardest
    ]
    note = "Rows of the validation split, numbered from 1. Wrong answers come first, by how sure "
    note += "or how far off the model was; ✓ marks right ones."
    if found.wrong is None:
        note = "Rows of the validation split, numbered from 1, by the size of the error."
    words = frozenset(range(1, len(head)))
    return Table(head, rows, words=words, caption="Hardest examples", note=note)


def _all_failed(trials: Sequence[Trial]) -> bool:
    return bool(trials) and all(trial.state == "FAIL" for trial in trials)


def _default_params(run: Run) -> dict[str, Any] | None:
    """Of the default recipe, if it was among the trials."""
    return next((trial.params for trial in run.trials if trial.role == YARDSTICK), None)


def _style(trial: Trial) -> str:
    return STATE_STYLE.get(trial.state, "pruned")


def _told(trial: Trial, metric: str) -> str:
    value = "" if trial.value is None else f", {metric} {trial.value:.4f}"
    return f"trial {trial.number}, {trial.state}{value}: {short_params(trial.params)}"


def _unit(seconds: float) -> tuple[float, str]:
    """What to divide seconds by, and the name of that."""
    if seconds < 300:
        return 1.0, "seconds"
    return (60.0, "minutes") if seconds < 3 * 3600 else (3600.0, "hours")


def _short_name(path: str) -> str:
    """`learning_rate`, `l2_sp.strength`."""
    plain = path.removeprefix("train.")
    return plain.removeprefix("regularization.") if plain.endswith(".strength") else plain


def _value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _figure(value: float | None, form: str = ".4f") -> str:
    return "" if value is None else f"{value:{form}}"


def _interval(low: float | None, high: float | None, form: str = ".4f") -> str:
    """`, 95 % interval 0.8679 to 0.8793`, or nothing."""
    if low is None or high is None:
        return ""
    return f", 95 % interval {low:{form}} to {high:{form}}"


def _bounds(found: dict[str, Any] | None, form: str = ".4f") -> str:
    if not found or found["low"] is None:
        return ""
    return f"{found['low']:{form}} to {found['high']:{form}}"


def _numbers(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:12]))
    return f"{shown}, …" if len(numbers) > 12 else shown


def _cut(text: str) -> str:
    return text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]}…"
