"""What follows a search, on real Ray: confirmation, ablations around its winner, replays."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_ray.ablation_file import SHARE, Ablation
from sft_ray.analysis.results import SearchResult
from sft_ray.analysis.rows import best_row
from sft_ray.config import Confirm, Experiment
from sft_ray.errors import ConfigError
from sft_ray.recipes import YARDSTICK
from sft_ray.run_store import CONFIRMATION, RESULTS, TEST_ACCESS
from sft_ray.screen import Screen
from sft_ray.search.ablate import ablation_seeds, run_ablations
from sft_ray.search.confirm import fresh_seeds, run_confirm
from sft_ray.search.replay import _with_one_slot, _within, run_replay
from sft_ray.search.tuner import run_search
from sft_ray.serving.verify import run_verification
from sft_ray.single_trial import run_training
from tests.models import toy_rows, write_csv

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(900)]

RATE = "train.learning_rate"
GOOD, BAD = 1e-2, 1e-5  # what the tiny model learns with, and what leaves it as it was
PLAN = Confirm(top=2, seeds=2)


def files_of(folder: Path) -> dict[str, str]:
    """Every file of a run with its content's hash."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def edit(file: Path, change: Callable[[Any], object]) -> None:
    tree = read(file)
    change(tree)
    file.write_text(json.dumps(tree))


@pytest.fixture(scope="module")
def searched(
    ray_cluster: None, tiny_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Experiment, SearchResult, str]:
    """A search that ends with its confirmation, and what it printed."""
    tree = tiny_experiment.to_tree()
    tree["search"] |= {
        "space": {
            RATE: {"log_uniform": [1e-6, 1e-2]},
            "train.epochs": 4,
            "train.dropout": 0.0,  # few steps: too short a schedule for being called diverged
        },
        "enqueue": [{RATE: GOOD}, {RATE: BAD}],
        "pruner": "none",
        "trials": 3,
    }
    tree |= {
        "confirm": PLAN.model_dump(),
        "resources": {"workers_per_trial": 1, "cpus_per_worker": 1, "slots": 1},
        "storage": str(tmp_path_factory.mktemp("confirmed") / "runs"),
    }
    experiment = Experiment.from_tree(tree)
    with redirect_stdout(io.StringIO()) as printed:
        result = run_search(experiment)
    return experiment, result, printed.getvalue()


