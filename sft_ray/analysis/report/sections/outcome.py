"""The head of the page: what came out, how sure that is, what it took."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sft_ray.analysis.report import facts
from sft_ray.analysis.report.blocks import Block, Grid, Table, Text, Tile, Tiles
from sft_ray.analysis.report.run import Run, Trial
from sft_ray.analysis.report.words import figure, interval, setting_words, short_name
from sft_ray.analysis.tables import scored_words
from sft_ray.recipes import YARDSTICK
from sft_ray.screen import count, duration


def outcome(run: Run, spent: Sequence[facts.Spent], price: float | None) -> list[Block]:
    """What came out, and how sure that is."""
    blocks: list[Block] = []
    found = facts.outcome(run)
    if run.unfinished:
        blocks.append(Text(f"No result yet. {run.unfinished}", "warning"))
    if found is None:
        ended = "No trial has reached the end of its schedule"
        causes = ", and every one failed" if _all_failed(run.trials) else ""
        blocks.append(Text(f"{ended}{causes}.", "warning"))
        blocks.append(Tiles(_cost_tiles(run, spent, price)))
        return blocks
    tiles = [_score_tile(run, found)]
    if found.gain is not None and found.gain != 0:
        note = f"{run.metric} over the default recipe"
        note += interval(found.gain_low, found.gain_high, "+.4f")
        tiles.append(Tile("gain", f"{found.gain:+.4f}", note))
    if found.test:
        tested = found.test["metrics"].get(run.metric)
        if tested is not None:
            how_often = scored_words(run.store) or "scored once"  # the record may be lost
            note = f"{found.test['num_examples']} examples, {how_often}"
            tiles.append(Tile("test split", f"{tested:.4f}", note))
    blocks.append(Tiles([*tiles, *_cost_tiles(run, spent, price)]))
    blocks.append(Text(how_sure(run, found)))
    blocks.append(Grid([_settings_table(run, found), _metrics_table(found)]))
    return blocks


def how_sure(run: Run, found: facts.Outcome) -> str:
    """In words: what the figure is of, and what to do to know better."""
    metric, expected = run.metric, found.expected
    if not found.is_complete:
        return (
            "No trial reached the end of its schedule: the winner is the one that came furthest, "
            "and would likely have scored otherwise at its end."
        )
    if expected is None:
        value = found.search_value
        shown = "" if value is None else f" {metric} {value:.4f}"
        if not run.is_search:
            return (
                f"How sure: one training with one seed reached{shown} on the validation split. "
                "Another seed would give another score; nothing here says how far off."
            )
        trials = count(len(run.trials), "trial")
        then = "For" if run.unfinished is None else "Once the search has ended, for"
        return (
            f"How sure:{shown} is one score with one seed, the best of {trials} on the same "
            f"validation split. The best of many noisy scores flatters. {then} a mean with an "
            f"interval over fresh seeds: sft-ray confirm {shlex.quote(run.store.location)}"
        )
    parts = [
        f"How sure: over {expected['n']} fresh seeds the configuration reaches {metric} "
        f"{expected['mean']:.4f} on average{interval(expected['low'], expected['high'])}."
    ]
    if found.flattered is not None and found.search_value is not None:
        kind = "flattered by" if found.flattered >= 0 else "was too low by"
        parts.append(
            f"The search had scored it {found.search_value:.4f}: it {kind} "
            f"{abs(found.flattered):.4f}."
        )
    if found.gain_low is not None and found.gain_high is not None:
        words = "includes zero: the gain may be chance"
        if found.gain_low > 0 or found.gain_high < 0:
            words = f"lies {'above' if found.gain_low > 0 else 'below'} zero"
        parts.append(f"The interval of the gain over the default recipe {words}.")
    if found.test is None:
        scored = scored_words(run.store)
        parts.append(f"The test split was {scored}." if scored else "No test split was scored.")
    return " ".join(parts)


def _score_tile(run: Run, found: facts.Outcome) -> Tile:
    if found.expected is not None:
        expected = found.expected
        bounds = interval(expected["low"], expected["high"])
        note = f"mean of {count(expected['n'], 'fresh seed')}{bounds}"
        return Tile(run.metric, f"{expected['mean']:.4f}", note)
    value = found.validation.get(run.metric, found.search_value)
    so_far = " so far" if run.unfinished else ""
    who = f"best of {len(run.trials)} trials{so_far}" if run.is_search else "one training"
    shown = "–" if value is None else f"{value:.4f}"
    return Tile(run.metric, shown, f"validation split, {who}, not confirmed")


def _cost_tiles(run: Run, spent: Sequence[facts.Spent], price: float | None) -> list[Tile]:
    tiles = []
    if run.is_search:
        states = Counter(trial.state for trial in run.trials)
        told = ", ".join(f"{number:,} {state}" for state, number in states.items())
        tiles.append(Tile("trials", f"{len(run.trials):,}", told or "none yet"))
    note = " + ".join(part.name for part in spent)
    if price is not None:
        note += f": ${sum(part.dollars(price) for part in spent):,.2f}"
    return [*tiles, Tile("worker time", duration(sum(part.seconds for part in spent)), note)]


def _settings_table(run: Run, found: facts.Outcome) -> Table:
    """The winner's settings beside the default recipe's."""
    default = _default_recipe(run)
    who = "the default recipe" if found.trial is None else f"trial {found.trial}"
    columns = {who: (found.params, run.winner.train if run.winner else {})}
    if default is not None and found.trial not in (None, default.number):
        columns[YARDSTICK] = default.params, default.train
    names = dict.fromkeys(name for params, _ in columns.values() for name in params)
    rows = [
        [short_name(name), *(setting_words(_setting(name, *of)) for of in columns.values())]
        for name in names
    ]
    return Table(["setting", *columns], rows, caption="Settings of the winner")


def _setting(name: str, params: Mapping[str, Any], train: Mapping[str, Any]) -> Any:
    """Of a trial; one that it did not vary stands in its whole configuration."""
    return params.get(name, train.get(name.removeprefix("train.")))


def _metrics_table(found: facts.Outcome) -> Table:
    tested = (found.test or {}).get("metrics", {})
    head = ["metric", "validation", *(["test"] if tested else [])]
    rows = [
        [name, f"{value:.4f}", *([figure(tested.get(name))] if tested else [])]
        for name, value in found.validation.items()
    ]
    words = "Scores of exactly the weights in best/." if found.validation else ""
    return Table(head, rows, caption="Scores of the winner", note=words)


def _all_failed(trials: Sequence[Trial]) -> bool:
    return bool(trials) and all(trial.state == "FAIL" for trial in trials)


def _default_recipe(run: Run) -> Trial | None:
    """Of the default recipe, if it was among the trials."""
    return next((trial for trial in run.trials if trial.role == YARDSTICK), None)
