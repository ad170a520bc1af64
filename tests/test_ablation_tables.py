"""Tables and figures of an ablation, from runs made by hand whose numbers can be checked."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import stats

from sft_ray.analysis.ablation import Arm, ArmSummary, summarize, to_tree
from sft_ray.analysis.ablation_tables import COLUMNS, notes_on, shown, to_csv, to_latex, to_markdown
from sft_ray.analysis.figures import draw_ablation, save_figure

BASE = Arm("base")
FROZEN = Arm("frozen_layers=3", {"train.frozen_layers": 3})
L2_SP = Arm("l2_sp", {"train.regularization": {"kind": "l2_sp", "strength": 0.01}})
NONE = Arm("none", {"train.regularization": {"kind": "none"}})
ARMS = [BASE, FROZEN, L2_SP, NONE]
# Differences to the base, seed by seed: frozen -0.01, -0.03, -0.02; l2_sp 0.01, 0.00, 0.02.
SCORES: dict[str, list[float | None]] = {
    "base": [0.90, 0.92, 0.91],
    "frozen_layers=3": [0.89, 0.89, 0.89],
    "l2_sp": [0.91, 0.92, 0.93],
    "none": [0.90, None, 0.90],
}
MB, MILLION = 1_000_000, 1_000_000


def runs_of(scores: Mapping[str, Sequence[float | None]]) -> list[dict[str, Any]]:
    """A score of None is a run that failed; each arm is half as dear as the one before."""
    return [
        {
            "arm": arm,
            "seed": 17 + i,
            "state": "FAIL" if value is None else "COMPLETE",
            "value": value,
            "train_seconds": (100 + 10 * i) / 2**place,
            "eval_seconds": 4.0,
            "trained_parameters": 22 * MILLION // 2**place,
            "memory_bytes": 800 * MB // 2**place,
        }
        for place, (arm, values) in enumerate(scores.items())
        for i, value in enumerate(values)
    ]


def summaries_of(
    arms: Sequence[Arm], scores: Mapping[str, Sequence[float | None]], sign: int = 1
) -> list[ArmSummary]:
    return summarize(arms, runs_of(scores), sign=sign)


def by_hand(sign: int = 1) -> dict[str, ArmSummary]:
    return {summary.arm.name: summary for summary in summaries_of(ARMS, SCORES, sign)}


def over_one_number(count: int, path: str = "train.frozen_layers") -> list[ArmSummary]:
    arms = [BASE, *(Arm(f"{path}={k}", {path: k}) for k in range(1, count + 1))]
    scores = {arm.name: [0.9 - 0.01 * i, 0.91 - 0.01 * i] for i, arm in enumerate(arms)}
    return summaries_of(arms, scores)


def markdown_rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


# What the summaries say.


def test_an_arm_is_compared_with_the_base_seed_by_seed() -> None:
    found = by_hand()
    frozen = found["frozen_layers=3"]
    assert frozen.score
    assert frozen.score.mean == pytest.approx(0.89)
    assert frozen.versus_base
    assert frozen.versus_base.n == 3
    assert frozen.versus_base.difference == pytest.approx(-0.02)
    # sd 0.01 over 3 pairs: t = -0.02 / (0.01 / sqrt(3)), with 2 degrees of freedom.
    assert frozen.versus_base.p_value == pytest.approx(2 * stats.t.sf(2 * 3**0.5, 2))
    assert frozen.improvement == 0
    assert found["l2_sp"].versus_base
    assert found["l2_sp"].versus_base.difference == pytest.approx(0.01)
    assert found["l2_sp"].improvement == pytest.approx((1.5 + 2.5 + 3) / 9)  # two ties, half each


def test_the_base_is_compared_with_nothing() -> None:
    base = by_hand()["base"]
    assert base.score
    assert base.score.mean == pytest.approx(0.91)
    assert base.score.sd == pytest.approx(0.01)
    assert base.versus_base is base.p_corrected is base.improvement is None


def test_p_values_are_corrected_over_all_arms_but_the_base() -> None:
    found = by_hand()
    names = ["frozen_layers=3", "l2_sp", "none"]
    bare = [found[name].versus_base.p_value for name in names]
    expected = stats.false_discovery_control(bare)
    assert [found[name].p_corrected for name in names] == pytest.approx(list(expected))


def test_a_failed_run_leaves_its_seed_out_of_the_pairs() -> None:
    none = by_hand()["none"]
    assert (none.n, none.failed) == (2, 1)
    assert none.values == {17: 0.90, 19: 0.90}
    assert none.versus_base
    assert none.versus_base.n == 2
    assert none.versus_base.difference == pytest.approx(-0.005)


def test_a_seed_that_only_the_base_lacks_counts_for_the_mean_alone() -> None:
    [base, frozen] = summaries_of(
        [BASE, FROZEN], {"base": [0.9, None, 0.8], FROZEN.name: [0.8, 0.1, 0.6]}
    )
    assert (base.n, base.failed, frozen.n, frozen.failed) == (2, 1, 3, 0)
    assert frozen.score
    assert frozen.score.mean == pytest.approx(0.5)
    assert frozen.versus_base
    assert frozen.versus_base.n == 2
    assert frozen.versus_base.difference == pytest.approx(-0.15)
    assert "| 3 (2 paired) |" in to_markdown([base, frozen], "f1")


def test_costs_are_means_of_the_finished_runs() -> None:
    none = by_hand()["none"]
    assert none.train_seconds == pytest.approx((100 + 120) / 8 / 2)
    assert none.eval_seconds == 4
    assert (none.trained_parameters, none.memory_bytes) == (2_750_000, 100 * MB)


def test_a_lower_score_is_better_where_the_sign_says_so() -> None:
    higher, lower = by_hand(1), by_hand(-1)
    for name in ("frozen_layers=3", "l2_sp", "none"):
        # The difference stays arm minus base; better turns round.
        assert lower[name].versus_base == higher[name].versus_base
        assert lower[name].improvement == pytest.approx(1 - (higher[name].improvement or 0))
    text = to_markdown(list(lower.values()), "loss")
    assert "loss: lower is better" in text
    assert "| -0.020 |" in text
    assert to_tree(list(lower.values()))["direction"] == "minimize"


def test_an_arm_without_a_finished_run_keeps_its_row() -> None:
    scores = {**SCORES, "l2_sp": [None, None, None]}
    found = {summary.arm.name: summary for summary in summaries_of(ARMS, scores)}
    empty = found["l2_sp"]
    assert (empty.n, empty.failed) == (0, 3)
    assert empty.score is empty.versus_base is empty.p_corrected is empty.train_seconds is None
    assert found["none"].p_corrected is not None
    text = to_markdown(list(found.values()), "accuracy")
    assert "No run finished of: l2_sp 0.01." in text
    assert markdown_rows(text)[4][8] == "0 (3 failed)"


def test_an_arm_that_never_ran_has_a_row_too() -> None:
    [_, frozen] = summarize([BASE, FROZEN], runs_of({"base": [0.9]}), sign=1)
    assert (frozen.n, frozen.failed) == (0, 0)


def test_without_a_finished_base_arms_stand_alone() -> None:
    [base, frozen] = summaries_of([BASE, FROZEN], {"base": [None], FROZEN.name: [0.8]})
    assert base.score is frozen.versus_base is frozen.improvement is None
    assert frozen.score
    for write in (to_markdown, to_csv, to_latex):
        assert write([base, frozen], "accuracy")


def test_a_later_run_of_a_seed_replaces_an_earlier_one() -> None:
    first, second = runs_of({"base": [None]}), runs_of({"base": [0.9]})
    [base] = summarize([BASE], first + second, sign=1)
    assert (base.values, base.failed) == ({17: 0.9}, 0)


def test_a_run_of_an_unknown_arm_is_not_lost_silently() -> None:
    with pytest.raises(KeyError, match="frozen"):
        summaries_of([BASE], {"base": [0.9], "frozen": [0.8]})


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({}, "name"),
        ({"train.frozen_layers": 3}, "frozen_layers 3"),
        ({"train.learning_rate": 3e-5, "train.epochs": 2}, "learning_rate 3e-05, epochs 2"),
        ({"train.regularization": {"kind": "l2_sp", "strength": 0.01}}, "l2_sp 0.01"),
        ({"train.regularization": {"kind": "none"}}, "regularization none"),
        ({"train.regularization": {"kind": "none", "strength": None}}, "regularization none"),
        ({"data.max_length": 64}, "data.max_length 64"),
    ],
)
def test_arms_go_by_what_they_change(changes: dict[str, Any], label: str) -> None:
    assert Arm("name", changes).label == label


# Tables.


def test_the_markdown_table_shows_every_column() -> None:
    head, rule, base, frozen, *rest = markdown_rows(to_markdown(list(by_hand().values()), "f1"))
    assert head[1] == "f1, mean"
    assert set(rule[0]) <= set("-:|")
    assert len(rest) == 2
    assert len(base) == len(frozen) == len(head) == 13
    assert base[:4] == ["base", "0.910", "0.010", "[0.885, 0.935]"]
    assert base[8] == "3"
    # detectable = 5.653 standard errors of 0.01 / sqrt(3)
    assert frozen == [
        "frozen_layers 3",
        "0.890",
        "0.000",
        "[0.890, 0.890]",
        "-0.020",
        "[-0.045, +0.005]",
        "0.00",
        "0.223",
        "3",
        "0.033",
        "55",
        "11",
        "400",
    ]


def test_decimals_follow_the_spread_of_the_score() -> None:
    def mean_of(scores: list[float | None]) -> str:
        text = to_markdown(summaries_of([BASE], {"base": scores}), "score")
        return markdown_rows(text)[2][1]

    assert mean_of([91.0, 92.0, 93.0]) == "92.0"
    assert mean_of([1e-5, 2e-5, 3e-5]) == "0.000020"
    assert mean_of([1200.0, 1500.0]) == "1350"
    assert mean_of([0.5]) == "0.5000"


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.00154, "0.00154"), (22.713, "22.7"), (99.97, "100"), (1234.5, "1,234"), (0, "0")],
)
def test_costs_are_short(number: float, text: str) -> None:
    assert shown(number) == text


def test_a_pipe_or_a_line_break_does_not_break_the_markdown_table() -> None:
    arm = Arm("odd", {"data.note": "a|b\nc <b> *"})
    text = to_markdown(summaries_of([BASE, arm], {"base": [0.9], "odd": [0.8]}), "f1")
    [line] = [line for line in text.splitlines() if "data.note" in line]
    assert line.startswith(r"| data.note a\|b c \<b> \* | 0.8000 |")


def test_csv_holds_every_number_in_full() -> None:
    summaries = list(by_hand().values())
    text = to_csv(summaries, "accuracy")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert tuple(rows[0]) == COLUMNS
    assert [row["arm"] for row in rows] == [arm.name for arm in ARMS]
    for row, summary in zip(rows, summaries, strict=True):
        assert summary.score
        assert float(row["mean"]) == summary.score.mean
        assert float(row["memory_bytes"]) == summary.memory_bytes
        assert json.loads(row["changes"]) == summary.arm.changes
        if summary.versus_base:
            assert float(row["difference"]) == summary.versus_base.difference
            assert float(row["p_corrected"]) == summary.p_corrected
    assert rows[0]["difference"] == ""


def test_csv_reads_as_a_data_frame() -> None:
    scores = {**SCORES, "l2_sp": [None, None, None]}
    frame = pd.read_csv(io.StringIO(to_csv(summaries_of(ARMS, scores), "f1")), index_col="arm")
    assert frame["n"].to_dict() == {"base": 3, "frozen_layers=3": 3, "l2_sp": 0, "none": 2}
    assert np.isnan(frame.loc["l2_sp", "mean"])
    assert frame["train_seconds"].dtype == frame["p_value"].dtype == float


def test_latex_is_a_booktabs_table_with_one_cell_per_column() -> None:
    text = to_latex(list(by_hand().values()), "f1_macro")
    [columns] = re.findall(r"\\begin\{tabular\}\{(\w+)\}", text)
    body = text.split("\\toprule\n")[1].split("\n\\bottomrule")[0]
    rows = [line for line in body.splitlines() if line != "\\midrule"]
    assert len(rows) == 1 + len(ARMS)
    assert all(row.endswith(" \\\\") for row in rows)
    assert {len(re.split(r"(?<!\\)&", row)) for row in rows} == {len(columns)}
    assert rows[0].startswith("arm & f1\\_macro, mean & sd & 95 \\% interval")
    assert rows[2].startswith("frozen\\_layers 3 & 0.890")
    assert "$-$0.020 & [$-$0.045, +0.005]" in rows[2]
    assert text.count("{") == text.count("}")


def test_latex_escapes_what_it_would_obey() -> None:
    arm = Arm("odd", {"data.note": r"50% & $x$ #1 {a} _b_ ~ ^ \end <c> 3e-05 中文"})
    text = to_latex(summaries_of([BASE, arm], {"base": [0.9], "odd": [0.8]}), "f1")
    expected = (
        r"data.note 50\% \& \$x\$ \#1 \{a\} \_b\_ \textasciitilde{} \textasciicircum{} "
        r"\textbackslash{}end $<$c$>$ 3e-05 中文"
    )
    assert expected in text


def test_the_tree_survives_json() -> None:
    tree = to_tree(list(by_hand().values()))
    assert json.loads(json.dumps(tree, allow_nan=False)) == tree
    assert (tree["direction"], tree["level"]) == ("maximize", 0.95)
    base, frozen = tree["arms"][:2]
    assert base["values"] == [[17, 0.90], [18, 0.92], [19, 0.91]]
    assert base["versus_base"] is None
    assert frozen["label"] == "frozen_layers 3"
    assert frozen["changes"] == {"train.frozen_layers": 3}
    assert frozen["versus_base"]["n"] == 3


# How far the numbers carry.


def test_the_notes_name_the_methods() -> None:
    text = " ".join(notes_on(list(by_hand().values()), "accuracy"))
    for word in ("Student t", "pointwise", "Benjamini-Hochberg", "Agarwal et al.", "80 % power"):
        assert word in text


def test_few_seeds_and_nothing_told_apart_are_said() -> None:
    notes = notes_on(list(by_hand().values()), "accuracy")
    assert any("Fewer than 5 seeds finished of every arm" in note for note in notes)
    assert any("No arm is told apart from the base" in note for note in notes)


def test_only_the_arms_that_have_few_seeds_are_named() -> None:
    base = [0.90, 0.91, 0.92, 0.90, 0.91]
    scores: dict[str, list[float | None]] = {
        "base": list(base),
        FROZEN.name: [b - d for b, d in zip(base, [0.1, 0.11, 0.1, 0.11, 0.1], strict=True)],
        L2_SP.name: [0.91, 0.90, 0.93, None, None],
    }
    notes = notes_on(summaries_of([BASE, FROZEN, L2_SP], scores), "accuracy")
    assert any(note.startswith("Fewer than 5 seeds finished of l2_sp 0.01:") for note in notes)
    assert not any("told apart from the base at" in note for note in notes)


def test_a_difference_without_spread_is_not_sold_as_certainty() -> None:
    summaries = summaries_of([BASE, FROZEN], {"base": [0.9, 0.8], FROZEN.name: [0.8, 0.7]})
    assert not summaries[1].is_told_apart
    notes = notes_on(summaries, "accuracy")
    assert any("the same at every seed of frozen_layers 3" in note for note in notes)


def test_one_seed_gives_scores_without_intervals() -> None:
    summaries = summaries_of([BASE, FROZEN], {"base": [0.9], FROZEN.name: [0.8]})
    _, _, base, frozen = markdown_rows(to_markdown(summaries, "accuracy"))
    assert base[1:4] == ["0.9000", "", ""]
    assert frozen[4:8] == ["-0.1000", "", "0.00", ""]
    assert to_latex(summaries, "accuracy").count("0.9000 &  &  &") == 1


# Figures.


@pytest.mark.parametrize("arms", [ARMS, [BASE, Arm("1", {"x": 1}), Arm("2", {"x": 2})]])
def test_a_cost_that_was_not_measured_is_left_out(tmp_path: Path, arms: list[Arm]) -> None:
    runs = runs_of({arm.name: [0.8, 0.9] for arm in arms})
    for run in runs:
        run["memory_bytes"] = None
    summaries = summarize(arms, runs, sign=1)
    figure = draw_ablation(summaries, metric="f1", title="t", costs=["memory_bytes"])
    save_figure(figure, tmp_path, "x")
    assert all(row[-1] == "" for row in markdown_rows(to_markdown(summaries, "f1"))[2:])


def test_a_figure_is_written_as_svg_and_png(tmp_path: Path) -> None:
    figure = draw_ablation(
        list(by_hand().values()),
        metric="accuracy",
        title="What each change costs",
        costs=["train_seconds", "trained_parameters", "memory_bytes"],
    )
    vector, pixels = save_figure(figure, tmp_path / "ablations", "ablation")
    assert [vector.name, pixels.name] == ["ablation.svg", "ablation.png"]
    with Image.open(pixels) as image:
        assert image.size[0] > 1000
        assert image.size[1] > 300
        assert len(set(image.convert("L").tobytes())) > 20
    root = ET.parse(vector).getroot()
    assert root.tag.endswith("svg")
    text = "".join(root.itertext())
    for word in (
        "What each change costs",
        "accuracy",
        "frozen_layers 3",
        "memory (MB)",
        "one seed",
    ):
        assert word in text


@pytest.mark.parametrize("draw_again", [False, True])
def test_the_same_summaries_give_the_same_bytes(tmp_path: Path, draw_again: bool) -> None:
    def drawn() -> Any:
        return draw_ablation(over_one_number(3), metric="f1", title="t", costs=["train_seconds"])

    figure = drawn()
    first = [path.read_bytes() for path in save_figure(figure, tmp_path / "a", "x")]
    again = drawn() if draw_again else figure
    assert [path.read_bytes() for path in save_figure(again, tmp_path / "b", "x")] == first
    assert b"<dc:date>" not in first[0]


def test_arms_over_one_number_are_a_line() -> None:
    figure = draw_ablation(over_one_number(6), metric="f1", title="t", costs=["memory_bytes"])
    panel, cost = figure.axes
    assert cost.get_xlabel() == "frozen_layers"
    assert [label.get_text() for label in cost.get_xticklabels()] == list("123456")
    assert panel.get_xscale() == "linear"
    assert any(list(line.get_xdata()) == [1, 2, 3, 4, 5, 6] for line in panel.get_lines())


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([1, 2, 30], "linear"),
        ([1, 2, 31], "log"),
        ([1e-5, 1e-4, 1e-3], "log"),
        ([0, 1e-4, 1e-2], "symlog"),
        ([0, 1, 2], "linear"),
        ([-1, 1, 100], "linear"),
    ],
)
def test_a_wide_span_is_drawn_on_a_log_axis(
    tmp_path: Path, values: list[float], scale: str
) -> None:
    arms = [BASE, *(Arm(str(value), {"train.x": value}) for value in values)]
    summaries = summaries_of(arms, {arm.name: [0.8, 0.9] for arm in arms})
    figure = draw_ablation(summaries, metric="f1", title="t")
    assert figure.axes[0].get_xscale() == scale
    low, high = figure.axes[0].get_xlim()
    assert low < min(values) < max(values) < high
    save_figure(figure, tmp_path, "x")


@pytest.mark.parametrize(
    "arms",
    [
        [BASE, FROZEN],  # a line of one point says nothing
        ARMS,
        [BASE, Arm("a", {"train.x": 1}), Arm("b", {"train.y": 2})],
        [BASE, Arm("a", {"train.x": True}), Arm("b", {"train.x": False})],
        [BASE, Arm("a", {"train.x": "linear"}), Arm("b", {"train.x": "cosine"})],
        [BASE, Arm("a", {"train.x": 1, "train.y": 1}), Arm("b", {"train.x": 2, "train.y": 1})],
        [BASE],
    ],
)
def test_all_other_arms_are_rows(arms: list[Arm]) -> None:
    summaries = summaries_of(arms, {arm.name: [0.8, 0.9] for arm in arms})
    [panel] = draw_ablation(summaries, metric="f1", title="t").axes
    assert [label.get_text() for label in panel.get_yticklabels()] == [a.label for a in arms]
    assert panel.get_xlabel() == "f1"


def extremes_of(panel: Any) -> tuple[float, float]:
    return tuple(sorted(panel.get_ylim()))


def test_no_seed_lies_outside_the_panel() -> None:
    """Seeds reach further than the interval of many of them."""
    scores: dict[str, list[float | None]] = {"base": [0.9] * 30, "1": [0.5] + [0.9] * 29}
    scores["2"] = [0.9] * 29 + [0.99]
    arms = [BASE, Arm("1", {"train.x": 1}), Arm("2", {"train.x": 2})]
    [panel] = draw_ablation(summaries_of(arms, scores), metric="f1", title="t").axes
    low, high = extremes_of(panel)
    assert low < 0.5
    assert high > 0.99


@pytest.mark.parametrize("count", [1, 20])
@pytest.mark.parametrize("is_line", [False, True])
def test_labels_stay_within_the_figure_and_apart(count: int, is_line: bool) -> None:
    if is_line:
        summaries = over_one_number(count)
    else:
        long = {f"train.setting_number_{i}": "a_rather_long_value" for i in range(3)}
        arms = [BASE, *(Arm(str(i), {**long, "train.x": i}) for i in range(count))]
        summaries = summaries_of(arms, {arm.name: [0.8, 0.9] for arm in arms})
    figure = draw_ablation(summaries, metric="f1", title="word " * 60, costs=["memory_bytes"])
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    panel = figure.axes[0]
    labels = [label for label in panel.get_yticklabels() if label.get_text()]
    boxes = [label.get_window_extent(renderer) for label in labels]
    title = figure._suptitle.get_window_extent(renderer)
    for box in (*boxes, title):
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1 + 1
    ordered = sorted(boxes, key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 + 1 for below, above in pairwise(ordered))


def test_chinese_and_dollar_signs_are_drawn_without_a_word(tmp_path: Path) -> None:
    arms = [BASE, Arm("a", {"data.text": "标题"}), Arm("b", {"data.text": "$x_1$ and $\\frac"})]
    summaries = summaries_of(arms, {arm.name: [0.8, 0.9] for arm in arms})
    vector, _ = save_figure(
        draw_ablation(summaries, metric="准确率", title="每个改动的代价 $"), tmp_path, "x"
    )
    text = "".join(ET.parse(vector).getroot().itertext())
    for word in ("标题", "准确率", "每个改动的代价 $", "$x_1$ and $\\frac"):
        assert word in text


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "scores",
    [
        {"base": [0.9], "1": [0.8], "2": [0.7]},
        {"base": [0.9, 0.8], "1": [None, None], "2": [0.7, 0.6]},
        {"base": [None], "1": [0.8], "2": [0.7]},
        {"base": [None], "1": [None], "2": [None]},
        {"base": [0.9, 0.9], "1": [0.9, 0.9], "2": [0.9, 0.9]},
    ],
    ids=["one seed", "an arm failed", "the base failed", "all failed", "all equal"],
)
@pytest.mark.parametrize("path", ["train.x", None])
def test_whatever_finished_is_drawn_and_written(
    tmp_path: Path, scores: dict[str, list[float | None]], path: str | None, sign: int
) -> None:
    arms = [BASE, *(Arm(name, {path or f"train.{name}": int(name)}) for name in ("1", "2"))]
    summaries = summaries_of(arms, scores, sign)
    costs = ["train_seconds", "memory_bytes"]
    figure = draw_ablation(summaries, metric="loss", title="t", costs=costs)
    vector, pixels = save_figure(figure, tmp_path, "x")
    unfinished = sum(not summary.n for summary in summaries if path is None or not summary.is_base)
    assert vector.read_text().count(">no run finished<") == unfinished
    assert pixels.stat().st_size > 5000
    for write in (to_markdown, to_csv, to_latex):
        assert "nan" not in write(summaries, "loss")
    json.dumps(to_tree(summaries), allow_nan=False)


def test_drawing_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    script = (
        "import matplotlib, sys; before = matplotlib.rcParams.copy()\n"
        "from pathlib import Path\n"
        "from sft_ray.analysis.ablation import Arm, summarize\n"
        "from sft_ray.analysis.figures import draw_ablation, save_figure\n"
        "figure = draw_ablation(summarize([Arm('base')], [], sign=1), metric='f1', title='t')\n"
        f"save_figure(figure, Path({str(tmp_path)!r}), 'x')\n"
        # Reading the backend would make matplotlib choose one.
        "now = matplotlib.rcParams\n"
        "assert all(now[name] == before[name] for name in before if name != 'backend')\n"
        "print(' '.join({'matplotlib.pyplot', 'torch', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("module", ["results", "statistics", "ablation"])
def test_tables_do_without_matplotlib(module: str) -> None:
    script = (
        f"import sys, sft_ray.analysis.{module}\n"
        "print(' '.join({'matplotlib', 'pandas', 'torch', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