def test_a_search_ends_with_its_winner_confirmed_and_does_so_once(
    searched: tuple[Experiment, SearchResult, str], capsys: pytest.CaptureFixture[str]
) -> None:
    experiment, result, printed = searched
    run = Path(result.location)
    seeds = fresh_seeds(experiment.seed, 2)
    tree = read(run / CONFIRMATION)
    assert read(run / RESULTS) == result.tree
    assert tree["seeds"] == seeds
    assert not {experiment.seed, *(row["seed"] for row in result.trials)} & set(seeds)

    winner, *others = tree["configurations"]
    assert winner["arm"] == "trial 1"
    assert YARDSTICK in [row["arm"] for row in others]
    for row in tree["configurations"]:  # all on the same seeds, in the same order
        assert list(row["scores"]) == [str(seed) for seed in seeds]
        assert row["expected"]["n"] == 2
    runs = {r["key"]: r for r in map(read, run.glob("confirm/*/trial.json"))}
    assert len(runs) == 2 * len(tree["configurations"])
    mine = {r["seed"]: r for r in runs.values() if r["train"][RATE.split(".")[1]] == GOOD}
    assert [mine[seed]["value"] for seed in seeds] == list(winner["scores"].values())
    default = next(row for row in others if row["arm"] == YARDSTICK)
    gains = [winner["scores"][str(s)] - default["scores"][str(s)] for s in seeds]
    assert winner["over_default"]["difference"] == pytest.approx(sum(gains) / 2)
    assert winner["over_default"]["n"] == 2

    # best/ is the model of the first seed, whichever of the two is better.
    best, row = result.best, mine[seeds[0]]
    assert best["expected"] == winner["expected"]
    assert best["expected"]["mean"] == pytest.approx(sum(winner["scores"].values()) / 2)
    assert best["validation"] == row["metrics"]
    assert (best["seed"], best["trial"], best["complete"]) == (seeds[0], 1, True)
    assert best["gain_over_default"] == pytest.approx(sum(gains) / 2)
    assert best["flattered"] == pytest.approx(result.trials[1]["value"] - best["expected"]["mean"])
    assert best["test"] == tree["test"]["trial 1"]
    kept = {file.parent.name for file in run.glob("confirm/*/best")}
    assert kept == {key for key, r in runs.items() if r["seed"] == seeds[0]}
    verification = run_verification(result.location)
    assert verification.ok, verification
    card = (run / "best" / "README.md").read_text()
    assert f"fresh seeds the configuration reaches {best['expected']['mean']:.4f}" in card
    assert f"Seed {seeds[0]}" in card
    assert "scored once with each of 2 models when this card was written: " in card
    assert printed.count("scored once with each of 2 models)") == 2

    records = [json.loads(line) for line in (run / TEST_ACCESS).read_text().splitlines()]
    assert len(records) == len({record["model"] for record in records}) == 2
    assert [record["metrics"] for record in records] == [
        t["metrics"] for t in tree["test"].values()
    ]
    for said in ("over fresh seeds, accuracy", "search to mean", "test, default recipe"):
        assert said in printed

    before = files_of(run)
    capsys.readouterr()
    assert run_search(experiment).tree == result.tree
    assert "runs were finished before" in capsys.readouterr().out
    again = run_confirm(result.location, PLAN, quiet=True)
    assert (again.tree, again.result.tree) == (tree, result.tree)
    fewer = experiment.model_copy(update={"confirm": Confirm(top=1, seeds=2)})
    assert run_search(fewer, quiet=True).best["trial"] == 1
    run_confirm(result.location, PLAN, quiet=True)
    after = files_of(run)
    # The journal and the table of what is whole are as they were, the test split was left alone.
    assert {name for name in before if before[name] != after.get(name)} == set()
    assert set(after) == set(before)


def test_a_confirmation_that_was_killed_at_its_end_is_healed_by_the_same_call(
    searched: tuple[Experiment, SearchResult, str], tmp_path: Path
) -> None:
    """best/ is the confirmed model already, results.json still the search's."""
    _, result, _ = searched
    run = tmp_path / "copy" / "other name"
    shutil.copytree(result.location, run)
    before = files_of(run)
    (run / CONFIRMATION).unlink()
    edit(run / RESULTS, lambda tree: tree.update(best=best_row(tree["trials"][1], 0.1, "there")))
    assert not run_verification(str(run)).ok
    healed = run_confirm(str(run), PLAN, quiet=True).result
    assert healed.best["checkpoint"] == str(run / "best")
    assert healed.best | {"checkpoint": 0} == result.best | {"checkpoint": 0}
    assert run_verification(str(run)).ok
    after = files_of(run)
    assert {name for name in before if before[name] != after[name]} == {RESULTS, "checksums.json"}


