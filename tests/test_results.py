"""What a run has left, as tables in Python, on the screen and in files."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
from optuna.trial import TrialState

from sft_ray import environment
from sft_ray.analysis.outcome import FIGURES, Outcome
from sft_ray.analysis.results import SearchResult, write_frame
from sft_ray.analysis.rows import best_row, ranking, row_of, why_no_gain
from sft_ray.analysis.tables import padding_line, trial_table
from sft_ray.cli import main
from sft_ray.config import Experiment
from sft_ray.errors import ConfigError
from sft_ray.run_store import (
    CHECKSUMS,
    ENVIRONMENT,
    RESULTS,
    RunStore,
    delete_results,
    trial_folder,
    write_experiment,
    write_results,
)
from sft_ray.search.study import SearchStudy, open_storage
from sft_ray.single_trial import run_training
from sft_ray.training.progress import Progress
from tests.search.test_study import RECIPE, experiment, run_all

FIRST = ["state", "role", "reason", "value"]
LAST = ["seed", "restarts", "schedule_percent", "epochs_run", "examples_per_second"]
LAST += [
    "dtype",
    "trunks_read",
    "micro_batch",
    "padding_share",
    "trained_parameters",
    "memory_bytes",
]
LAST += ["train_seconds", "eval_seconds", "overhead_seconds", "trunk_seconds"]


def search_run(storage: Path, direction: str = "maximize") -> tuple[RunStore, SearchStudy]:
    """The folder of a search over invented trials."""
    store = RunStore(str(storage), "x")
    store.pull_journal()
    exp = experiment()
    study = SearchStudy(
        exp, open_storage(store.journal), recipe=RECIPE, num_layers=6, direction=direction
    )
    run_all(study)
    write_experiment(store, exp)
    store.write_json(ENVIRONMENT, {"python": "3"})
    rows = [row_of(trial, exp.seed) for trial in study.trials]
    for row in rows:
        store.write_json(f"{trial_folder(row['number'])}/trial.json", row)
    best = ranking(study.trials, study.sign)[0]
    assert best is not None
    tree = {
        "name": "x",
        "metric": "accuracy",
        "direction": direction,
        "best": best_row(rows[best.number], None, "best"),
        "trials": rows,
        "environment": {"python": "3"},
    }
    write_results(store, tree)
    return store, study


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunStore, SearchStudy]:
    return search_run(tmp_path_factory.mktemp("search"))


def invented(rows: list[dict[str, Any]], direction: str | None = "maximize") -> SearchResult:
    """A result of rows that differ from a plain one as said."""
    plain = {"state": "COMPLETE", "role": "sampled", "reason": None, "value": 0.5}
    plain |= {"params": {}, "metrics": {}, "seed": 17, "schedule_percent": 100}
    trials = [{**plain, "number": i, **row} for i, row in enumerate(rows)]
    return SearchResult("x", {"metric": "accuracy", "direction": direction, "trials": trials})


def test_a_run_is_loaded_as_it_was_returned(
    tmp_path: Path, tiny_experiment: Experiment, tiny_model: Path
) -> None:
    tree = tiny_experiment.to_tree()
    train = {"learning_rate": 5e-3, "epochs": 1}
    tree |= {"search": {"rungs": []}, "train": train, "storage": str(tmp_path)}
    result = run_training(Experiment.from_tree(tree), quiet=True)
    loaded = SearchResult.load(result.location)
    assert loaded == result
    assert loaded.is_finished
    assert loaded.best["trial"] == 0
    frame = loaded.frame()
    assert list(frame.index) == [0]
    assert frame.loc[0, "metric.accuracy"] == frame.loc[0, "value"] == result.trials[0]["value"]
    assert frame.loc[0, "role"] == "single"
    assert frame["epochs_run"].tolist() == [1.0]
    with pytest.raises(ConfigError, match="has no study; only a search keeps one"):
        _ = loaded.study
    heading, line = trial_table(loaded)
    assert heading.split() == ["trial", "state", "accuracy", "percent", "seconds", "settings"]
    assert line.split()[:2] == ["0*", "COMPLETE"]
    assert "lr 0.005, batch 32" in line


def test_the_frame_has_a_row_per_trial_and_a_column_per_figure(
    searched: tuple[RunStore, SearchStudy],
) -> None:
    store, study = searched
    result = SearchResult.load(store.location)
    frame = result.frame()
    names = {name for trial in study.trials for name in trial.user_attrs["params"]}
    assert frame.index.name == "number"
    assert frame.index.tolist() == list(range(12))
    assert list(frame.columns[:4]) == FIRST
    assert list(frame.columns[-len(LAST) :]) == LAST
    assert set(frame.columns[4 : -len(LAST)]) == names
    for trial in study.trials:
        assert frame.loc[trial.number, "state"] == trial.state.name
        for name in names:
            value = trial.user_attrs["params"].get(name)
            cell = frame.loc[trial.number, name]
            assert pd.isna(cell) if value is None else cell == value
    strength = "train.regularization.weight_decay.strength"
    assert 0 < frame[strength].isna().sum() < 12
    types = frame.dtypes.astype(str).to_dict()
    assert types["value"] == types[strength] == types["train.learning_rate"] == "float64"
    assert types["train.epochs"] == types["seed"] == types["memory_bytes"] == "int64"
    assert types["state"] == types["reason"] == types["train.regularization.kind"] == "string"
    assert types["examples_per_second"] == "float64"
    assert "object" not in types.values()
    assert (
        frame.groupby("state")["value"].max()["COMPLETE"]
        == result.trials[result.best["trial"]]["value"]
    )


def test_a_row_has_its_figures_in_one_order(searched: tuple[RunStore, SearchStudy]) -> None:
    _, study = searched
    names = ["number", "state", "role", "reason", "params", "train", "value", "metrics"]
    assert list(row_of(study.trials[0], 17)) == [*names, *LAST[:4], "curve", *LAST[4:]]


def test_the_last_message_of_a_trial_is_its_outcome() -> None:
    told = {name: 3 + i for i, name in enumerate(FIGURES) if name != "overhead_seconds"}
    progress = Progress(percent=33, metrics={"accuracy": 0.5}, fault="not finite", **told)
    message = progress.message(saved_percent=None, restarts=1)
    outcome = Outcome.from_message(message, reason="rung 33", restarts=2, seconds=30.0)
    overhead = 30.0 - told["train_seconds"] - told["eval_seconds"]
    assert outcome == Outcome(
        reason="rung 33",
        restarts=3,
        schedule_percent=33,
        overhead_seconds=overhead,
        **told,
    )


def test_columns_hold_one_kind_of_value() -> None:
    params: list[dict[str, Any]] = [
        {"train.a": 2, "train.b": True, "train.c": 1, "train.d": [1], "train.e": 1},
        {"train.a": "all", "train.b": False, "train.c": 2, "train.d": None, "train.e": 0.5},
        {"train.b": None, "train.e": 2},
    ]
    metrics: list[dict[str, float]] = [{"value": 0.5, "state": 1.0}, {}, {"value": 1}]
    rows = [{"params": p, "metrics": m} for p, m in zip(params, metrics, strict=True)]
    rows[1] |= {"value": None, "state": "FAIL", "reason": "it\nbroke"}
    frame = invented(rows).frame()
    assert frame["train.a"].tolist()[:2] == ["2", "all"]
    assert frame["train.a"].dtype == frame["train.d"].dtype == "string"
    assert frame["train.b"].dtype == "boolean"
    assert frame["train.c"].dtype == frame["train.e"].dtype == np.float64
    assert frame["train.d"][0] == "[1]"
    assert frame["metric.value"].isna().tolist() == [False, True, False]
    assert frame["metric.state"].tolist()[0] == 1.0
    assert frame["value"].isna().tolist() == [False, True, False]
    assert frame["reason"].isna().tolist() == [True, False, True]


def test_a_run_without_trials_has_an_empty_frame() -> None:
    frame = invented([]).frame()
    assert len(frame) == 0
    assert list(frame.columns) == [*FIRST, *LAST]
    assert "object" not in frame.dtypes.astype(str).to_dict().values()
    assert len(trial_table(invented([]))) == 1


@pytest.mark.parametrize("name", ["trials.csv", "trials.parquet", "trials.CSV"])
def test_a_frame_is_written_and_read_again(
    searched: tuple[RunStore, SearchStudy], tmp_path: Path, name: str
) -> None:
    frame = SearchResult.load(searched[0].location).frame()
    path = tmp_path / name
    for _ in range(2):
        write_frame(frame, str(path))
    if path.suffix == ".parquet":
        again = pd.read_parquet(path)
        pd.testing.assert_frame_equal(again, frame)
    else:
        again = pd.read_csv(path, index_col="number")
        pd.testing.assert_frame_equal(again, frame, check_dtype=False)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_frame_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = invented([{}]).frame()
    for name in ("trials.xlsx", "trials"):
        with pytest.raises(ConfigError, match=r"written as \.csv or \.parquet, got"):
            write_frame(frame, str(tmp_path / name))
    for name in ("none/trials.csv", "none/trials.parquet"):
        with pytest.raises(ConfigError, match="cannot be written"):
            write_frame(frame, str(tmp_path / name))

    def half(path: Path) -> None:
        path.write_text("number,sta")
        raise OSError(28, "No space left on device")

    (tmp_path / "old.csv").write_text("old")
    monkeypatch.setattr(frame, "to_csv", half)
    with pytest.raises(ConfigError, match="No space left"):
        write_frame(frame, str(tmp_path / "old.csv"))
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("old.csv", "old")]


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def test_the_study_is_read_from_a_copy(searched: tuple[RunStore, SearchStudy]) -> None:
    store, live = searched
    before = contents(Path(store.location))
    with store.locked():  # a search may go on meanwhile
        study = SearchResult.load(store.location).study
    assert [t.state for t in study.trials] == [t.state for t in live.trials]
    assert [t.params for t in study.trials] == [t.params for t in live.trials]
    assert study.best_value == live.best_score()
    assert study.trials[3].intermediate_values == live.trials[3].intermediate_values
    with pytest.raises(ConfigError, match="open for reading only"):
        study.set_user_attr("mine", 1)
    optuna.copy_study(
        from_study_name=study.study_name,
        from_storage=study._storage,
        to_storage=(mine := optuna.storages.InMemoryStorage()),
        to_study_name="mine",
    )
    assert optuna.load_study(study_name="mine", storage=mine).best_value == study.best_value
    after = contents(Path(store.location))
    assert {n: f for n, f in after.items() if not n.endswith(".lock")} == before


def test_a_torn_or_damaged_study_says_so(tmp_path: Path) -> None:
    store, live = search_run(tmp_path)
    whole = store.journal.read_bytes()
    store.journal.write_bytes(whole + b'{"half": ')
    assert len(SearchResult.load(store.location).study.trials) == len(live.trials)
    assert store.journal.read_bytes() == whole + b'{"half": '
    lines = whole.splitlines(keepends=True)
    for broken in (b"no json\n", b"[]\n", b'{"op_code": 99}\n', b'{"a": "\xff"}\n'):
        store.journal.write_bytes(b"".join([*lines[:5], broken, *lines[6:]]))
        with pytest.raises(ConfigError) as caught:
            _ = SearchResult.load(store.location).study
        assert "damaged" in str(caught.value)


def test_a_run_that_has_not_finished_shows_what_has_ended(tmp_path: Path) -> None:
    store, _ = search_run(tmp_path)
    finished = SearchResult.load(store.location)
    delete_results(store)
    assert not store.exists(RESULTS)
    assert not store.exists(CHECKSUMS)
    store.delete_folder(trial_folder(11))
    (Path(store.location) / trial_folder(11)).mkdir()  # it runs
    result = SearchResult.load(store.location)
    assert not result.is_finished
    assert result.trials == finished.trials[:11]
    assert result.tree["direction"] == "maximize"
    pd.testing.assert_frame_equal(result.frame(), finished.frame()[:11])
    assert len(result.study.trials) == 12
    assert len(trial_table(result)) == 12
    assert "*" not in "".join(trial_table(result))
    with pytest.raises(ConfigError, match="has not finished, so it has no winner yet"):
        _ = result.best
    store.delete_file("study.journal")  # and without its study, by number
    assert [line.split()[0] for line in trial_table(SearchResult.load(store.location), 1)][1]


def test_results_write_the_record_that_a_killed_driver_did_not(tmp_path: Path) -> None:
    store, _ = search_run(tmp_path)
    tree = store.read_json(RESULTS)
    record = Path(store.location) / "trials/3/trial.json"
    text = record.read_text()
    record.unlink()
    write_results(store, tree)
    assert record.read_text() == text
    assert "trials/3/trial.json" in store.read_json(CHECKSUMS)["sha256"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("results.json", '{"half": '),
        ("results.json", "[]"),
        ("results.json", '{"trials": []}'),
        ("results.json", '{"trials": [], "best": {"trial": 1}}'),
        ("results.json", "[" * 100_000),
        ("results.json", "a row without its number"),
        ("results.json", "a value that is a text"),
        ("experiment.yaml", "- a list"),
        ("trials/0/trial.json", "[1]"),
        ("trials/0/trial.json", "{"),
    ],
)
def test_damage_is_one_line_that_names_the_file(tmp_path: Path, name: str, text: str) -> None:
    store, _ = search_run(tmp_path)
    tree = store.read_json(RESULTS)
    if text == "a row without its number":
        del tree["trials"][1]["number"]
        text = json.dumps(tree)
    if text == "a value that is a text":
        tree["trials"][1]["value"] = "0.9"
        text = json.dumps(tree)
    if name != "results.json":
        delete_results(store)
    store.delete_file(f"{name}.good")
    (Path(store.location) / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        SearchResult.load(store.location)
    (line,) = caught.value.problems
    assert f"{store.location}/{name}" in line
    assert "\n" not in line


def test_no_run_is_one_line(tmp_path: Path) -> None:
    for place in (str(tmp_path), str(tmp_path / "none"), f"file://{tmp_path}"):
        with pytest.raises(ConfigError, match="is no run folder; name one") as caught:
            SearchResult.load(place)
        assert str(caught.value).startswith(place)


def test_a_run_is_loaded_from_a_uri(searched: tuple[RunStore, SearchStudy]) -> None:
    store, live = searched
    result = SearchResult.load(f"file://{Path(store.location).absolute()}/")
    here = SearchResult.load(store.location)
    assert result.checkpoint == f"file://{Path(here.checkpoint).absolute()}"
    result.tree["best"]["checkpoint"] = here.checkpoint
    assert result.tree == here.tree
    assert len(result.study.trials) == len(live.trials)


def test_the_table_shows_the_best_first() -> None:
    rows: list[dict[str, Any]] = [
        {"state": "PRUNED", "value": 0.95, "schedule_percent": 10},
        {"state": "COMPLETE", "value": 0.8, "schedule_percent": 100},
        {"state": "COMPLETE", "value": 0.9, "schedule_percent": 100, "train_seconds": 12.34},
        {"state": "PRUNED", "value": 0.5, "schedule_percent": 33},
        {"state": "FAIL", "value": None, "schedule_percent": 0},
    ]
    for row in rows:
        row["params"] = {"train.learning_rate": 2e-5, "train.batch_size": 16}
    result = invented(rows)
    result.tree["best"] = {"trial": 2}
    assert trial_table(result) == [
        "trial  state     accuracy  percent  seconds  settings",
        "   2*  COMPLETE    0.9000      100     12.3  lr 2e-05, batch 16",
        "   1   COMPLETE    0.8000      100      0.0  lr 2e-05, batch 16",
        "   3   PRUNED      0.5000       33      0.0  lr 2e-05, batch 16",
        "   0   PRUNED      0.9500       10      0.0  lr 2e-05, batch 16",
        "   4   FAIL                      0      0.0  lr 2e-05, batch 16",
    ]
    losses = invented(rows[1:3], direction="minimize")
    assert [line.split()[0] for line in trial_table(losses)[1:]] == ["0", "1"]
    unknown = invented(rows[1:3], direction=None)
    assert [line.split()[0] for line in trial_table(unknown)[1:]] == ["0", "1"]


def test_a_run_says_how_much_padding_it_has_trained_with() -> None:
    rows: list[dict[str, Any]] = [
        {"epochs_run": 3.0, "padding_share": 0.01},
        {"epochs_run": 1.0, "padding_share": 0.05},
        {"epochs_run": 0.0, "padding_share": 1.0},  # broke before its first step
        {"epochs_run": 9.0},  # of an older version
    ]
    assert padding_line(rows) == {"padding": "2.0 % of what training computed"}
    assert padding_line(rows[2:]) == {}
    assert padding_line([]) == {}


def test_the_command_says_the_padding_of_the_run_under_its_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, _ = search_run(tmp_path)
    tree = store.read_json(RESULTS)
    for row in tree["trials"]:
        row |= {"epochs_run": 1.0, "padding_share": 0.034}
    store.write_json(RESULTS, tree)
    with pytest.raises(SystemExit):
        main(["results", store.location, "--top", "1"])
    assert capsys.readouterr().out.endswith("\npadding: 3.4 % of what training computed\n")


def test_a_table_of_many_trials_stays_readable() -> None:
    params = {f"train.some_long_setting_{i}": 0.123456 for i in range(9)}
    rows = [{"value": i / 1000, "params": params, "train_seconds": 9e4} for i in range(1000)]
    result = invented(rows)
    lines = trial_table(result)
    assert len(lines) == 1001
    assert {len(line) for line in lines[1:]} == {100}
    assert all(line.endswith("…") for line in lines[1:])
    assert lines[1].startswith(" 999   COMPLETE    0.9990")
    shorter = trial_table(result, 10)
    assert shorter[:11] == lines[:11]
    assert shorter[11:] == ["… and 990 more trials"]
    assert trial_table(result, 999)[-1] == "… and 1 more trial"
    assert trial_table(result, 1000) == lines


def test_a_study_of_a_costly_search_is_read_too(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path), "x")
    store.pull_journal()
    exp = experiment(objective=["accuracy", "train_seconds"], trials=2)
    storage = open_storage(store.journal)
    study = SearchStudy(exp, storage, recipe=RECIPE, num_layers=6, direction="maximize")
    for _ in range(2):
        planned = study.next_trial()
        assert planned is not None
        study.mark(planned.number, 100, 0.5, 1.0)
        study.finish(planned.number, TrialState.COMPLETE, Outcome(score=0.5, train_seconds=1.0))
    write_experiment(store, exp)
    for trial in study.trials:
        row = row_of(trial, exp.seed)
        store.write_json(f"{trial_folder(trial.number)}/trial.json", row)
    result = SearchResult.load(store.location)
    assert (result.tree["metric"], result.tree["direction"]) == ("accuracy", "maximize")
    assert len(result.study.best_trials) == 2


def test_a_default_recipe_that_was_left_out_did_not_fail() -> None:
    assert why_no_gain([{"role": "sampled"}]) == "which was not run"
    assert why_no_gain([{"role": "default recipe"}]) == "which did not finish"


def test_a_package_inside_another_checkout_has_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(tmp_path)]
    (tmp_path / "mine.py").write_text("")
    for words in (["init", "-q"], ["add", "mine.py"], ["commit", "-qm", "mine"]):
        subprocess.run([*init, *words], check=True)
    (tmp_path / "theirs.py").write_text("")
    for name, is_known in (("mine.py", True), ("theirs.py", False)):
        monkeypatch.setattr(environment, "__file__", str(tmp_path / name))
        assert (environment.describe_environment({})["commit"] is not None) == is_known
