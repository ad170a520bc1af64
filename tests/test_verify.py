"""A finished run is compared with itself, and every way to tamper with it is found."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from sft_ray.config import Experiment
from sft_ray.errors import ConfigError
from sft_ray.run_store import CHECKSUMS, RESULTS, delete_results, open_run, write_results
from sft_ray.serving.verify import (
    Verification,
    compared_scores,
    moved_by_a_close_call,
    run_verification,
)
from sft_ray.single_trial import run_training
from sft_ray.training.examples import LabelSet
from sft_ray.training.tasks import find_task
from tests.models import toy_rows, write_csv

NAMES = ["checksums", "results", "data", "versions", "score"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with a finished run and the data it was made from."""
    folder = tmp_path_factory.mktemp("verify")
    write_csv(folder / "toy.csv", toy_rows(400, seed=0))
    tree = {
        "name": "single",
        "model": str(tiny_model),
        "data": {"train": str(folder / "toy.csv"), "split": {"validation": 0.2}, "max_length": 32},
        "train": {"learning_rate": 5e-3, "epochs": 2},
        "storage": str(folder),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run_training(Experiment.from_tree(tree), quiet=True)
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy to tamper with; its data lies beside it."""
    shutil.copytree(trained, tmp_path / "copy")
    folder = tmp_path / "copy" / "single"
    file = folder / "experiment.yaml"
    text = file.read_text().replace(str(trained / "toy.csv"), str(tmp_path / "copy" / "toy.csv"))
    file.write_text(text)
    open_run(str(folder)).write_good("experiment.yaml", text.encode())
    write_checksums(folder)
    return folder


def write_checksums(run: Path) -> None:
    """What someone would do who knows of them."""
    write_results(open_run(str(run)), json.loads((run / RESULTS).read_text()))


def failed(verification: Verification) -> dict[str, str]:
    return {check.name: check.found for check in verification.checks if check.ok is False}


def found(run: Path) -> dict[str, str]:
    verification = run_verification(str(run))
    assert verification.ok == (not failed(verification))
    assert [check.name for check in verification.checks] == NAMES
    assert all(check.found and "\n" not in check.found for check in verification.checks)
    return failed(verification)


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))


def test_an_honest_run_passes_and_is_left_as_it_was(trained: Path) -> None:
    files = sorted(trained.rglob("*"))
    verification = run_verification(str(trained / "single"))
    assert verification.ok
    assert verification.location == str(trained / "single")
    assert [(check.name, check.ok) for check in verification.checks] == [(n, True) for n in NAMES]
    told = {check.name: check.found for check in verification.checks}
    assert "files as they were written" in told["checksums"]
    assert told["results"] == "agree with 1 trial"
    found = re.match("80 examples scored again; the largest difference is ([^,]+)", told["score"])
    assert found is not None
    assert float(found[1]) < 1e-6  # other threads than it was trained with
    assert sorted(trained.rglob("*")) == files


def test_checksums_cover_what_was_made(trained: Path) -> None:
    listed = json.loads((trained / "single" / CHECKSUMS).read_text())["sha256"]
    best = {f"best/{path.name}" for path in (trained / "single" / "best").iterdir()}
    single = {"experiment.yaml", "environment.json", "predictions.parquet", "results.json"}
    assert set(listed) == best | single | {"trials/0/trial.json"}
    assert "best/model.safetensors" in best


def test_a_run_is_verified_wherever_it_lies(run: Path) -> None:
    # A URI takes the way of object stores.
    store = open_run(f"file://{run}/")
    assert store.local_root is None
    write_results(store, store.read_json(RESULTS))
    assert run_verification(f"file://{run}").ok
    (run / "best" / "model.safetensors").unlink()
    assert set(failed(run_verification(f"file://{run}"))) == {"checksums", "score"}


def test_a_file_is_hashed_as_it_is_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "run" / "best").mkdir(parents=True)
    (tmp_path / "run" / "experiment.yaml").touch()
    content = bytes(range(256)) * 10_000  # longer than a chunk
    (tmp_path / "run" / "best" / "file.gz").write_bytes(content)
    for place in (f"{tmp_path}/run", f"file://{tmp_path}/run"):
        store = open_run(place)
        assert store.files_below("best") == ["best/file.gz"]
        assert store.files_below("nothing") == []
        assert store.sha256("best/file.gz") == hashlib.sha256(content).hexdigest()


def test_a_flipped_byte_in_the_weights_is_found(run: Path) -> None:
    file = run / "best" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert found(run)["checksums"] == "changed: best/model.safetensors"


def test_weights_that_cannot_be_loaded_are_a_failed_check(run: Path) -> None:
    file = run / "best" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    problems = found(run)
    assert set(problems) == {"checksums", "score"}
    assert "cannot be loaded" in problems["score"]


def test_other_weights_score_otherwise_whatever_the_checksums_say(run: Path) -> None:
    file = run / "best" / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    other = {name: -tensor if "classifier" in name else tensor for name, tensor in weights.items()}
    safetensors.torch.save_file(other, file, metadata={"format": "pt"})
    write_checksums(run)
    problems = found(run)
    assert set(problems) == {"score"}
    assert "accuracy is " in problems["score"]
    assert "reported as" in problems["score"]


def test_a_prettier_score_is_found_three_times(run: Path) -> None:
    edit(run / RESULTS, lambda tree: tree["best"]["validation"].update(accuracy=0.999))
    problems = found(run)
    assert set(problems) == {"checksums", "results", "score"}
    assert problems["checksums"] == "changed: results.json"
    assert problems["results"] == "best.validation is not that of trial 0"


def test_a_trials_own_record_must_agree(run: Path) -> None:
    edit(run / "trials/0/trial.json", lambda row: row.update(value=0.1, state="PRUNED"))
    problems = found(run)
    assert problems["checksums"] == "changed: trials/0/trial.json"
    assert problems["results"] == "trials/0/trial.json has another state, value"
    write_checksums(run)
    assert set(found(run)) == {"results"}


def test_missing_and_unexpected_files_are_named(run: Path) -> None:
    (run / "predictions.parquet").unlink()
    (run / "trials/0/trial.json").unlink()
    (run / "best" / "extra").mkdir()
    (run / "best" / "extra" / "pytorch_model.bin").write_text("stray")
    problems = found(run)
    assert set(problems) == {"checksums", "results"}
    assert problems["checksums"] == (
        "missing: predictions.parquet, trials/0/trial.json; "
        "unexpected: best/extra/pytorch_model.bin"
    )
    assert problems["results"] == "trials/0/trial.json is missing"


def test_a_trial_that_results_leave_out_is_found(run: Path) -> None:
    shutil.copytree(run / "trials/0", run / "trials/7")
    write_checksums(run)
    assert found(run) == {"results": "not among its trials: trials/7/trial.json"}


def test_a_winner_that_is_gone_is_found(run: Path) -> None:
    shutil.rmtree(run / "best")
    problems = found(run)
    assert set(problems) == {"checksums", "data", "score"}
    assert "best is missing" in problems["score"]


def test_other_data_has_another_fingerprint(run: Path) -> None:
    write_csv(run.parent / "toy.csv", [*toy_rows(399, seed=0), ("a new cat", "animal")])
    problems = found(run)
    assert "the fingerprint of the data is" in problems["data"]
    assert "environment.json" in problems["data"]
    assert "best/sft_ray.json" in problems["data"]


def test_data_that_is_gone_is_a_failed_check(run: Path) -> None:
    (run.parent / "toy.csv").unlink()
    problems = found(run)
    assert set(problems) == {"data", "score"}
    assert "toy.csv: no such file" in problems["data"]
    assert "toy.csv: no such file" in problems["score"]


def test_data_told_from_another_folder_is_no_fault_of_the_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = run / "experiment.yaml"
    for path in (file, file.with_name("experiment.yaml.good")):
        path.write_text(path.read_text().replace(f"{run.parent}/toy.csv", "toy.csv"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^toy.csv: no such file here.* verify it from there$"):
        run_verification(str(run))
    monkeypatch.chdir(run.parent)
    assert "data" not in found(run)


def test_the_base_model_need_not_be_there(run: Path, tiny_model: Path) -> None:
    file = run / "experiment.yaml"
    file.write_text(file.read_text().replace(str(tiny_model), "/nowhere/model"))
    (run / "experiment.yaml.good").unlink()
    write_checksums(run)
    assert found(run) == {}


def test_other_versions_are_a_note(run: Path) -> None:
    def change(tree: Any) -> None:
        tree["packages"] |= {"torch": "1.0", "vanished": "3.1"}

    edit(run / "environment.json", change)
    write_checksums(run)
    verification = run_verification(str(run))
    (check,) = (check for check in verification.checks if check.name == "versions")
    assert verification.ok
    assert check.ok is None
    assert check.found.startswith("torch 1.0 then, ")
    assert check.found.endswith("vanished 3.1 then, none now")


def test_a_run_from_before_checksums_is_not_at_fault(run: Path) -> None:
    (run / CHECKSUMS).unlink()
    verification = run_verification(str(run))
    assert verification.ok
    assert verification.checks[0].ok is None
    assert "before checksums were kept" in verification.checks[0].found


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("results.json", {"results", "score"}),
        ("checksums.json", set()),
        ("environment.json", {"data", "versions"}),
        ("experiment.yaml", set()),  # its last-good copy tells what it said
        ("best/sft_ray.json", {"data", "score"}),
        ("trials/0/trial.json", {"results"}),
    ],
)
@pytest.mark.parametrize("content", [b'{"half": ', b"[1]", b'"\xff"'])
def test_damaged_files_are_failed_checks(
    run: Path, name: str, others: set[str], content: bytes
) -> None:
    (run / name).write_bytes(content)
    assert set(found(run)) == {"checksums"} | others


@pytest.mark.parametrize("facts", [{"max_length": "x"}, {"task": "regression"}, {"inputs": 3}])
def test_false_facts_of_the_model_are_a_failed_check(run: Path, facts: dict[str, Any]) -> None:
    edit(run / "best/sft_ray.json", lambda tree: tree.update(facts))
    assert set(found(run)) - {"data"} == {"checksums", "score"}  # whose fingerprint is a fact, too


def test_a_confirmed_winner_has_scores_of_its_own(run: Path) -> None:
    """The winner was trained anew, so its trial scored otherwise."""

    def change(tree: Any) -> None:
        for row in (tree, json.loads((run / "trials/0/trial.json").read_text())):
            for trial in row.get("trials", [row]):
                trial["metrics"]["accuracy"] = 0.123
        (run / "trials/0/trial.json").write_text(json.dumps(row))

    edit(run / RESULTS, change)
    write_checksums(run)
    assert set(found(run)) == {"results"}
    edit(run / RESULTS, lambda tree: tree["best"].update(expected={"mean": 0.9}))
    write_checksums(run)
    assert found(run) == {}
    recipe = {"trial": None, "params": {"train.epochs": 3}}
    edit(run / RESULTS, lambda tree: tree["best"].update(recipe))
    write_checksums(run)
    assert found(run) == {}
    edit(run / RESULTS, lambda tree: tree["best"].update(recipe, trial=0))
    write_checksums(run)
    assert found(run) == {"results": "best.params is not that of trial 0"}


def test_an_unfinished_run_and_no_run_are_one_line(run: Path, tmp_path: Path) -> None:
    delete_results(open_run(str(run)))
    assert not (run / CHECKSUMS).exists()
    for place, line in ((run, "has not finished"), (tmp_path / "none", "is no run folder")):
        with pytest.raises(ConfigError, match=line) as caught:
            run_verification(str(place))
        assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("reported", "again", "ok"),
    [
        ({"accuracy": 0.9}, {"accuracy": 0.905}, True),  # one of 100 examples
        ({"accuracy": 0.9}, {"accuracy": 0.92}, False),
        ({"perplexity": 5000.0}, {"perplexity": 5000.4}, True),
        ({"perplexity": 5000.0}, {"perplexity": 5001.0}, False),
        ({"accuracy": 0.9}, {"f1": 0.9}, False),
        ({"accuracy": 0.9}, {"accuracy": float("nan")}, False),
        ({"accuracy": "high"}, {"accuracy": 0.9}, False),
        ({}, {"accuracy": 0.9}, False),
    ],
)
def test_scores_may_differ_by_rounding_or_one_example(
    reported: dict[str, Any], again: dict[str, float], ok: bool
) -> None:
    assert compared_scores(reported, again, 100, {}).ok is ok


def test_a_close_call_that_falls_otherwise_is_no_damage() -> None:
    """MCC and its kin move by more than one example's share."""
    rng, task = np.random.default_rng(3), find_task("text-classification")
    labels = rng.choice(6, size=500, p=[0.3, 0.3, 0.2, 0.1, 0.08, 0.02])
    outputs = rng.normal(size=(500, 6)) + 4 * np.eye(6)[labels]
    examples = SimpleNamespace(labels=labels, has=lambda name: False)
    predictor = SimpleNamespace(task=task, label_set=LabelSet(tuple("abcdef")))
    reported = task.score(outputs, examples, predictor.label_set)
    moved = moved_by_a_close_call(outputs, examples, predictor, reported)
    margins = np.diff(np.sort(outputs, axis=1)[:, -2:], axis=1)[:, 0]
    row = margins.argmin()
    again, top = outputs.copy(), np.argsort(outputs[row])[-2:]
    again[row, top] = outputs[row, top[::-1]]
    found = task.score(again, examples, predictor.label_set)
    assert moved["accuracy"] == pytest.approx(1 / 500)
    assert compared_scores(reported, found, 500, moved).ok
    assert not compared_scores({**reported, "mcc": reported["mcc"] - 0.02}, found, 500, moved).ok
