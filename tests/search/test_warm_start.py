"""A search begins with what did well in other runs: real run folders, no Ray, no training."""

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from sft_ray.analysis.outcome import Outcome
from sft_ray.analysis.rows import row_of, trial_row
from sft_ray.config import Experiment
from sft_ray.errors import ConfigError
from sft_ray.run_store import ENVIRONMENT, RunStore, trial_folder, write_experiment
from sft_ray.search.study import SearchStudy, open_storage
from sft_ray.search.warm_start import MOST_PER_RUN, warm_configurations
from tests.search.test_study import RECIPE, experiment, run_all

FACTS = {
    "task": "text-classification",
    "model": "google-bert/bert-base-uncased",
    "model_type": "bert",
    "num_parameters": 110_000_000,
    "data_fingerprint": "1234",
}
Rows = list[tuple[str, float | None, dict[str, Any]]]  # state, score, parameters


def params_of(rate: float, **others: Any) -> dict[str, Any]:
    """A configuration of the whole space of `experiment()`."""
    return {
        "train.learning_rate": rate,
        "train.epochs": 3,
        "train.regularization.kind": "none",
        "train.frozen_layers": 0,
        **others,
    }


def write_run(
    folder: Path,
    rows: Rows,
    *,
    search: dict[str, Any] | None = None,
    gaps: int = 0,
    **facts: Any,
) -> str:
    """A run folder as a search leaves it while it is running; its location."""
    exp = experiment(trials=max(1, gaps + len(rows)), **(search or {}))
    exp = exp.model_copy(update={"task": facts.get("task", FACTS["task"])})
    store = RunStore(str(folder.parent), folder.name)
    write_experiment(store, exp)
    store.write_json(ENVIRONMENT, {"python": "3.11", "slots": 1, **FACTS, **facts})
    for number, (state, score, params) in enumerate(rows, start=gaps):
        row = trial_row(
            number=number,
            state=state,
            role="sampled",
            params={**params, "train.warmup": 0.06},
            outcome=Outcome(score=score),
            train={},
            curve={},
            seed=17,
        )
        store.write_json(f"{trial_folder(number)}/trial.json", row)
    return store.location


def finished(*scores: float, first_rate: float = 1e-5) -> Rows:
    """Finished trials whose learning rates tell them apart: the first has `first_rate`."""
    return [("COMPLETE", s, params_of(first_rate * (1 + i))) for i, s in enumerate(scores)]


def configurations(
    *locations: str, objective: str = "accuracy", **search: Any
) -> list[dict[str, Any]]:
    exp = experiment(warm_start=list(locations), **search)
    return warm_configurations(exp, dict(FACTS), objective)


def rates(found: list[dict[str, Any]]) -> list[float]:
    return [params["train.learning_rate"] for params in found]


def test_the_best_finished_trials_come_best_first(tmp_path: Path) -> None:
    rows: Rows = [
        ("COMPLETE", 0.7, params_of(1e-5)),
        ("PRUNED", 0.99, params_of(2e-5)),
        ("COMPLETE", 0.9, params_of(3e-5)),
        ("FAIL", None, params_of(4e-5)),
        ("COMPLETE", 0.8, params_of(5e-5)),
    ]
    found = configurations(write_run(tmp_path / "a", rows))
    assert found == [params_of(3e-5), params_of(5e-5), params_of(1e-5)]


def test_the_best_of_a_metric_to_be_small_is_the_smallest(tmp_path: Path) -> None:
    search = {"objective": "loss"}
    location = write_run(tmp_path / "a", finished(0.7, 0.2, 0.5), search=search)
    assert rates(configurations(location, objective="loss")) == pytest.approx([2e-5, 3e-5, 1e-5])


def test_the_score_counts_in_a_run_of_several_objectives(tmp_path: Path) -> None:
    search = {"objective": ["accuracy", "train_seconds"]}
    location = write_run(tmp_path / "a", finished(0.7, 0.9), search=search)
    assert rates(configurations(location)) == [2e-5, 1e-5]


@pytest.mark.parametrize(
    ("facts", "count"),
    [
        ({}, 5),
        ({"model": "distilled", "num_parameters": 66_000_000}, 4),  # 0.8 of 5
        ({"model": "other", "model_type": "roberta"}, 2),  # 0.5
        ({"model": "tiny", "num_parameters": 4_000_000}, 1),  # 0.2
        ({"model": "tiny", "model_type": "electra", "num_parameters": 14_000_000}, 1),
        ({"data_fingerprint": "5678"}, 4),  # 0.7 of 5 is 3.5
        ({"task": "multi-label"}, 2),  # 0.4
        ({"task": "multi-label", "data_fingerprint": "5678"}, 2),
        ({"model": "distilled", "data_fingerprint": "5678"}, 3),  # 0.56
        ({"model": "tiny", "num_parameters": 4_000_000, "task": "multi-label"}, 1),  # one at least
    ],
)
def test_a_run_gives_the_more_the_more_alike_it_is(
    tmp_path: Path, facts: dict[str, Any], count: int
) -> None:
    assert MOST_PER_RUN == 5
    run = write_run(tmp_path / "run", finished(*(0.9 - 0.1 * i for i in range(7))), **facts)
    assert rates(configurations(run)) == [1e-5 * (1 + i) for i in range(count)]


