"""Whole searches on a real Ray cluster with real workers."""

import errno
import io
import json
import shutil
import subprocess
import sys
import textwrap
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import optuna
import pyarrow.parquet as pq
import pytest
import ray
import torch
from transformers import AutoModelForTokenClassification

from sft_ray.analysis.results import SearchResult
from sft_ray.analysis.tables import STARTUP
from sft_ray.config import Experiment
from sft_ray.errors import ConfigError, ResourceError, TrialError
from sft_ray.run_store import JOURNAL, METRICS, RunStore
from sft_ray.search.study import open_storage
from sft_ray.search.tuner import run_search
from sft_ray.serving.evaluate import run_evaluation
from sft_ray.training import metrics
from sft_ray.training.world import resolve_precision
from tests import faults
from tests.models import KEYWORDS, toy_rows

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(600)]

RESCORE = """
    import csv, json, sys
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder, rows = sys.argv[1], json.load(open(sys.argv[2]))
    classify = pipeline("text-classification", folder, truncation=True, max_length=32)
    answers = [answer["label"] for answer in classify([row["text"] for row in rows])]
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    right = sum(answer == str(row["label"]) for answer, row in zip(answers, rows))
    print(json.dumps([right / len(rows), sorted(model.config.id2label.values())]))
"""


def with_search(experiment: Experiment, **search: object) -> Experiment:
    tree = experiment.to_tree()
    return Experiment.from_tree({**tree, "search": {**tree["search"], **search}})


def rescore(result: SearchResult, experiment: Experiment, folder: Path) -> tuple[float, list[str]]:
    """Accuracy and label names of best/ by an independent script, on the same validation rows."""
    from sft_ray.training import TASKS, sources

    fields = TASKS["text-classification"].fields
    source = sources.read_splits(experiment.data, fields, experiment.seed)
    rows = source.tables["validation"].to_pylist()
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "rescore.py").write_text(textwrap.dedent(RESCORE))
    done = subprocess.run(
        [sys.executable, folder / "rescore.py", str(result.checkpoint), folder / "rows.json"],
        capture_output=True,
        text=True,
        check=True,
    )
    accuracy, labels = json.loads(done.stdout.splitlines()[-1])
    return accuracy, labels


def slot_seconds(tree: dict[str, Any]) -> float:
    """All that the trials after the first claim to have cost."""
    parts = ("train_seconds", "eval_seconds", "overhead_seconds")
    return sum(trial[part] for trial in tree["trials"][1:] for part in parts)


def seconds_between_ends(run: Path) -> float:
    """From the end of the first trial to the end of the last, by Optuna's clock."""
    study = optuna.load_study(storage=open_storage(run / JOURNAL), study_name="search")
    ends = [trial.datetime_complete for trial in study.trials]
    assert None not in ends
    return (max(ends) - min(ends)).total_seconds()


@pytest.fixture(scope="module")
def finished(
    ray_cluster: None, tiny_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Experiment, SearchResult, str]:
    """One undisturbed search of four trials and what it printed."""
    storage = str(tmp_path_factory.mktemp("finished") / "runs")
    experiment = tiny_experiment.model_copy(update={"storage": storage})
    with redirect_stdout(io.StringIO()) as printed:
        result = run_search(experiment)
    return experiment, result, printed.getvalue()


