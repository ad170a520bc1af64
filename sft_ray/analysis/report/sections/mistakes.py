"""What the winner gets wrong on the validation split."""

from __future__ import annotations

from collections.abc import Sequence

from sft_ray.analysis.report import charts
from sft_ray.analysis.report.answers import MATRIX_UP_TO, Answers, ClassScore, answers
from sft_ray.analysis.report.axes import number_axis
from sft_ray.analysis.report.blocks import Block, Cell, Drawing, Fold, Shade, Table, Text
from sft_ray.analysis.report.charts import Frame, Mark
from sft_ray.analysis.report.run import Run
from sft_ray.analysis.report.words import figure

MOST_CLASSES = 25  # rows before the rest is folded away
MOST_LETTERS = 300  # of an example's text


def mistakes(run: Run, texts: bool = True) -> list[Block]:
    """What the winner confuses, and, with `texts`, its hardest examples."""
    blocks: list[Block] = []
    found = answers(run)
    if found is None:
        return blocks
    if found.wrong is not None:
        share = found.wrong / max(found.rows, 1)
        words = f"{found.wrong:,} of {found.rows:,} validation rows have a wrong answer"
        blocks.append(Text(f"{words} ({share:.1%})."))
    blocks += _confusions(found)
    if found.points:
        blocks.append(_scatter(found.points))
    if found.classes:
        blocks += _class_table(found.classes)
    if texts and found.hardest:
        blocks.append(_hardest(found))
    return blocks


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
            figure(one.precision, ".3f"),
            figure(one.recall, ".3f"),
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
    head = ["row", *fields, "true", "answer", found.measure]
    rows = [
        [str(one.row)]
        + [_cut(one.shown.get(name, "")) for name in fields]
        + [_cut(one.truth), _cut(one.predicted), one.note + (" ✓" if one.wrong is False else "")]
        for one in found.hardest
    ]
    note = "Rows of the validation split, numbered from 1. Wrong answers come first; ✓ marks right "
    note += "ones."
    if found.wrong is None:
        note = "Rows of the validation split, numbered from 1, by the size of the error."
    words, long = frozenset(range(1, len(head))), frozenset(range(1, len(fields) + 1))
    return Table(head, rows, words, long, caption="Hardest examples", note=note)


def _cut(text: str) -> str:
    return text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]}…"