@pytest.mark.cluster
def test_a_lucky_winner_is_unmasked_in_a_run_that_was_moved(
    searched: tuple[Experiment, SearchResult, str], tmp_path: Path
) -> None:
    """The URI takes the way of object stores."""
    _, result, _ = searched
    run = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(result.location, run)
    origin = files_of(Path(result.location))
    worst = min(result.trials, key=lambda row: (row["value"], row["role"] == YARDSTICK))
    number = worst["number"]
    if worst["role"] == YARDSTICK:
        number = 2

    def plant(row: dict[str, Any]) -> None:
        row["value"] = row["metrics"]["accuracy"] = 0.999

    edit(run / RESULTS, lambda tree: plant(tree["trials"][number]))
    edit(run / "trials" / str(number) / "trial.json", plant)
    confirmed = run_confirm(f"file://{run}", Confirm(top=1, seeds=2), quiet=True)
    table = {row["arm"]: row for row in confirmed.tree["configurations"]}
    assert set(table) == {f"trial {number}", YARDSTICK}
    lucky = table[f"trial {number}"]
    assert lucky["search_value"] == 0.999
    assert lucky["expected"]["mean"] < 0.7
    assert lucky["flattered"] == pytest.approx(0.999 - lucky["expected"]["mean"])
    assert confirmed.tree["configurations"][0]["expected"] == confirmed.result.best["expected"]
    assert confirmed.result.best["validation"]["accuracy"] < 0.7
    assert run_verification(str(run)).ok
    assert not [p for p in run.rglob("*") if p.name.startswith("sft_ray-")]
    assert files_of(Path(result.location)) == origin  # nothing went where the run once was
    assert sorted(p.name for p in Path(result.location).parent.iterdir()) == [".ray", "tiny"] or [
        p.name for p in Path(result.location).parent.iterdir()
    ] == ["tiny"]


@pytest.mark.cluster
def test_ablations_share_their_base_and_go_on_with_more_seeds(
    searched: tuple[Experiment, SearchResult, str], capsys: pytest.CaptureFixture[str]
) -> None:
    experiment, result, _ = searched
    run, base = Path(result.location), result.location
    before = files_of(run)
    depths = {"train.frozen_layers": "every"}
    first = Ablation(name="depth", base=base, vary=depths, seeds=2, costs=["train_seconds"])
    more = first.model_copy(update={"seeds": 3})
    shares = Ablation(name="rows", base=base, vary={SHARE: [0.5]}, seeds=2)

    run_ablations([first], quiet=True)
    old = {file: file.stat().st_mtime_ns for file in run.glob("ablations/runs/*/trial.json")}
    assert len(old) == 3 * 2
    assert read(run / "ablations" / "depth" / "ablation.json")["seeds"] == ablation_seeds(17, 2)
    found = run_ablations([more, shares], quiet=True)
    rows = {r["key"]: r for r in map(read, run.glob("ablations/runs/*/trial.json"))}
    assert len(rows) == 3 * 3 + 2  # and not one of the base of the second
    assert all(file.stat().st_mtime_ns == old[file] for file in old)

    assert list(found) == [str(run / "ablations" / name) for name in ("depth", "rows")]
    for folder, summaries in found.items():
        seeds = 3 if folder.endswith("depth") else 2
        names = ("ablation.json", "figure.png", "figure.svg", "table.csv", "table.md", "table.tex")
        assert sorted(file.name for file in Path(folder).iterdir()) == sorted(names)
        assert all(file.stat().st_size > 100 for file in Path(folder).iterdir())
        tree = read(Path(folder) / "ablation.json")
        assert tree["base"] == result.best["train"]
        assert tree["seeds"] == ablation_seeds(experiment.seed, seeds)
        table = list(csv.DictReader((Path(folder) / "table.csv").read_text().splitlines()))
        for summary, arm, line in zip(summaries, tree["arms"], table, strict=True):
            assert summary.n == int(line["n"]) == len(arm["values"]) == seeds
            assert [[s, v] for s, v in summary.values.items()] == arm["values"]
            assert float(line["mean"]) == arm["score"]["mean"]
            assert line["arm"] == arm["name"]
            assert arm["label"] in (Path(folder) / "table.md").read_text()
            share, depth = arm["changes"].get(SHARE, 1.0), arm["changes"].get(*[*depths, 0])
            for seed, value in arm["values"]:
                (row,) = [
                    r
                    for r in rows.values()
                    if (r["seed"], r["training_share"], r["train"]["frozen_layers"])
                    == (seed, share, depth)
                ]
                assert row["value"] == value
        if folder.endswith("depth"):  # what is frozen is not trained
            trained = [arm["trained_parameters"] for arm in tree["arms"]]
            assert trained == sorted(trained, reverse=True)
            assert len(set(trained)) == 3
    base_values = [summaries[0].values for summaries in found.values()]
    assert base_values[0].items() >= base_values[1].items()

    after = files_of(run)
    assert {name for name in after if not name.startswith("ablations/")} == set(before)
    assert all(after[name] == before[name] for name in before)
    run_ablations([more, shares])
    assert "11 of 11 runs were finished before" in capsys.readouterr().out
    assert len(list(run.glob("ablations/runs/*"))) == 11