def test_a_search_ends_with_the_best_checkpoint_and_the_same_command_only_shows_it(
    finished: tuple[Experiment, SearchResult, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    experiment, result, printed = finished
    run = Path(result.location)

    tree = json.loads((run / "results.json").read_text())
    assert tree == result.tree
    assert [t["number"] for t in tree["trials"]] == [0, 1, 2, 3]
    assert tree["trials"][0]["role"] == "default recipe"
    assert {t["state"] for t in tree["trials"]} <= {"COMPLETE", "PRUNED"}
    for trial in tree["trials"]:
        assert trial["overhead_seconds"] >= 0
        stored = json.loads((run / "trials" / str(trial["number"]) / "trial.json").read_text())
        assert stored == trial
        marks = (run / "trials" / str(trial["number"]) / "metrics.jsonl").read_text().splitlines()
        curve = [[m["percent"], m["metrics"]["accuracy"]] for m in map(json.loads, marks)]
        assert curve == trial["curve"]
    complete = [t for t in tree["trials"] if t["state"] == "COMPLETE"]
    top = max(t["value"] for t in complete)
    assert result.best["validation"]["accuracy"] == top
    assert result.best["complete"]
    assert result.best["gain_over_default"] == pytest.approx(top - tree["trials"][0]["value"])
    parts = tree["startup_parts"]
    assert list(parts) == list(STARTUP)
    assert all(seconds > 0 for seconds in parts.values())
    assert sum(parts.values()) == pytest.approx(tree["startup_seconds"])
    assert "\nstartup " in printed

    accuracy, labels = rescore(result, experiment, tmp_path)
    assert accuracy == pytest.approx(top, abs=0.003)
    assert labels == ["animal", "plant", "tool"]
    card = (run / "best" / "README.md").read_text()
    assert f"| accuracy | {top:.4f} |" in card
    assert "animal, plant, tool" in card
    assert not list(run.rglob("*.pkl"))
    assert not (run.parent / ".ray").exists() or not list((run.parent / ".ray").iterdir())

    overheads = sorted(t["overhead_seconds"] for t in tree["trials"][1:])
    assert overheads[len(overheads) // 2] < 1.0
    assert slot_seconds(tree) == pytest.approx(seconds_between_ends(run), rel=0.01, abs=0.1)

    number_format = str(resolve_precision("auto", torch.device("cpu"))[0]).removeprefix("torch.")
    for said in (
        number_format,
        "1 slot x 2 workers",
        "best 1/3",
        "over the default recipe",
        "next",
    ):
        assert said in printed
    assert f"trial 3   {tree['trials'][3]['state']}" in printed
    assert "Warning" not in printed

    before = (run / JOURNAL).read_bytes()
    again = run_search(experiment)
    assert again.tree == tree
    assert "is finished; its outcome" in capsys.readouterr().out
    assert (run / JOURNAL).read_bytes() == before


def test_a_slot_of_two_workers_starts_no_process_that_serves_others(
    finished: tuple[Experiment, SearchResult, str],
) -> None:
    started = {actor["ActorClassName"] for actor in ray._private.state.actors().values()}
    assert {"Watch", "Mailbox", "Controller", "RayTrainWorker"} <= started
    assert not {"DatasetManager", "_AutoscalingCoordinatorActor"} & started


def test_more_trials_extend_a_finished_search_and_nothing_runs_twice(
    finished: tuple[Experiment, SearchResult, str], experiment: Experiment
) -> None:
    _, straight, _ = finished
    shutil.copytree(Path(straight.location).parent, experiment.storage)
    wanted = {"train.learning_rate": 1.25e-3}
    longer = run_search(with_search(experiment, enqueue=[wanted]), extend=1, quiet=True)
    assert longer.trials[:4] == straight.trials
    assert len(longer.trials) == 5
    assert longer.trials[4]["params"].items() >= wanted.items()
    experiment = with_search(experiment, enqueue=[wanted])
    with pytest.raises(ConfigError, match="another experiment"):
        run_search(with_search(experiment, trials=5, sampler="random"), quiet=True)


@pytest.mark.cluster
def test_a_trial_between_its_marks_ends_soon_after_the_search(experiment: Experiment) -> None:
    """The first has no mark until its end, and would come to that; the second ends the search.

    That one waits, too, for slots do not come up in the same second.
    """
    rates = [1.6e-3, 2.6e-3]
    tree = with_search(
        experiment,
        default_recipe=False,
        rungs=[],
        budget={"target": 0.0},
        space={"train.learning_rate": {"log_uniform": [1e-3, 1e-2]}, "train.epochs": 1},
        enqueue=[{"train.learning_rate": rate} for rate in rates],
    ).to_tree()
    tree["resources"] |= {"slots": 2, "workers_per_trial": 1}
    lingers = [
        faults.order(name, learning_rate=rate, step=step, rank=0, action="linger")
        for name, rate, step in (("a", rates[0], 1), ("b", rates[0], 2), ("c", rates[1], 1))
    ]
    result = run_search(Experiment.from_tree(tree), quiet=True)
    assert not any(fault.exists() for fault in lingers)
    late, winner = result.trials
    assert (winner["state"], winner["curve"][-1][0]) == ("COMPLETE", 100)
    assert (late["state"], late["reason"]) == ("PRUNED", "budget: target 0 reached")
    assert (late["value"], late["curve"]) == (None, [])
    assert 2 * faults.LINGER_SECONDS < late["train_seconds"] < slot_seconds({"trials": [{}, late]})
    assert result.tree["ended_by"] == "search.budget.target"
    assert not list(Path(result.location).glob("trials/*/last"))


def with_workers(experiment: Experiment, workers: int) -> Experiment:
    resources = experiment.resources.model_copy(update={"workers_per_trial": workers})
    return experiment.model_copy(update={"resources": resources})


@pytest.mark.cluster
@pytest.mark.parametrize("workers", [1, 2])
def test_a_trial_that_raises_fails_alone_and_a_dead_worker_costs_a_restart(
    experiment: Experiment, tmp_path: Path, workers: int
) -> None:
    rates = [1.5e-3, 2.5e-3, 3.5e-3]
    experiment = with_search(
        with_workers(experiment, workers),
        default_recipe=False,
        pruner="none",
        trials=3,
        enqueue=[{"train.learning_rate": rate, "train.epochs": 2} for rate in rates],
    )
    raising = faults.order("a", learning_rate=rates[0], step=12, rank=workers - 1, action="raise")
    dying = faults.order("b", learning_rate=rates[1], step=14, rank=workers - 1, action="die")
    (Path(experiment.storage) / "tiny").mkdir(parents=True)
    result = run_search(experiment, quiet=True, fresh=True)
    assert (Path(experiment.storage) / "tiny.old-1").is_dir()
    assert not raising.exists()
    assert not dying.exists()
    failed, restarted, calm = result.trials
    assert failed["state"] == "FAIL"
    assert failed["reason"] == "ValueError: injected: the loss function has a bug"
    assert "strike" in (Path(result.location) / "errors.log").read_text()
    assert (restarted["state"], restarted["restarts"]) == ("COMPLETE", 1)
    assert (calm["state"], calm["restarts"]) == ("COMPLETE", 0)
    assert len({tuple(map(tuple, t["curve"])) for t in (restarted, calm)}) == 2
    assert all(len(t["curve"]) == 4 for t in (restarted, calm))


@pytest.mark.cluster
@pytest.mark.parametrize("workers", [1, 2])
def test_a_restarted_trial_goes_on_from_its_last_state_as_if_nothing_had_happened(
    experiment: Experiment, workers: int
) -> None:
    # Each configuration runs twice; its fault strikes the first time only.
    rates = [1.7e-3, 1.7e-3, 2.7e-3, 2.7e-3]
    tree = with_search(
        with_workers(experiment, workers),
        default_recipe=False,
        pruner="none",
        trials=4,
        space={"train.learning_rate": {"log_uniform": [1e-3, 1e-2]}, "train.epochs": 2},
        enqueue=[{"train.learning_rate": rate} for rate in rates],
    ).to_tree()
    tree["train"]["micro_batch"] = 16
    tree["checkpoint"]["every_minutes"] = 1e-6
    dying = faults.order("a", learning_rate=rates[0], step=10, rank=workers - 1, action="die")
    short = faults.order("b", learning_rate=rates[2], step=10, rank=0, action="run out of memory")
    result = run_search(Experiment.from_tree(tree), quiet=True)
    assert not dying.exists()
    assert not short.exists()
    assert [t["restarts"] for t in result.trials] == [1, 0, 1, 0]
    assert result.trials[0]["curve"] == result.trials[1]["curve"]
    assert [t["micro_batch"] for t in result.trials] == [16, 16, 8, 16]
    assert {t["state"] for t in result.trials} == {"COMPLETE"}
    assert not list(Path(result.location).glob("trials/*/last"))


@pytest.mark.cluster
def test_another_task_ends_with_its_own_kind_of_model_and_answers(
    experiment: Experiment, tmp_path: Path
) -> None:
    groups = {word: group for group, words in KEYWORDS.items() for word in words}
    rows = [
        {"tokens": text.split(), "tags": [f"B-{groups[w]}" if w in groups else "O" for w in words]}
        for text, _ in toy_rows(160, seed=5)
        for words in [text.split()]
    ]
    data = tmp_path / "词.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # One worker, as there will be one process: bf16 rounds other batches otherwise.
    alone = with_workers(experiment, 1)
    tree = with_search(alone, trials=2, default_recipe=False, pruner="none").to_tree()
    tree |= {"name": "命名实体", "task": "token-classification"}
    tree["data"] |= {"train": str(data), "split": {"validation": 0.2, "test": 0.2}}
    result = run_search(Experiment.from_tree(tree), quiet=True)
    run = Path(result.location)
    reported = result.best["validation"]
    assert result.tree["metric"] == "f1"
    found = run_evaluation(str(run), "validation").metrics
    assert found == pytest.approx(reported, abs=1e-6)
    model = AutoModelForTokenClassification.from_pretrained(run / "best")
    assert set(model.config.id2label.values()) == {"O", "B-animal", "B-plant", "B-tool"}
    table = pq.read_table(run / "predictions.parquet")
    truth, answers = (table.column(c).to_pylist() for c in ("tags", "predicted_tags"))
    assert metrics.entities(truth, answers, ["O", "B-animal"])["f1"] == pytest.approx(
        reported["f1"]
    )
    assert not (run / "best" / "predictions.parquet").exists()


@pytest.mark.cluster
def test_a_killed_driver_loses_nothing_but_the_work_since_the_last_state(
    finished: tuple[Experiment, SearchResult, str], experiment: Experiment
) -> None:
    _, straight, _ = finished
    always = experiment.checkpoint.model_copy(update={"every_minutes": 1e-6})
    interrupted = experiment.model_copy(update={"name": "interrupted", "checkpoint": always})
    script = textwrap.dedent(
        """
        import os, sys
        import ray
        from optuna.trial import TrialState
        from sft_ray.config import Experiment
        from sft_ray.search import conductor
        from sft_ray.search.tuner import run_search

        honest = conductor.Conductor.on_message
        def on_message(self, tune_id, message):
            finished = sum(t.state.is_finished() for t in self.trials.trials)
            go_on = honest(self, tune_id, message)
            if finished and message["index"] == 1 and go_on:
                os._exit(9)
            return go_on
        conductor.Conductor.on_message = on_message
        import json
        run_search(Experiment.from_tree(json.load(open(sys.argv[1]))), address=sys.argv[2])
        """
    )
    folder = Path(experiment.storage)
    folder.mkdir()
    (folder / "tree.json").write_text(json.dumps(interrupted.to_tree()))
    (folder / "driver.py").write_text(script)
    address = ray.get_runtime_context().gcs_address
    died = subprocess.run(
        [sys.executable, folder / "driver.py", folder / "tree.json", address],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert died.returncode == 9, died.stderr
    run = folder / "interrupted"
    assert not (run / "results.json").exists()
    # That of a trial which has just finished may be there, too.
    *_, state = sorted(run.glob("trials/*/last/state.json"))
    number = int(state.parts[-3])
    before = json.loads(state.read_text())["last"]["train_seconds"]
    resumed = run_search(interrupted, quiet=True)
    lines = (run / "trials" / str(number) / "metrics.jsonl").read_text().splitlines()
    replayed = [json.loads(line).get("replayed", False) for line in lines]
    assert replayed[0] is True
    assert replayed == sorted(replayed, reverse=True)
    assert not all(replayed) or resumed.trials[number]["state"] == "PRUNED"
    assert resumed.trials[number]["train_seconds"] >= before
    assert resumed.trials[number]["overhead_seconds"] > 0
    assert not list(run.glob("trials/*/last"))
    assert [t["number"] for t in resumed.trials] == [0, 1, 2, 3]
    for mine, theirs in zip(resumed.trials, straight.trials, strict=True):
        assert (mine["params"], mine["state"]) == (theirs["params"], theirs["state"])
        assert mine["curve"] == theirs["curve"]


@pytest.mark.cluster
def test_a_full_disk_of_a_worker_stops_the_search_and_costs_no_trial(
    experiment: Experiment,
) -> None:
    rates = [1.6e-3, 2.6e-3, 3.6e-3]
    search = with_search(
        with_workers(experiment, 1),
        default_recipe=False,
        pruner="none",
        trials=3,
        enqueue=[{"train.learning_rate": rate, "train.epochs": 2} for rate in rates],
    )
    full = faults.order("a", learning_rate=rates[1], step=14, rank=0, action="run out of disk")
    with pytest.raises(ResourceError, match=r"injected: No space left.*the same command goes on"):
        run_search(search, quiet=True)
    assert not full.exists()
    run = Path(search.storage) / search.name
    assert not (run / "results.json").exists()
    result = run_search(search, quiet=True)
    assert [t["number"] for t in result.trials] == [0, 1, 2]
    assert {t["state"] for t in result.trials} == {"COMPLETE"}
    assert [t["params"]["train.learning_rate"] for t in result.trials] == rates


@pytest.mark.cluster
def test_two_slots_share_a_search(experiment: Experiment) -> None:
    tree = with_search(experiment, trials=5).to_tree()
    tree["resources"] = {"workers_per_trial": 1, "cpus_per_worker": 1, "slots": 2}
    result = run_search(Experiment.from_tree(tree), quiet=True)
    assert [t["number"] for t in result.trials] == list(range(5))
    assert all(t["state"] in {"COMPLETE", "PRUNED"} for t in result.trials)
    rates = {t["params"]["train.learning_rate"] for t in result.trials}
    assert len(rates) == 5
    assert result.tree["environment"]["slots"] == 2


@pytest.mark.cluster
def test_a_configuration_that_diverges_is_at_fault_and_the_search_goes_on(
    experiment: Experiment,
) -> None:
    # Decay multiplies every weight by about -900 per step at the peak of the schedule.
    decay = {"kind": "weight_decay", "strength": {"uniform": [900, 1000]}}
    space = {"train.learning_rate": 1.0, "train.epochs": 3, "train.regularization": decay}
    experiment = with_search(experiment, space=space, trials=2, pruner="none")
    result = run_search(experiment, quiet=True)
    default, diverged = result.trials
    assert default["state"] == "COMPLETE"
    assert diverged["state"] == "PRUNED"
    assert "not finite" in diverged["reason"]
    metrics = Path(result.location) / "trials" / "1" / "metrics.jsonl"
    assert "NaN" not in metrics.read_text()
    assert "Infinity" not in metrics.read_text()


def test_more_workers_than_there_are_are_refused_before_anything_is_written(
    experiment: Experiment,
) -> None:
    tree = experiment.to_tree()
    tree["resources"] = {"workers_per_trial": 64}
    with pytest.raises(ResourceError, match="64 workers need 64 CPUs, the cluster has 4 CPUs"):
        run_search(Experiment.from_tree(tree), quiet=True)
    assert not Path(experiment.storage).exists()


@pytest.mark.cluster
def test_a_full_disk_under_the_driver_is_told_as_it_is_and_the_search_goes_on(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = with_search(experiment, trials=1)
    write_text = RunStore.write_text

    def full(store: RunStore, path: str, text: str, **how: bool) -> None:
        if path.endswith(METRICS):
            raise OSError(errno.ENOSPC, "No space left on device", path)
        write_text(store, path, text, **how)

    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "write_text", full)
        with pytest.raises(OSError, match="No space left on device"):
            run_search(experiment, quiet=True)
    assert [trial["state"] for trial in run_search(experiment, quiet=True).trials] == ["COMPLETE"]


@pytest.mark.cluster
def test_a_search_whose_slots_cannot_start_ends_with_the_cause(
    experiment: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    faults.FAULT_FOLDER.mkdir(exist_ok=True)
    faults.NO_LOADING.touch()
    try:
        with pytest.raises(TrialError, match="failures in a row"):
            run_search(experiment)
    finally:
        faults.NO_LOADING.unlink()
    log = (Path(experiment.storage) / "tiny" / "errors.log").read_text()
    assert "Traceback" in log
    assert "injected: the weights are gone" in log
    trial = json.loads(
        (Path(experiment.storage) / "tiny" / "trials" / "0" / "trial.json").read_text()
    )
    assert (trial["state"], trial["restarts"]) == ("FAIL", 2)
    said = capsys.readouterr().out
    assert "lost its slot (OSError: injected: the weights are gone)" in said
    assert "Traceback" not in said
