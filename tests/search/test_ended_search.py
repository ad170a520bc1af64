"""What an ended search does when its command is given again: no Ray, invented trials."""

from __future__ import annotations

import shlex
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.trial import TrialState

from sft_ray.analysis.outcome import Outcome
from sft_ray.analysis.results import SearchResult
from sft_ray.config import Confirm, Experiment
from sft_ray.errors import ConfigError, TrialError
from sft_ray.run_store import (
    BEFORE,
    CONFIRMATION,
    PREDICTIONS,
    RESULTS,
    RunStore,
    damaged_files,
    open_run,
    write_results,
)
from sft_ray.search import confirm as confirmation
from sft_ray.search import tuner
from sft_ray.search.layout import plan_layout
from sft_ray.search.narration import grown_limits
from sft_ray.search.study import SearchStudy
from sft_ray.search.trials import is_to_be_saved
from sft_ray.search.tuner import run_search
from sft_ray.serving.evaluate import record_test
from sft_ray.training.preparation import Prepared

CONFIRMED = {"top": 1, "seeds": [1]}
FINITE = {"train.learning_rate": {"choice": [1e-4, 1e-3]}, "train.epochs": {"int": [1, 2]}}


def invented(
    prepared: Prepared, store: RunStore, study: SearchStudy, *_: Any, pruned_from: int = 99
) -> None:
    """In place of slots: every trial is a little worse than the one before it."""
    while (planned := study.next_trial()) is not None:
        score, is_pruned = 0.9 - 0.01 * planned.number, planned.number >= pruned_from
        study.mark(planned.number, 33 if is_pruned else 100, score, slot_seconds=1.0)
        saves = is_to_be_saved(planned.assignment(), score, finished=not is_pruned)
        if saves:
            with store.replacing_folder(f"{planned.folder}/best") as folder:
                (folder / "model.safetensors").write_text(f"of trial {planned.number}")
                (folder / PREDICTIONS).write_text("answers")
        end = Outcome(
            score=score,
            metrics={"accuracy": score},
            has_checkpoint=saves,
            schedule_percent=33 if is_pruned else 100,
            train_seconds=1.0,
        )
        state = TrialState.PRUNED if is_pruned else TrialState.COMPLETE
        study.finish(planned.number, state, end)
        store.write_json(f"{planned.folder}/trial.json", study.row(planned.number))
        for path in study.outdated():
            store.delete_folder(f"{path}/best")
    store.push_journal()


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner, "capacity_here", lambda _: {"CPU": 4.0})
    monkeypatch.setattr(tuner, "connected", lambda *_, **__: nullcontext())
    monkeypatch.setattr(tuner, "check_storage_everywhere", lambda _: None)
    monkeypatch.setattr(tuner, "accelerators", list)
    monkeypatch.setattr(
        tuner, "shared_layout", lambda prepared, *_: plan_layout(prepared.experiment, {"CPU": 4})
    )
    monkeypatch.setattr(tuner, "_run", invented)


def interrupted(*_: Any) -> Any:
    raise KeyboardInterrupt


def starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner, "connected", lambda *_, **__: pytest.fail("Ray started"))


def searched(experiment: Experiment, **search: Any) -> tuple[Experiment, SearchResult, Path]:
    tree = experiment.to_tree()
    tree["search"] |= search
    tree["checkpoint"] = {"keep": 2}
    changed = Experiment.from_tree(tree)
    result = run_search(changed, quiet=True)
    return changed, result, Path(result.location)


def confirm(run: Path) -> None:
    """As if its winner, trained from another seed, were in best/."""
    store = open_run(str(run))
    with store.replacing_folder("best") as folder:
        (folder / "model.safetensors").write_text("of a fresh seed")
    store.write_json(CONFIRMATION, CONFIRMED)
    write_results(store, store.read_json(RESULTS))


def cleared(experiment: Experiment) -> tuple[Experiment, SearchResult, Path]:
    """A confirmed run without its trials' folders."""
    experiment, result, run = searched(experiment)
    confirm(run)
    shutil.rmtree(run / "trials")
    return experiment, result, run


