"""What each change costs: from the finished runs of an ablation to its table."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import Any

from sft_ray.analysis.statistics import (
    ALPHA,
    LEVEL,
    Interval,
    Paired,
    corrected,
    mean_interval,
    paired_difference,
    probability_of_improvement,
)
from sft_ray.config import COSTS

BASE = "base"
FEW = 5  # runs; below, a standard deviation is little more than a guess
# Cost -> its heading, and what it is divided by there.
COST_HEADINGS = {
    "train_seconds": ("training (s)", 1.0),
    "eval_seconds": ("evaluation (s)", 1.0),
    "trained_parameters": ("trained parameters (M)", 1e6),
    "memory_bytes": ("memory (MB)", 1e6),
}
COLUMNS = (
    "arm",
    "changes",
    "metric",
    "n",
    "failed",
    "mean",
    "sd",
    "low_95",
    "high_95",
    "pairs",
    "difference",
    "difference_low_95",
    "difference_high_95",
    "p_value",
    "p_corrected",
    "probability_of_improvement",
    "detectable_difference",
    *COST_HEADINGS,
)


@dataclass(frozen=True)
class Arm:
    """One configuration of an ablation.

    Attributes:
        name: unique; `base` is the one the others are compared with.
        changes: dotted path -> value, where it departs from the base.
    """

    name: str
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """`frozen_layers 3`, `l2_sp 0.01`; an arm without changes goes by its name."""
        return ", ".join(_told(path, value) for path, value in self.changes.items()) or self.name


@dataclass(frozen=True)
class ArmSummary:
    """What the finished runs of one arm say.

    Attributes:
        sign: 1 where a higher score is better, else -1.
        values: seed -> score of the runs that finished.
        failed: runs that did not.
        score: None if no run finished.
        versus_base: over the seeds that both finished; None for the base and without such seeds.
        p_corrected: over all arms but the base.
        improvement: P(a run of this arm is better than one of the base).
        train_seconds, eval_seconds, trained_parameters, memory_bytes: mean of the finished runs.
    """

    arm: Arm
    sign: int
    values: dict[int, float]
    failed: int
    score: Interval | None = None
    versus_base: Paired | None = None
    p_corrected: float | None = None
    improvement: float | None = None
    train_seconds: float | None = None
    eval_seconds: float | None = None
    trained_parameters: float | None = None
    memory_bytes: float | None = None

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def is_base(self) -> bool:
        return self.arm.name == BASE

    @property
    def is_told_apart(self) -> bool:
        return self.p_corrected is not None and self.p_corrected < ALPHA


def summarize(
    arms: Sequence[Arm], runs: Sequence[Mapping[str, Any]], *, sign: int
) -> list[ArmSummary]:
    """One summary per arm, in the order of `arms`, one of which is the base.

    Args:
        runs: arm, seed, state, value, train_seconds, eval_seconds, trained_parameters,
            memory_bytes; a later run of the same arm and seed replaces an earlier one.
        sign: 1 where a higher score is better, else -1.
    """
    by_arm: dict[str, dict[int, Mapping[str, Any]]] = {arm.name: {} for arm in arms}
    for run in runs:
        by_arm[run["arm"]][run["seed"]] = run
    finished = {
        name: {seed: run for seed, run in sorted(of_arm.items()) if _is_finished(run)}
        for name, of_arm in by_arm.items()
    }
    scores = {
        name: {seed: float(run["value"]) for seed, run in of_arm.items()}
        for name, of_arm in finished.items()
    }
    others = [arm.name for arm in arms if arm.name != BASE]
    paired = {name: _against(scores[name], scores[BASE]) for name in others}
    p_values = corrected([None if p is None else p.p_value for p in paired.values()])
    p_corrected = dict(zip(others, p_values, strict=True))

    summaries = []
    for arm in arms:
        values, base_values = scores[arm.name], scores[BASE]
        is_compared = arm.name != BASE and values and base_values
        summaries.append(
            ArmSummary(
                arm=arm,
                sign=sign,
                values=values,
                failed=len(by_arm[arm.name]) - len(values),
                score=mean_interval(list(values.values())) if values else None,
                versus_base=paired.get(arm.name),
                p_corrected=p_corrected.get(arm.name),
                improvement=probability_of_improvement(
                    [sign * value for value in values.values()],
                    [sign * value for value in base_values.values()],
                )
                if is_compared
                else None,
                **{cost: _mean_of(cost, finished[arm.name].values()) for cost in COST_HEADINGS},
            )
        )
    return summaries


def to_tree(summaries: Sequence[ArmSummary]) -> dict[str, Any]:
    """The summaries as ablation.json holds them; `values` are pairs of seed and score."""
    rows = [
        {
            "name": summary.arm.name,
            "label": summary.arm.label,
            "changes": summary.arm.changes,
            "values": [[seed, value] for seed, value in summary.values.items()],
            "failed": summary.failed,
            "score": asdict(summary.score) if summary.score else None,
            "versus_base": asdict(summary.versus_base) if summary.versus_base else None,
            "p_corrected": summary.p_corrected,
            "improvement": summary.improvement,
            **{cost: getattr(summary, cost) for cost in COST_HEADINGS},
        }
        for summary in summaries
    ]
    is_higher_better = all(summary.sign > 0 for summary in summaries)
    direction = "maximize" if is_higher_better else "minimize"
    return {"direction": direction, "level": LEVEL, "arms": rows}


def from_tree(tree: Mapping[str, Any]) -> list[ArmSummary]:
    """What `to_tree` was made from.

    Raises:
        KeyError, TypeError: the tree lacks a part.
    """
    sign = -1 if tree["direction"] == "minimize" else 1
    return [
        ArmSummary(
            arm=Arm(row["name"], row["changes"]),
            sign=sign,
            values=dict(row["values"]),
            failed=row["failed"],
            score=Interval(**row["score"]) if row["score"] else None,
            versus_base=Paired(**row["versus_base"]) if row["versus_base"] else None,
            p_corrected=row["p_corrected"],
            improvement=row["improvement"],
            **{cost: row[cost] for cost in COST_HEADINGS},
        )
        for row in tree["arms"]
    ]


def to_csv(summaries: Sequence[ArmSummary], metric: str) -> str:
    """Every number at full precision; what is not known is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for summary in summaries:
        score, paired = summary.score, summary.versus_base
        row = {
            "arm": summary.arm.name,
            "changes": json.dumps(summary.arm.changes, ensure_ascii=False),
            "metric": metric,
            "n": summary.n,
            "failed": summary.failed,
            "p_corrected": summary.p_corrected,
            "probability_of_improvement": summary.improvement,
            **{cost: getattr(summary, cost) for cost in COST_HEADINGS},
        }
        if score:
            row |= {
                "mean": score.mean,
                "sd": score.sd,
                "low_95": score.low,
                "high_95": score.high,
            }
        if paired:
            row |= {
                "pairs": paired.n,
                "difference": paired.difference,
                "difference_low_95": paired.low,
                "difference_high_95": paired.high,
                "p_value": paired.p_value,
                "detectable_difference": paired.detectable,
            }
        writer.writerow(row)
    return text.getvalue()