@pytest.mark.cluster
def test_a_trial_is_replayed_to_the_last_digit_and_its_run_is_left_alone(
    searched: tuple[Experiment, SearchResult, str], capsys: pytest.CaptureFixture[str]
) -> None:
    _, result, _ = searched
    before = files_of(Path(result.location).parent)
    replay = run_replay(result.location, 1)
    assert replay.is_identical
    assert replay.largest_difference == 0
    assert [[p, recorded] for p, recorded, _ in replay.marks] == result.trials[1]["curve"]
    assert not any((Path(result.location).parent / ".replay").iterdir())
    assert "the same numbers" in capsys.readouterr().out
    assert files_of(Path(result.location).parent) == before


@pytest.mark.cluster
def test_a_single_training_is_replayed_as_it_was_and_other_data_is_refused(
    tiny_experiment: Experiment, tmp_path: Path
) -> None:
    file = tmp_path / "toy.csv"
    write_csv(file, toy_rows(200, seed=3))
    tree = tiny_experiment.to_tree()
    tree["data"] |= {"train": str(file)}
    tree |= {"search": {}, "train": {"learning_rate": GOOD, "epochs": 2}, "name": "single"}
    tree |= {"storage": str(tmp_path / "runs"), "resources": {}}
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        result = run_training(Experiment.from_tree(tree), quiet=True)
        before = files_of(tmp_path)
        assert run_replay(result.location, 0, quiet=True).is_identical
        assert files_of(tmp_path) == before
    finally:
        torch.set_num_threads(threads)
    write_csv(file, toy_rows(210, seed=4))
    ablation = Ablation(name="x", base=result.location, vary={"train.epochs": [1]})
    for again in (
        lambda: run_replay(result.location, 0, quiet=True),
        lambda: run_confirm(result.location, PLAN, quiet=True),
        lambda: run_ablations([ablation], quiet=True),
    ):
        with pytest.raises(ConfigError, match="was made from other data") as caught:
            again()
        assert len(caught.value.problems) == 1
    assert {**files_of(tmp_path), "toy.csv": ""} == {**before, "toy.csv": ""}


def test_a_replay_has_no_more_cpus_than_there_are(
    experiment: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    one = _with_one_slot(experiment, {"role": "sampled"}, 4.0)
    resources = one.resources.model_copy(update={"cpus_per_worker": 4.0})
    one = one.model_copy(update={"resources": resources})
    assert one.resources.workers_per_trial == 2
    for has, cpus in (({"CPU": 4.0}, 2.0), ({"CPU": 16.0}, 4.0), (None, 4.0)):
        assert _within(one, has, Screen()).resources.cpus_per_worker == cpus
    assert "2 CPUs for each worker here, 4 where it ran" in capsys.readouterr().out


def test_a_replay_has_as_many_cpus_as_the_workers_of_its_run(experiment: Experiment) -> None:
    for chosen, replayed in (("auto", 3.0), (2.0, 2.0)):
        resources = experiment.resources.model_copy(
            update={"cpus_per_worker": chosen, "slots": "auto"}
        )
        found = _with_one_slot(
            experiment.model_copy(update={"resources": resources}), {"role": "sampled"}, 3.0
        ).resources
        assert (found.slots, found.cpus_per_worker) == (1, replayed)