def cut_off(experiment: Experiment, run: Any) -> None:
    """Extend a run by two trials, and interrupt it in place of its slots."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuner, "_run", run)
        with pytest.raises(KeyboardInterrupt):
            run_search(experiment, extend=2)


def with_search(experiment: Experiment, **search: Any) -> Experiment:
    tree = experiment.to_tree()
    return Experiment.from_tree({**tree, "search": tree["search"] | search})


def test_a_confirmed_run_whose_trials_were_cleared_keeps_its_outcome(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, result, run = cleared(experiment)
    starts_nothing(monkeypatch)
    again = run_search(experiment, quiet=True)
    assert again.best == result.best
    store = open_run(str(run))
    assert store.read_json(CONFIRMATION) == CONFIRMED
    assert (run / "best/model.safetensors").read_text() == "of a fresh seed"
    assert damaged_files(store) == []
    assert len(list((run / "trials").glob("*/trial.json"))) == 4


def test_new_trials_of_a_run_whose_models_are_gone_keep_theirs(experiment: Experiment) -> None:
    experiment, _, run = cleared(experiment)
    result = run_search(experiment, quiet=True, extend=3)
    assert result.best["trial"] == 4  # worse than the four whose models are gone
    assert sorted(path.parent.name for path in run.glob("trials/*/best")) == ["4", "5"]
    assert (run / "best/model.safetensors").read_text() == "of trial 4"
    for _ in range(2):  # a later start counts the same models
        (run / RESULTS).unlink()
        assert run_search(experiment, quiet=True, extend=3).best["trial"] == 4
        assert sorted(path.parent.name for path in run.glob("trials/*/best")) == ["4", "5"]


def test_the_winner_stays_where_no_trial_since_has_left_a_model(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment, before, run = cleared(experiment)
    monkeypatch.setattr(tuner, "_run", partial(invented, pruned_from=4))
    for trials in (6, 8):
        cut_off(experiment, interrupted)
        capsys.readouterr()
        result = run_search(experiment, extend=2)
        assert "no trial since has left a model" in capsys.readouterr().out
        assert result.best == before.best
        assert [row["state"] for row in result.trials[4:]] == ["PRUNED"] * (trials - 4)
        store = open_run(str(run))
        assert damaged_files(store) == []
        assert store.read_json(CONFIRMATION) == CONFIRMED
        assert not store.exists(BEFORE)
        assert (run / "best/model.safetensors").read_text() == "of a fresh seed"


def test_the_winner_stays_where_a_kill_came_behind_the_last_trial(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment, before, run = cleared(experiment)

    def ended_and_killed(*arguments: Any) -> Any:
        invented(*arguments, pruned_from=4)
        raise KeyboardInterrupt

    cut_off(experiment, ended_and_killed)
    monkeypatch.setattr(tuner, "_run", lambda *_: pytest.fail("trials were run"))
    capsys.readouterr()
    result = run_search(experiment, extend=2)
    assert "no trial since has left a model" in capsys.readouterr().out
    assert (len(result.trials), result.best) == (6, before.best)
    assert open_run(str(run)).read_json(CONFIRMATION) == CONFIRMED
    assert (run / "best/model.safetensors").read_text() == "of a fresh seed"


def test_a_confirmation_that_goes_with_damage_is_spoken_of(
    experiment: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment, _, run = searched(experiment)
    confirm(run)
    environment = run / "environment.json"
    environment.write_text(environment.read_text() + " ")
    (run / BEFORE).write_text('{"best": {"trial": 3}, "confirm.json": null}')  # of a kill long ago
    run_search(experiment)
    assert (
        "the confirmation of the outcome before goes; `sft-ray confirm" in capsys.readouterr().out
    )
    assert not (run / CONFIRMATION).exists()
    assert not (run / BEFORE).exists()
    assert (run / "best/model.safetensors").read_text() == "of trial 0"


def test_an_outcome_stays_where_no_other_can_be_made(
    experiment: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment, _, run = cleared(experiment)
    (run / "best/model.safetensors").write_text("damaged")
    before = (run / RESULTS).read_text()
    with pytest.raises(TrialError, match="none of 4 trials left a whole model"):
        run_search(experiment)
    lines = capsys.readouterr().out
    assert "trials/0/best is gone; the model of trial 0 is lost" in lines
    assert (run / RESULTS).read_text() == before
    assert (run / CONFIRMATION).exists()


def test_a_damaged_record_costs_no_confirmation(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment, result, run = searched(experiment)
    confirm(run)
    record = run / "trials/1/trial.json"
    text = record.read_text()
    record.write_text("{")
    starts_nothing(monkeypatch)
    assert run_search(experiment).best == result.best
    assert "trials/1/trial.json was damaged and is written anew" in capsys.readouterr().out
    assert record.read_text() == text
    assert (run / CONFIRMATION).exists()


@pytest.mark.parametrize(
    ("budget", "key", "said"),
    [
        ({"patience": 2}, "patience", "no better trial among the last 2; raise"),
        ({"worker_hours": 3 / 3600}, "worker_hours", "worker hours; raise"),
        ({"target": 0.5}, "target", "target 0.5 reached; change"),
    ],
)
def test_a_search_that_a_budget_ended_says_so_and_how_it_goes_on(
    experiment: Experiment,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    budget: dict[str, Any],
    key: str,
    said: str,
) -> None:
    experiment, result, run = searched(experiment, trials=9, budget=budget)
    ended = len(result.trials)
    assert ended < 9
    assert result.tree["ended_by"] == f"search.budget.{key}"
    files = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with monkeypatch.context() as patch:
        starts_nothing(patch)
        again = run_search(experiment, extend=20, source="my.yaml")
    lines = capsys.readouterr().out
    assert "nothing to run: " in lines
    assert f"{said} search.budget.{key}, or set it to null; its outcome:" in lines
    assert f"ended by    search.budget.{key}={budget[key]:g}" in lines
    assert again.tree == result.tree
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == files
    [command] = [line for line in lines.splitlines() if "sft-ray search" in line]
    values = dict(word.split("=") for word in shlex.split(command)[3:])
    assert int(values.pop("search.trials")) == 29  # not used up
    [(changed, value)] = values.items()
    assert changed == f"search.budget.{key}"
    limit = None if value == "null" else float(value)
    grown = with_search(experiment, trials=29, budget={key: limit and type(budget[key])(limit)})
    assert len(run_search(grown, quiet=True).trials) > ended


def test_a_search_of_all_there_is_proposes_no_other(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment, result, _ = searched(experiment, trials=9, space=FINITE, default_recipe=False)
    assert (len(result.trials), result.tree["ended_by"]) == (4, "search.space")
    starts_nothing(monkeypatch)
    run_search(experiment, extend=5, source="my.yaml")
    lines = capsys.readouterr().out
    assert "nothing to run: all of its 4 configurations have run; a larger space" in lines
    assert "ended by    its space" in lines
    assert "sft-ray search" not in lines


def test_a_space_that_is_used_up_is_said_before_a_budget_that_is(
    experiment: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    budget = {"patience": 3}
    _, result, _ = searched(experiment, trials=9, space=FINITE, default_recipe=False, budget=budget)
    assert (len(result.trials), result.tree["ended_by"]) == (4, "search.space")


def test_what_is_proposed_is_of_the_limit_that_is_reached_now(
    experiment: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment, result, _ = searched(experiment, trials=3, budget={"patience": 2})
    assert result.tree["ended_by"] == "search.budget.patience"
    capsys.readouterr()
    without = with_search(experiment, budget={})
    run_search(without, source="my.yaml search.budget.patience=null")
    lines = capsys.readouterr().out
    assert "nothing to run: all of 3 trials have run; raise search.trials; its outcome:" in lines
    assert "ended by" not in lines
    assert "sft-ray search my.yaml search.budget.patience=null search.trials=6\n" in lines


def test_a_large_patience_is_proposed_as_a_whole_number(experiment: Experiment) -> None:
    experiment = with_search(experiment, budget={"patience": 512})
    tree = {"ended_by": "search.budget.patience", "wall_seconds": 1.0, "trials": [{}]}
    grown = grown_limits(SearchResult("run", tree | {"environment": {}}), experiment)
    assert grown["search.budget.patience"] == "1024"


def test_a_search_whose_trials_are_used_up_grows(
    experiment: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment, result, _ = searched(experiment)
    assert result.tree["ended_by"] == "search.trials"
    run_search(experiment, source="my.yaml search.trials=4")
    lines = capsys.readouterr().out
    assert "ended by" not in lines
    assert "sft-ray search my.yaml search.trials=8" in lines
    assert len(run_search(experiment, quiet=True, extend=4).trials) == 8


def with_confirmation(experiment: Experiment, seeds: int = 2) -> Experiment:
    return experiment.model_copy(update={"confirm": Confirm(top=1, seeds=seeds)})


def confirms(store: RunStore, plan: Confirm, **_: Any) -> Any:
    """In place of a confirmation: its file, and its word in the outcome."""
    seeds = confirmation.fresh_seeds(17, plan.seeds)
    store.write_json(CONFIRMATION, {"top": plan.top, "seeds": seeds})
    tree = store.read_json(RESULTS)
    tree["best"]["expected"] = {"mean": 0.5, "n": 2, "low": 0.4, "high": 0.6}
    write_results(store, tree)
    return SimpleNamespace(result=SearchResult(store.location, tree))


def test_an_extension_that_was_interrupted_in_its_confirmation_adds_no_more_trials(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = with_confirmation(experiment)
    assert experiment.seed == 17
    monkeypatch.setattr(confirmation, "run_confirm", confirms)
    first = run_search(experiment, quiet=True)
    run = Path(first.location)

    def before_its_outcome(store: RunStore, plan: Confirm, **how: Any) -> None:
        outcome = store.read_json(RESULTS)
        confirms(store, plan, **how)
        write_results(store, outcome)
        interrupted()

    with monkeypatch.context() as patch:
        # The second time it goes on where it stopped.
        for stops in (lambda *_, **__: interrupted(), before_its_outcome):
            patch.setattr(confirmation, "run_confirm", stops)
            with pytest.raises(KeyboardInterrupt):
                run_search(experiment, extend=2)
            assert (run / RESULTS).exists()
    assert len(run_search(experiment, quiet=True, extend=2).trials) == 6
    assert "is not confirmed yet, so --extend adds no trials this time" in capsys.readouterr().out
    assert (run / CONFIRMATION).exists()
    other_plan = with_confirmation(experiment, seeds=3)
    assert len(run_search(other_plan, quiet=True, extend=2).trials) == 6
    (run / CONFIRMATION).write_text("{")
    assert len(run_search(other_plan, quiet=True, extend=2).trials) == 6
    assert len(run_search(other_plan, extend=2).trials) == 8
    assert "is not confirmed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("budget", "left"), [({"worker_hours": 1}, 900 - 2), ({"wall_minutes": 40}, 2400)]
)
def test_runs_of_an_interrupted_confirmation_count_in_its_budget(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, budget: dict[str, Any], left: float
) -> None:
    """Trials of a second each, by two workers in two slots."""
    given: list[float | None] = []

    def interrupts(*_: Any, seconds: float | None, **__: Any) -> None:
        given.append(seconds)
        raise KeyboardInterrupt

    monkeypatch.setattr(confirmation, "run_confirm", interrupts)
    resources = experiment.resources.model_copy(update={"slots": 2})
    asked = with_confirmation(with_search(experiment, budget=budget))
    asked = asked.model_copy(update={"resources": resources})
    store = RunStore(experiment.storage, experiment.name)
    for number in range(3):
        with pytest.raises(KeyboardInterrupt):
            run_search(asked, quiet=True)
        times = {"train_seconds": 100.0, "eval_seconds": 20.0, "overhead_seconds": 5.0}
        store.write_json(f"confirm/{number}/trial.json", times)
    assert given == pytest.approx([left - 125 * n / 2 for n in range(3)], abs=10)
    store.write_json("confirm/0/trial.json", [])
    with pytest.raises(ConfigError, match=r"confirm/0/trial\.json: damaged"):
        run_search(asked, quiet=True)


def test_the_card_of_a_search_says_how_often_the_test_split_was_scored(
    experiment: Experiment,
) -> None:
    experiment, _, run = searched(experiment)
    card = run / "best" / "README.md"
    assert "had not been scored when this card was written" in card.read_text()
    record_test(open_run(str(run)), str(run), {"accuracy": 0.5}, 40)
    run_search(experiment, quiet=True, extend=1)
    assert "the test split was scored once" in card.read_text()