def to_markdown(summaries: Sequence[ArmSummary], metric: str) -> str:
    """The table, and below it how its numbers came about and how far they carry."""
    head, *rows = table(summaries, metric)
    lines = ["| " + " | ".join(map(_for_markdown, cells)) + " |" for cells in (head, *rows)]
    rule = "|---|" + "---:|" * (len(head) - 1)
    notes = "\n\n".join(map(_for_markdown, notes_on(summaries, metric)))
    return "\n".join([lines[0], rule, *lines[1:]]) + f"\n\n{notes}\n"


def to_latex(summaries: Sequence[ArmSummary], metric: str) -> str:
    """A float for two columns, with the notes as its caption; needs the package booktabs."""
    head, *rows = (" & ".join(map(_for_latex, cells)) for cells in table(summaries, metric))
    lines = [
        "% \\usepackage{booktabs}",
        "\\begin{table*}",
        "\\centering\\footnotesize\\setlength{\\tabcolsep}{4pt}",
        f"\\begin{{tabular}}{{l{'r' * head.count(' & ')}}}",
        "\\toprule",
        f"{head} \\\\",
        "\\midrule",
        *(f"{row} \\\\" for row in rows),
        "\\bottomrule",
        "\\end{tabular}",
        f"\\caption{{{_for_latex(' '.join(notes_on(summaries, metric)))}}}",
        "\\end{table*}",
    ]
    return "\n".join(lines) + "\n"


def notes_on(summaries: Sequence[ArmSummary], metric: str) -> list[str]:
    """How the numbers of the table came about, and where they say little."""
    better = "higher" if all(summary.sign > 0 for summary in summaries) else "lower"
    notes = [
        f"{metric}: {better} is better. Intervals: 95 % Student t, over seeds for the mean, over "
        "the seeds that both finished for the difference (arm minus base); each holds for itself "
        "(pointwise, not simultaneous).",
        "p: two-sided paired t-test, corrected over the arms by Benjamini-Hochberg. "
        "P(improvement): how often a run of the arm beats one of the base, over all pairs of "
        "runs (Agarwal et al. 2021). Detectable: the true difference that so many pairs of the "
        "observed spread tell from 0 with 80 % power, in one uncorrected test at 5 %.",
    ]
    finished = [summary for summary in summaries if summary.n]
    if absent := [summary.arm.label for summary in summaries if not summary.n]:
        notes.append(f"No run finished of: {'; '.join(absent)}.")
    if few := [summary.arm.label for summary in finished if summary.n < FEW]:
        everywhere = len(few) == len(summaries) > 1
        notes.append(
            f"Fewer than {FEW} seeds finished of {'every arm' if everywhere else '; '.join(few)}: "
            "intervals and p rest on a spread that so few runs hardly show."
        )
    constant = [
        summary.arm.label
        for summary in summaries
        if summary.versus_base and summary.versus_base.n > 1 and summary.versus_base.low is None
    ]
    if constant:
        notes.append(
            f"The difference is the same at every seed of {'; '.join(constant)}: without a spread "
            "there is no interval, and p is that of the sign test."
        )
    if len(summaries) > 1 and not any(summary.is_told_apart for summary in summaries):
        notes.append(
            "No arm is told apart from the base at 5 %. That does not show that they are equal: "
            "differences below the detectable one would often be missed."
        )
    return notes


