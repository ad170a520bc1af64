"""Repeated runs: the confirmation on fresh seeds and the ablations."""

from __future__ import annotations

from collections.abc import Sequence

from sft_ray.analysis import ablation, ablation_tables
from sft_ray.analysis.report import charts
from sft_ray.analysis.report.axes import number_axis
from sft_ray.analysis.report.blocks import Block, Drawing, Legend, Table
from sft_ray.analysis.report.charts import Whisker
from sft_ray.analysis.report.run import Run
from sft_ray.analysis.report.words import LEVEL, bounds, figure
from sft_ray.analysis.results import reading
from sft_ray.recipes import YARDSTICK
from sft_ray.run_store import CONFIRMATION
from sft_ray.screen import short_params


def confirmation(run: Run) -> list[Block]:
    """The best configurations and the default recipe on fresh seeds."""
    blocks: list[Block] = []
    tree = run.store.read_json(CONFIRMATION)
    if tree is None:
        return blocks
    with reading(run.store.path_of(CONFIRMATION)):
        metric, test = tree["metric"], tree["test"] or {}
        rows, whiskers = [], []
        for one in tree["configurations"]:
            expected, over = one["expected"], one["over_default"]
            tested = test.get(one["arm"], {}).get("metrics", {}).get(metric)
            rows.append(
                [
                    one["arm"] + (" (behind)" if one["behind"] else ""),
                    figure(one["search_value"]),
                    figure(expected and expected["mean"]),
                    bounds(expected),
                    str(expected["n"]) if expected else "0",
                    figure(one["flattered"], "+.4f"),
                    figure(over and over["difference"], "+.4f"),
                    bounds(over, "+.4f"),
                    figure(tested),
                    short_params(one["params"]),
                ]
            )
            whiskers.append(
                Whisker(
                    label=one["arm"],
                    mean=expected and expected["mean"],
                    low=expected and expected["low"],
                    high=expected and expected["high"],
                    values=list(one["scores"].values()),
                    is_main=one["arm"] == YARDSTICK,
                )
            )
    head = ["configuration", "search", "mean", LEVEL, "seeds", "flattered by"]
    head += ["over default", LEVEL, "test", "settings"]
    note = (
        f"{metric}. Intervals: Student t over seeds, for the difference paired by seed, each for "
        "itself. `flattered by`: search score minus mean, in the better direction. best/ holds the "
        "model of the first seed, which was settled before it ran."
    )
    last = len(head) - 1
    words, long, best = frozenset({0, last}), frozenset({last}), frozenset({0})
    table = Table(head, rows, words, long, best, note=note)
    blocks += [*_intervals(whiskers, metric, "default recipe"), table]
    return blocks


def ablations(run: Run) -> list[Block]:
    """What each change costs, per ablation around this run."""
    blocks: list[Block] = []
    for path in run.store.files_below("ablations"):
        parts = path.split("/")
        if len(parts) != 3 or parts[2] != "ablation.json":
            continue
        with reading(run.store.path_of(path)):
            tree = run.store.read_json(path)
            metric, summaries = tree["metric"], ablation.from_tree(tree)
            head, *rows = ablation_tables.table(summaries, metric)
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
            notes = " ".join(ablation_tables.notes_on(summaries, metric))
        blocks += [
            *_intervals(whiskers, metric, "base", caption=str(tree["name"])),
            Table(head, rows, marked=frozenset(marked), note=f"Bold: told from the base. {notes}"),
        ]
    return blocks


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
