"""The table of an ablation, as text, CSV, Markdown and LaTeX, and the notes below it."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from statistics import median

from sft_ray.analysis.ablation import COST_HEADINGS, ArmSummary
from sft_ray.analysis.statistics import Interval, Paired
from sft_ray.config import COSTS

FEW = 5  # runs; below, a standard deviation is little more than a guess
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