def shown(number: float) -> str:
    """A cost for people: three significant digits, and no fewer than its whole part has."""
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def table(summaries: Sequence[ArmSummary], metric: str) -> list[list[str]]:
    """Heading and rows, as plain text."""
    decimals = _decimals(summaries)
    head = ["arm", f"{metric}, mean", "sd", "95 % interval", "difference to base", "95 % interval"]
    head += ["P(improvement)", "p, corrected", "n", "detectable"]
    rows = [head + [COST_HEADINGS[cost][0] for cost in COSTS]]

    def number(value: float | None, sign: str = "") -> str:
        return "" if value is None else f"{value:{sign}.{decimals}f}"

    def interval(found: Interval | Paired | None, sign: str = "") -> str:
        if found is None or found.low is None:
            return ""
        return f"[{number(found.low, sign)}, {number(found.high, sign)}]"

    for summary in summaries:
        score, paired = summary.score, summary.versus_base
        improvement = summary.improvement
        cells = [
            summary.arm.label,
            number(score.mean if score else None),
            number(score.sd if score else None),
            interval(score),
            number(paired.difference if paired else None, "+"),
            interval(paired, "+"),
            "" if improvement is None else f"{improvement:.2f}",
            _p_value(summary.p_corrected),
            _runs(summary),
            number(paired.detectable if paired else None),
        ]
        for cost in COSTS:
            value = getattr(summary, cost)
            cells.append("" if value is None else shown(value / COST_HEADINGS[cost][1]))
        rows.append(cells)
    return rows


def _runs(summary: ArmSummary) -> str:
    """`5`, `4 (3 paired, 1 failed)`."""
    asides = []
    if summary.versus_base and summary.versus_base.n < summary.n:
        asides.append(f"{summary.versus_base.n} paired")
    if summary.failed:
        asides.append(f"{summary.failed} failed")
    return f"{summary.n} ({', '.join(asides)})" if asides else str(summary.n)


def _p_value(p: float | None) -> str:
    if p is None:
        return ""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _decimals(summaries: Sequence[ArmSummary]) -> int:
    """Enough for two digits of the spread over seeds: scores may be shares, percent or losses."""
    spreads = [summary.score.sd for summary in summaries if summary.score and summary.score.sd]
    if not spreads:
        return 4
    return min(max(1 - math.floor(math.log10(median(spreads))), 0), 8)


def _told(path: str, value: Any) -> str:
    name = path.removeprefix("train.")
    if isinstance(value, Mapping) and "kind" in value:
        strength = value.get("strength")
        if strength is not None:
            return f"{value['kind']} {strength:g}"  # the kind's name says what it is a strength of
        return f"{name} {value['kind']}"
    return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"


def _is_finished(run: Mapping[str, Any]) -> bool:
    return run["state"] == "COMPLETE" and run["value"] is not None


def _against(values: Mapping[int, float], base: Mapping[int, float]) -> Paired | None:
    seeds = [seed for seed in values if seed in base]
    if not seeds:
        return None
    return paired_difference([values[seed] for seed in seeds], [base[seed] for seed in seeds])


def _mean_of(cost: str, runs: Iterable[Mapping[str, Any]]) -> float | None:
    known = [float(run[cost]) for run in runs if run[cost] is not None]
    return fmean(known) if known else None


def _for_markdown(text: str) -> str:
    """On one line; `<` is markup only before a name."""
    return re.sub(r"([|\\*`]|<(?=[A-Za-z/!?]))", r"\\\1", re.sub(r"\s+", " ", text))


# Each is replaced once, so that what a replacement brings is left as it is.
LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    "|": r"$|$",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def _for_latex(text: str) -> str:
    minus = re.sub(r"(?<![\w-])-(?=\d)", "\N{MINUS SIGN}", re.sub(r"\s+", " ", text))
    escaped = "".join(LATEX.get(character, character) for character in minus)
    return escaped.replace("\N{MINUS SIGN}", "$-$")