def test_another_metric_on_the_same_data_is_almost_as_good(tmp_path: Path) -> None:
    rows = finished(*(0.9 - 0.1 * i for i in range(7)))
    run = write_run(tmp_path / "run", rows, search={"objective": "macro_f1"})
    assert len(configurations(run)) == 4  # 0.9 of 5 is 4.5


def test_the_most_alike_runs_come_first_whatever_their_order(tmp_path: Path) -> None:
    size, tiny = 66_000_000, {"model": "tiny", "num_parameters": 4_000_000}
    kinds: list[dict[str, Any]] = [  # from alike to unlike
        {},
        {"search": {"objective": "macro_f1"}},  # 0.9
        {"model": "distilled", "num_parameters": size},  # 0.8
        {"data_fingerprint": "5678"},  # 0.7
        {"model": "distilled", "num_parameters": size, "data_fingerprint": "5678"},  # 0.56
        {"model": "other", "model_type": "roberta"},  # 0.5
        {"task": "multi-label"},  # 0.4
        {"model": "other", "model_type": "roberta", "data_fingerprint": "5678"},  # 0.35
        tiny,  # 0.2
        {**tiny, "data_fingerprint": "5678"},  # 0.14
        {**tiny, "task": "multi-label"},  # 0.08
    ]
    runs = [
        write_run(tmp_path / f"run{i}", finished(0.5, first_rate=1e-5 * (1 + i)), **kind)
        for i, kind in enumerate(kinds)
    ]
    alike_first = [1e-5 * (1 + i) for i in range(len(kinds))]
    assert rates(configurations(*runs)) == alike_first
    assert rates(configurations(*reversed(runs))) == alike_first
    assert rates(configurations(*runs[5:], *runs[:5])) == alike_first


def test_runs_take_turns(tmp_path: Path) -> None:
    # 1, 1/2, 1/3 of the alike one; 0.7, 0.35, 0.23 of the other.
    alike = write_run(tmp_path / "alike", finished(0.3, 0.2, 0.1))
    other = write_run(
        tmp_path / "other", finished(0.9, 0.8, 0.7, first_rate=1e-4), data_fingerprint="5678"
    )
    found = rates(configurations(other, alike))
    assert found == pytest.approx([1e-5, 1e-4, 2e-5, 2e-4, 3e-5, 3e-4])


def test_equally_alike_runs_keep_the_order_they_are_named_in(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / str(i), finished(0.5, first_rate=1e-5 * (1 + i))) for i in range(3)
    ]
    assert rates(configurations(runs[2], runs[0], runs[1])) == pytest.approx([3e-5, 1e-5, 2e-5])


def test_values_the_space_could_not_draw_are_left_out(tmp_path: Path) -> None:
    rows: Rows = [
        ("COMPLETE", 0.9, params_of(0.5)),  # too high a rate
        ("COMPLETE", 0.8, params_of(1e-5, **{"train.frozen_layers": 12})),
        ("COMPLETE", 0.7, params_of(1e-5, **{"train.epochs": 2.5})),
        ("COMPLETE", 0.6, {**params_of(1e-5), "train.regularization.kind": "l1"}),
    ]
    found = configurations(write_run(tmp_path / "a", rows))
    names = sorted(params_of(1e-5))
    missing = [sorted(set(names) - set(params)) for params in found]
    assert missing == [
        ["train.learning_rate"],
        ["train.frozen_layers"],
        ["train.epochs"],
        ["train.regularization.kind"],
    ]
    assert all("train.warmup" not in params for params in found)  # never searched here


def test_a_kind_is_kept_without_a_strength_that_is_out_of_range(tmp_path: Path) -> None:
    decay = {"train.regularization.kind": "weight_decay"}
    name = "train.regularization.weight_decay.strength"
    rows: Rows = [
        ("COMPLETE", 0.9, params_of(1e-5, **decay, **{name: 0.01})),
        ("COMPLETE", 0.8, params_of(1e-5, **decay, **{name: 5.0})),
    ]
    within, outside = configurations(write_run(tmp_path / "a", rows))
    assert within == rows[0][2]
    assert outside == params_of(1e-5, **decay)


