"""What a report tells, as plain values: on invented trials and on answers worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sft_ray.analysis.importance import importances
from sft_ray.analysis.report import facts
from sft_ray.analysis.report.answers import (
    MATRIX_UP_TO,
    ClassScore,
    Confusion,
    answers,
    class_scores,
    entities,
    judge,
)
from sft_ray.analysis.report.axes import (
    NumberAxis,
    WordAxis,
    axis_of,
    log_ticks,
    number_axis,
    short,
    ticks,
)
from sft_ray.analysis.report.page import render
from sft_ray.analysis.report.run import Run
from sft_ray.analysis.results import SearchResult
from sft_ray.config import Experiment
from sft_ray.errors import ConfigError
from sft_ray.run_store import CONFIRMATION, PREDICTIONS, RunStore, delete_results, trial_folder
from sft_ray.search.study import SearchStudy, open_storage
from sft_ray.single_trial import run_training
from tests.search.test_several_objectives import run_ends
from tests.search.test_study import RECIPE, experiment, run_one
from tests.test_docs import EXAMPLES, prepared
from tests.test_results import search_run

Rows = list[dict[str, Any]]


def run_of(folder: Path, rows: Rows, **tree: Any) -> Run:
    """A finished run of rows that differ from a plain one as said."""
    plain = {"state": "COMPLETE", "role": "sampled", "reason": None, "value": 0.5}
    plain |= {"params": {}, "metrics": {}, "schedule_percent": 100, "curve": []}
    plain |= {"train_seconds": 6.0, "eval_seconds": 3.0, "overhead_seconds": 1.0}
    trials = [{**plain, "number": i, **row} for i, row in enumerate(rows)]
    best = {"trial": 0, "params": {}, "validation": {}}
    whole = {"metric": "accuracy", "direction": "maximize", "trials": trials, "best": best, **tree}
    store = RunStore(str(folder), "x")
    return Run(store, experiment(), SearchResult(store.location, whole))


ENDS: Rows = [
    {"value": 0.6},
    {"value": 0.9, "state": "PRUNED", "reason": "rung 10", "schedule_percent": 10},
    {"value": None, "state": "FAIL", "reason": "it broke"},
    {"value": 0.7},
    {"value": 0.65},
]


def test_only_complete_trials_move_the_best_so_far(tmp_path: Path) -> None:
    run = run_of(tmp_path, ENDS, environment={"workers_per_trial": 2})
    steps = facts.progress(run)
    assert [step.best for step in steps] == [0.6, 0.6, 0.6, 0.7, 0.7]
    assert [step.worker_seconds for step in steps] == [20, 40, 60, 80, 100]
    assert {step.seconds for step in steps} == {None}  # no study says when they ended
    losses = run_of(tmp_path, ENDS, direction="minimize")
    assert [step.best for step in facts.progress(losses)] == [0.6] * 5


def test_the_study_says_when_trials_ended(tmp_path: Path) -> None:
    store, study = search_run(tmp_path)
    run = Run.load(store.location)
    steps = facts.progress(run)
    assert [step.seconds for step in steps] == sorted(step.seconds or 0.0 for step in steps)
    assert steps[0].seconds is not None
    assert steps[0].seconds > 0
    assert steps[-1].best == study.best_score()
    assert steps[-1].worker_seconds == pytest.approx(sum(t.slot_seconds for t in run.trials))


def test_rungs_count_who_came_and_who_stayed(tmp_path: Path) -> None:
    store, study = search_run(tmp_path)
    found = facts.rungs(Run.load(store.location))
    reasons = [trial.user_attrs["reason"] for trial in study.trials]
    assert [rung.percent for rung in found] == [10, 33]
    assert [rung.stopped for rung in found] == [reasons.count("rung 10"), reasons.count("rung 33")]
    assert [rung.reached for rung in found] == [12, 12 - found[0].stopped]


def test_fifths_are_by_score(tmp_path: Path) -> None:
    rows: Rows = [{"value": value} for value in (0.1, 0.5, 0.3, 0.9, 0.7)]
    rows.append({"value": 1.0, "state": "PRUNED"})
    assert facts.bands(run_of(tmp_path, rows)) == {0: 0, 1: 2, 2: 1, 3: 4, 4: 3}
    losses = run_of(tmp_path, rows, direction="minimize")
    assert facts.bands(losses) == {0: 4, 1: 2, 2: 3, 3: 0, 4: 1}
    assert facts.bands(run_of(tmp_path, rows[:1])) == {0: 4}
    assert sorted(facts.bands(run_of(tmp_path, rows[:3])).values()) == [1, 2, 4]


def test_hyperparameters_are_those_that_vary(tmp_path: Path) -> None:
    rows: Rows = [
        {"params": {"train.a": 1, "train.b": 2, "train.kind": "none"}},
        {"params": {"train.a": 1, "train.b": 3, "train.kind": "l2", "train.l2.strength": 0.1}},
        {"params": {"train.a": 1, "train.b": 3, "train.kind": "l2", "train.l2.strength": 0.2}},
    ]
    found = {p.name: p for p in facts.parameters(run_of(tmp_path, rows).trials)}
    assert list(found) == ["train.b", "train.kind", "train.l2.strength"]
    assert found["train.l2.strength"].values == {1: 0.1, 2: 0.2}
    assert [p.is_number for p in found.values()] == [True, False, True]


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ([None, "balanced", None], {0: "null", 1: "balanced", 2: "null"}),
        ([None, 0.1, 0.1], {0: "null", 1: 0.1, 2: 0.1}),
        ([None, 0.1, 0.2], {1: 0.1, 2: 0.2}),  # stays an axis of numbers
        ([None, None, None], None),
    ],
)
def test_null_is_a_value_of_its_own(
    given: list[Any], found: dict[int, Any] | None, tmp_path: Path
) -> None:
    trials = run_of(tmp_path, [{"params": {"train.x": value}} for value in given]).trials
    assert [p.values for p in facts.parameters(trials)] == ([] if found is None else [found])


def test_causes_put_failures_first_and_the_common_before_the_rare(tmp_path: Path) -> None:
    pruned = {"state": "PRUNED", "reason": "rung 10"}
    rows: Rows = [pruned, {}, {"state": "FAIL", "reason": "it broke"}, pruned, {"state": "PRUNED"}]
    found = facts.causes(run_of(tmp_path, rows))
    assert [(cause.state, cause.reason, cause.trials) for cause in found] == [
        ("FAIL", "it broke", [2]),
        ("PRUNED", "rung 10", [0, 3]),
        ("PRUNED", "no reason was kept", [4]),
    ]


def test_cost_counts_every_kind_of_run_and_all_workers(tmp_path: Path) -> None:
    run = run_of(tmp_path, ENDS, environment={"workers_per_trial": 2})
    row = {**run.result.trials[0], "train_seconds": 60.0}
    for path in ("confirm/a", "confirm/b", "ablations/runs/c"):
        run.store.write_json(f"{path}/trial.json", row)
    found = {part.name: part for part in facts.spending(run)}
    assert {name: part.runs for name, part in found.items()} == {
        "search": 5,
        "confirmation": 2,
        "ablations": 1,
    }
    assert found["search"].seconds == 2 * 5 * 10
    assert found["confirmation"].train_seconds == 2 * 2 * 60
    assert found["confirmation"].dollars(3.6) == pytest.approx(2 * 2 * 64 / 1000)


def test_the_outcome_of_a_confirmed_run_is_its_mean(tmp_path: Path) -> None:
    expected = {"mean": 0.58, "sd": 0.01, "low": 0.57, "high": 0.59, "n": 5}
    best = {"trial": 3, "params": {"train.a": 1}, "validation": {"accuracy": 0.59}}
    best |= {"expected": expected, "flattered": 0.12, "gain_over_default": 0.05}
    best |= {"gain_interval": {"low": 0.01, "high": 0.09}, "test": None}
    found = facts.outcome(run_of(tmp_path, ENDS, best=best))
    assert found is not None
    assert (found.trial, found.search_value, found.expected) == (3, 0.7, expected)
    assert (found.gain, found.gain_low, found.gain_high) == (0.05, 0.01, 0.09)
    assert found.states == {"COMPLETE": 3, "PRUNED": 1, "FAIL": 1}


def test_an_unfinished_run_shows_its_best_so_far(tmp_path: Path) -> None:
    store, study = search_run(tmp_path)
    whole = facts.outcome(Run.load(store.location))
    tree = importances(study.trials, [10, 33])
    delete_results(store)
    store.delete_folder(trial_folder(11))
    run = Run.load(store.location)
    found = facts.outcome(run)
    assert found is not None
    assert whole is not None
    assert run.unfinished == "It stopped before its end; the same command goes on."
    with store.locked():
        assert run.unfinished == "It is running now."
    assert found.search_value == study.best_score()
    assert found.gain == pytest.approx(study.best_score() - study.trials[0].values[0])
    judged = facts.importance(run)["finished"]
    assert {one.name: one.share for one in judged.parameters} == pytest.approx(
        {name: one["importance"] for name, one in tree["finished"]["parameters"].items()}
    )
    assert judged.trials == tree["finished"]["trials"]
    assert not judged.is_reliable


def test_a_running_trial_shows_its_curve(tmp_path: Path) -> None:
    store, exp = RunStore(str(tmp_path), "x"), experiment()
    store.pull_journal()
    study = SearchStudy(
        exp, open_storage(store.journal), recipe=RECIPE, num_layers=6, direction="maximize"
    )
    planned = study.next_trial()
    assert planned is not None
    run_one(study, planned, stop_after=33)
    store.write_text("experiment.yaml", exp.model_dump_json())
    run = Run.load(store.location)
    (trial,) = run.trials
    assert (trial.state, [percent for percent, _ in trial.curve]) == ("RUNNING", [10, 33])
    assert facts.outcome(run) is None
    assert facts.progress(run) == []


def test_the_pareto_set_is_read_or_found(tmp_path: Path) -> None:
    exp = experiment(objective=["accuracy", "train_seconds"], trials=3, default_recipe=False)
    store = RunStore(str(tmp_path), "x")
    store.pull_journal()
    study = SearchStudy(
        exp,
        open_storage(store.journal),
        recipe=RECIPE,
        num_layers=6,
        direction="maximize",
    )
    run_ends(study, [(0.9, 30.0, 1), (0.8, 40.0, 1), (0.7, 10.0, 1)])
    store.write_text("experiment.yaml", exp.model_dump_json())
    found = facts.pareto(Run.load(store.location))
    assert found == [
        {"trial": 0, "score": 0.9, "train_seconds": 30.0},
        {"trial": 2, "score": 0.7, "train_seconds": 10.0},
    ]


# -- answers -------------------------------------------------------------------------------------


def test_classes_are_confused_as_counted_by_hand() -> None:
    pairs = [("a", "a", 0.9), ("a", "b", 0.8), ("a", "b", 0.95), ("b", "b", 0.4), ("c", "b", 0.5)]
    rows = [
        {"text": f"t{i}", "label": truth, "predicted_label": found, "predicted_probability": p}
        for i, (truth, found, p) in enumerate(pairs)
    ]
    found = judge("text-classification", rows, {0: "c", 1: "b", 2: "a"})
    assert (found.rows, found.wrong) == (5, 3)
    assert found.labels == ["c", "b", "a"]  # the model's order
    assert found.matrix == [[0, 1, 0], [0, 1, 0], [0, 2, 1]]
    assert found.confusions == [Confusion("a", "b", 2), Confusion("c", "b", 1)]
    assert found.classes[0] == ClassScore("a", 3, precision=1.0, recall=1 / 3, f1=0.5)
    assert found.classes[2] == ClassScore("c", 1, precision=None, recall=0.0, f1=0.0)
    # Surely wrong first, then unsurely right.
    assert [one.row for one in found.hardest] == [3, 2, 5, 4, 1]
    assert [one.wrong for one in found.hardest] == [True, True, True, False, False]
    assert found.hardest[0].shown == {"text": "t2"}


def test_many_classes_have_no_matrix() -> None:
    rows = [
        {"text": "t", "label": str(i), "predicted_label": str(i // 2), "predicted_probability": 0.5}
        for i in range(MATRIX_UP_TO + 1)
    ]
    found = judge("text-classification", rows, {})
    assert found.matrix == []
    assert len(found.labels) == MATRIX_UP_TO + 1
    assert len(found.confusions) == MATRIX_UP_TO


def test_the_truth_of_probabilities_is_the_likeliest_class() -> None:
    row = {"text": "t", "label": [0.2, 0.8], "predicted_label": "no", "predicted_probability": 0.6}
    found = judge("text-classification", [row], {0: "no", 1: "yes"})
    assert (found.hardest[0].truth, found.wrong) == ("yes", 1)


def test_several_labels_are_judged_by_their_loss() -> None:
    rows = [
        {
            "text": "t",
            "labels": truth,
            "predicted_labels": [name for name, p in probabilities.items() if p > 0.5],
            "predicted_probabilities": probabilities,
        }
        for truth, probabilities in [
            (["a", "b"], {"a": 0.9, "b": 0.8}),
            (["a"], {"a": 0.4, "b": 0.6}),
            ([], {"a": 0.0, "b": 1.0}),
        ]
    ]
    found = judge("multi-label", rows, {})
    assert found.wrong == 2
    assert [one.row for one in found.hardest] == [3, 2, 1]
    assert (found.hardest[0].truth, found.hardest[0].predicted) == ("none", "b")
    assert found.classes[0] == ClassScore("a", 2, precision=1.0, recall=0.5, f1=2 / 3)


def test_values_are_judged_by_their_error() -> None:
    rows = [
        {"text": "t", "label": v, "predicted_value": p} for v, p in [(1, 1.5), (2.0, -1), (3, 3)]
    ]
    found = judge("regression", rows, {})
    assert found.wrong is None
    assert found.points == [(1.0, 1.5), (2.0, -1.0), (3.0, 3.0)]
    assert [(one.row, one.note) for one in found.hardest] == [(2, "-3"), (1, "+0.5"), (3, "+0")]


def test_tags_are_judged_by_words_and_entities() -> None:
    names = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC"}
    rows = [
        {
            "tokens": ["Marie", "Curie", "in", "Paris"],
            "tags": ["B-PER", "I-PER", "O", "B-LOC"],
            "predicted_tags": ["B-PER", "O", "O", "B-LOC"],
        }
    ]
    found = judge("token-classification", rows, names)
    (one,) = found.hardest
    assert (one.truth, one.note) == ("Marie Curie (PER), Paris (LOC)", "1 of 4")
    assert one.predicted == "Marie (PER), Paris (LOC)"
    scores = {score.name: score for score in found.classes}
    assert (scores["LOC"].f1, scores["PER"].f1) == (1.0, 0.0)
    assert entities(["PER", "PER", "O", "PER"], ["PER", "O"]) == [("PER", (0, 2)), ("PER", (3, 4))]


def test_answers_are_right_whatever_their_case_and_dots() -> None:
    rows = [
        {
            "question": "q",
            "context": "c",
            "answers": {"text": ["Paris", "in Paris"], "answer_start": [0, 1]},
            "predicted_answer": answer,
            "predicted_score": score,
        }
        for answer, score in [("paris.", 3.0), ("Rome", 9.0), ("", 1.0)]
    ]
    found = judge("question-answering", rows, {})
    assert found.wrong == 2
    assert [(one.row, one.predicted) for one in found.hardest] == [
        (2, "Rome"),
        (3, "no answer"),
        (1, "paris."),
    ]
    assert found.hardest[0].truth == "Paris / in Paris"


def test_answers_are_right_in_a_report_where_exact_match_calls_them_so() -> None:
    given = [(["the cat"], "cat"), ([], ""), (["北京"], "“北京”"), ([], "a cat")]
    rows = [
        {
            "question": "q",
            "context": "c",
            "answers": {"text": truths, "answer_start": [0] * len(truths)},
            "predicted_answer": answer,
            "predicted_score": 1.0,
        }
        for truths, answer in given
    ]
    assert judge("question-answering", rows, {}).wrong == 1


def test_a_relation_shows_its_entities() -> None:
    row = {"text": "Marie was born in Warsaw.", "subject_start": 0, "subject_end": 5}
    row |= {"object_start": 18, "object_end": 24, "label": "born", "predicted_label": "none"}
    found = judge("relation-extraction", [{**row, "predicted_probability": 0.7}], {})
    assert found.hardest[0].shown == {
        "text": "Marie was born in Warsaw.",
        "subject": "Marie",
        "object": "Warsaw",
    }


def test_class_scores_of_nothing_are_none() -> None:
    assert class_scores([], []) == []
    assert class_scores([set()], [set()]) == []


@pytest.mark.parametrize("example", EXAMPLES, ids=[tree["name"] for _, tree in EXAMPLES])
def test_the_answers_of_every_task_agree_with_its_metrics(
    example: tuple[str, dict[str, Any]], tmp_path: Path, tiny_model: Path
) -> None:
    lines, tree = example
    tree = {**tree, "train": {"epochs": 1, "learning_rate": 5e-3}, "search": {"rungs": []}}
    exp: Experiment = prepared(tmp_path, tiny_model, lines, tree)
    run = Run.load(run_training(exp, quiet=True).location)
    found = answers(run)
    assert found is not None
    assert found.hardest
    metrics = run.trials[0].metrics
    right = 1 - (found.wrong or 0) / found.rows
    if exp.task in ("text-classification", "relation-extraction"):
        assert right == pytest.approx(metrics["accuracy"])
        assert sum(map(sum, found.matrix)) == found.rows
    if exp.task == "multi-label":
        assert right == pytest.approx(metrics["subset_accuracy"])
    if exp.task == "token-classification":
        both = sum((score.recall or 0.0) * score.support for score in found.classes)
        support = sum(score.support for score in found.classes)
        assert both / support == pytest.approx(metrics["recall"])
    if exp.task == "question-answering":
        assert right == pytest.approx(metrics["exact_match"])
    if exp.task == "regression":
        assert len(found.points) == found.rows


# -- axes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.183, 0.912, [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
        (-3.0, 4.0, [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0]),
        (1000.0, 52_000.0, [10_000.0, 20_000.0, 30_000.0, 40_000.0, 50_000.0]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_log_ticks_are_powers_of_ten() -> None:
    assert log_ticks(2e-6, 2e-3) == pytest.approx([3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3])
    assert log_ticks(1e-6, 1e-1) == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
    assert list(map(short, (1e-5, 3e-4, 0.01, 0, 20_000, 3.2e7))) == [
        "1e-5",
        "3e-4",
        "0.01",
        "0",
        "20,000",
        "3.2e7",
    ]


def test_axes_fit_what_they_show() -> None:
    rates = axis_of("rate", [1e-5, 1e-3])
    assert isinstance(rates, NumberAxis)
    assert rates.is_log
    assert rates.place(1e-4) == pytest.approx(0.5)
    sizes = axis_of("size", [16, 64, 32, 16])
    assert isinstance(sizes, NumberAxis)
    assert [words for _, words in sizes.ticks] == ["16", "32", "64"]
    mixed = axis_of("frozen", ["all", 2, 0])
    assert isinstance(mixed, WordAxis)
    assert mixed.words == ("0", "2", "all")
    assert [mixed.place(value) for value in (0, "all")] == pytest.approx([1 / 6, 5 / 6])
    assert axis_of("text", [f"v{i}" for i in range(13)]) is None
    assert axis_of("none", []) is None
    same = number_axis("same", [0.0, 0.0])
    assert same.low < 0 < same.high


def test_a_few_outliers_do_not_squeeze_the_rest() -> None:
    axis = number_axis("loss", [0.5 + i / 1000 for i in range(100)] + [1e9])
    assert axis.high < 10
    assert axis.place(1e9) > 1
    few = number_axis("loss", [0.5, -0.6, 1e9])
    assert few.place(1e9) < 1


# -- damage --------------------------------------------------------------------------------------


def test_damage_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    store, _ = search_run(tmp_path)
    cases = {
        CONFIRMATION: '{"metric": "accuracy"}',
        PREDICTIONS: "no parquet",
        "ablations/depth/ablation.json": '{"arms": [{}], "direction": "maximize"}',
    }
    for path, text in cases.items():
        store.write_text(path, text)
        with pytest.raises(ConfigError) as caught:
            render(Run.load(store.location))
        (line,) = caught.value.problems
        assert line.startswith(f"{store.location}/{path}: damaged")
        assert "\n" not in line
        store.delete_file(path)


def test_fifths_of_many_are_equally_large(tmp_path: Path) -> None:
    found = facts.bands(run_of(tmp_path, [{"value": n / 100} for n in range(40)]))
    assert sorted(found.values()) == sorted([*range(5)] * 8)