def test_options_are_told_apart_by_type_and_value(tmp_path: Path) -> None:
    space = {"train.batch_size": {"choice": [16, 32]}, "train.epochs": {"int": [1, 5]}}
    rows: Rows = [
        ("COMPLETE", score, {"train.batch_size": size, "train.epochs": 2 + i})
        for i, (score, size) in enumerate([(0.9, 32), (0.8, 64), (0.7, "16")])
    ]
    location = write_run(tmp_path / "a", rows)
    assert configurations(location, space=space) == [
        {"train.batch_size": 32, "train.epochs": 2},
        {"train.epochs": 3},
        {"train.epochs": 4},
    ]


def test_a_configuration_counts_by_what_it_knows_of_the_space(tmp_path: Path) -> None:
    # A run of the same search but for a frozen depth: three of four parameters, 0.75.
    shallow = {k: v for k, v in params_of(1e-5).items() if k != "train.frozen_layers"}
    partly = write_run(tmp_path / "partly", [("COMPLETE", 0.9, shallow)])
    # 0.8 of a whole configuration, and 0.7 of another.
    better = write_run(tmp_path / "better", finished(0.5, first_rate=2e-5), model="distilled")
    worse = write_run(tmp_path / "worse", finished(0.5, first_rate=3e-5), data_fingerprint="5678")
    assert rates(configurations(partly, worse, better)) == pytest.approx([2e-5, 1e-5, 3e-5])


def test_a_run_gives_the_fewer_the_less_of_the_space_it_knows(tmp_path: Path) -> None:
    scores = (0.9 - 0.1 * i for i in range(7))
    rows: Rows = [("COMPLETE", s, {"train.epochs": 1 + i}) for i, s in enumerate(scores)]
    run, only = write_run(tmp_path / "run", rows), {"train.epochs": {"int": [1, 9]}}
    assert len(configurations(run, space=only)) == 5
    others = {f"train.{name}": {"uniform": [0.0, 0.3]} for name in ("dropout", "label_smoothing")}
    assert configurations(run, space=only | others) == [{"train.epochs": 1}, {"train.epochs": 2}]


def test_what_a_run_did_not_search_is_known_from_what_it_trained(tmp_path: Path) -> None:
    rate = {"train.learning_rate": 2e-5}
    location = write_run(tmp_path / "a", [("COMPLETE", 0.9, rate)])
    path = tmp_path / "a/trials/0/trial.json"
    row = json.loads(path.read_text())
    fixed = {"kind": "weight_decay", "strength": 0.02}
    row["train"] = {"learning_rate": 2e-5, "frozen_layers": 4, "regularization": fixed}
    path.write_text(json.dumps(row))
    assert configurations(location) == [
        {
            "train.learning_rate": 2e-5,
            "train.frozen_layers": 4,
            "train.regularization.kind": "weight_decay",
            "train.regularization.weight_decay.strength": 0.02,
        }
    ]


def test_runs_that_know_nothing_of_the_space_give_nothing(tmp_path: Path) -> None:
    space = {"train.dropout": {"uniform": [0.0, 0.3]}}
    assert configurations(write_run(tmp_path / "a", finished(0.9)), space=space) == []


def test_the_same_configuration_comes_once_at_its_best_place(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", finished(0.9, 0.8))
    rows: Rows = [("COMPLETE", 0.9, params_of(7e-5)), *finished(0.8, 0.7)]
    two = write_run(tmp_path / "two", rows, data_fingerprint="5678")
    assert rates(configurations(two, one)) == pytest.approx([1e-5, 7e-5, 2e-5])
    assert rates(configurations(one, one)) == pytest.approx([1e-5, 2e-5])


def test_a_run_that_was_cut_off_gives_what_it_has(tmp_path: Path) -> None:
    location = write_run(tmp_path / "a", finished(0.7, 0.9), gaps=5)  # trials 0 to 4 never ended
    assert RunStore(str(tmp_path), "a").read_json("results.json") is None
    assert rates(configurations(location)) == [2e-5, 1e-5]


def test_a_run_is_found_however_its_folder_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absolute = write_run(tmp_path / "runs" / "a", finished(0.9))
    monkeypatch.chdir(tmp_path)
    for location in (absolute, f"{absolute}/", "runs/a", "./runs/a/", f"file://{absolute}"):
        assert rates(configurations(location)) == [1e-5], location
    monkeypatch.chdir(tmp_path / "runs")
    assert rates(configurations("a")) == [1e-5]


def test_every_folder_that_is_no_run_is_named_in_a_line_of_its_own(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", finished(0.9))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    half = tmp_path / "half"  # without what it ran on
    write_run(half, finished(0.9))
    (half / ENVIRONMENT).unlink()
    bad = [str(tmp_path / name) for name in ("nowhere", "empty", "file", "half")]
    with pytest.raises(ConfigError) as caught:
        configurations(bad[0], run, *bad[1:])
    lines = caught.value.problems
    assert len(lines) == 4
    for line, position, location in zip(lines, (0, 2, 3, 4), bad, strict=True):
        assert line.startswith(f"search.warm_start.{position}: {location} is no run folder; ")


def test_a_run_without_a_finished_trial_is_refused(tmp_path: Path) -> None:
    nothing = write_run(tmp_path / "nothing", [])
    rows: Rows = [("PRUNED", 0.9, params_of(1e-5)), ("FAIL", None, params_of(1e-5))]
    pruned = write_run(tmp_path / "pruned", rows)
    with pytest.raises(ConfigError) as caught:
        configurations(nothing, pruned)
    for line, location in zip(caught.value.problems, (nothing, pruned), strict=True):
        assert f"{location} has no finished trial to begin with; leave it out" in line


@pytest.mark.parametrize("name", ["experiment.yaml", "environment.json", "trials/1/trial.json"])
def test_a_damaged_run_is_one_line_that_names_the_file(tmp_path: Path, name: str) -> None:
    location = write_run(tmp_path / "a", finished(0.9, 0.8))
    (tmp_path / "a" / name).write_text('{"half": ')
    (tmp_path / "a" / f"{name}.good").unlink(missing_ok=True)
    with pytest.raises(ConfigError) as caught:
        configurations(location)
    (line,) = caught.value.problems
    assert line.startswith("search.warm_start.0: ")
    assert f"{location}/{name}" in line


def warm_study(folder: Path, exp: Experiment, warm: list[dict[str, Any]]) -> SearchStudy:
    storage = open_storage(folder / "study.journal")
    return SearchStudy(exp, storage, recipe=RECIPE, num_layers=6, direction="maximize", warm=warm)


def test_warm_configurations_run_behind_the_recipe_and_what_was_enqueued(tmp_path: Path) -> None:
    location = write_run(tmp_path / "other", finished(0.9, 0.8))
    enqueued = {"train.learning_rate": 9e-4}
    exp = experiment(trials=6, enqueue=[enqueued], warm_start=[location])
    warm = warm_configurations(exp, dict(FACTS), "accuracy")
    study = warm_study(tmp_path, exp, warm)
    run_all(study)
    assert [row_of(t, 17)["role"] for t in study.trials] == [
        "default recipe",
        "enqueued",
        "warm start",
        "warm start",
        "sampled",
        "sampled",
    ]
    for trial, params in zip(study.trials[2:4], warm, strict=True):
        assert trial.params == trial.user_attrs["params"] == params


def test_the_sampler_draws_what_a_warm_configuration_leaves_open(tmp_path: Path) -> None:
    kind = {"train.regularization.kind": "weight_decay"}
    warm: list[dict[str, Any]] = [{**kind, "train.epochs": epochs} for epochs in (5, 4, 3, 2)]
    exp = experiment(trials=4, default_recipe=False, sampler="random", pruner="none")
    study = warm_study(tmp_path, exp, warm)
    run_all(study)
    for wanted, trial in zip(warm, study.trials, strict=True):
        assert wanted.items() <= trial.params.items()
    name = "train.regularization.weight_decay.strength"
    for free in ("train.learning_rate", "train.frozen_layers", name):
        assert len({t.params[free] for t in study.trials}) > 1


def test_a_reopened_study_does_not_begin_again(tmp_path: Path) -> None:
    warm = [params_of(1e-5), params_of(2e-5)]
    exp = experiment(trials=5, default_recipe=False)
    run_all(warm_study(tmp_path, exp, warm), until=lambda number: number == 0)
    again = warm_study(tmp_path, exp, warm)
    run_all(again)
    roles = [t.user_attrs.get("role") for t in again.trials]
    assert roles == ["warm start", "warm start", None, None, None]


def test_what_a_finished_search_leaves_warms_another(tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    exp = experiment(trials=8)
    first = warm_study(tmp_path / "journal", exp, [])
    run_all(first)
    store = RunStore(str(tmp_path), "first")
    write_experiment(store, exp)
    store.write_json(ENVIRONMENT, FACTS)
    for trial in first.trials:
        store.write_json(f"{trial_folder(trial.number)}/trial.json", row_of(trial, 17))
    best = max((t for t in first.trials if t.state == TrialState.COMPLETE), key=lambda t: t.value)
    found = configurations(store.location)
    assert found[0] == best.params
    second = SearchStudy(
        experiment(trials=1, default_recipe=False),
        optuna.storages.InMemoryStorage(),
        recipe=RECIPE,
        num_layers=6,
        direction="maximize",
        warm=found,
    )
    planned = second.next_trial()
    assert planned is not None
    assert planned.train.model_dump(mode="json") == best.user_attrs["train"]
