"""Torn, zeroed, emptied and changed files of a real run: nothing that has finished is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sft_ray.analysis.results import SearchResult
from sft_ray.config import Experiment
from sft_ray.run_store import damaged_files, open_run, write_results
from sft_ray.search import tuner
from sft_ray.search.tuner import run_search

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.timeout(600),
]


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut in half": lambda content: content[: len(content) // 2],
    "zeroed": lambda content: bytes(len(content)),
    "emptied": lambda content: b"",
    "changed": flipped,
}
# What of a finished run is noticed when its command is given again.
FINISHED = (
    "results.json",
    "checksums.json",
    "environment.json",
    "experiment.yaml",
    "predictions.parquet",
    "confirm.json",
    "study.journal",
    "trials/1/trial.json",
    "trials/1/metrics.jsonl",
    "trials/0/best/model.safetensors",
    "best/model.safetensors",
    "best/config.json",
    "test_access.jsonl",
)
# Of a finished run these are looked at only when it goes on.
AT_REST = {"study.journal", "trials/1/metrics.jsonl", "test_access.jsonl"}
INTERRUPTED = (
    "environment.json",
    "experiment.yaml",
    "study.journal",
    "study.journal.good",
    "experiment.yaml.good",
    "trials/1/trial.json",
    "trials/1/metrics.jsonl",
    "test_access.jsonl",
)


class KilledError(BaseException):
    pass


def killed(*_: object) -> None:
    raise KilledError


@pytest.fixture(scope="module")
def runs(
    ray_cluster: None, tiny_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Experiment]:
    """`interrupted/tiny`, whose driver died before its last step, and `finished/tiny`."""
    folder = tmp_path_factory.mktemp("damage")
    tree = tiny_experiment.to_tree()
    tree["search"] |= {"trials": 3, "pruner": "none"}
    tree["search"]["space"] = {"train.epochs": {"int": [1, 2]}, "train.learning_rate": 1e-3}
    tree["storage"] = str(folder / "interrupted")
    experiment = Experiment.from_tree(tree)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuner, "put_winner", killed)
        with pytest.raises(KilledError):
            run_search(experiment, quiet=True)
    run = folder / "interrupted" / "tiny"
    (run / "test_access.jsonl").write_text('{"model": "a/best"}\n{"model": "elsewhere/b/best"}\n')
    shutil.copytree(folder / "interrupted", folder / "finished")
    run_search(experiment.model_copy(update={"storage": str(folder / "finished")}), quiet=True)
    store = open_run(str(folder / "finished" / "tiny"))
    store.write_json("confirm.json", {"top": 1, "seeds": [1]})
    write_results(store, store.read_json("results.json"))
    return folder, experiment


def copied(runs: tuple[Path, Experiment], kind: str, to: Path) -> tuple[Path, Experiment]:
    shutil.copytree(runs[0] / kind, to / "runs")
    return to / "runs" / "tiny", runs[1].model_copy(update={"storage": str(to / "runs")})


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", FINISHED)
def test_a_finished_run_is_mended_by_its_own_command(
    runs: tuple[Path, Experiment],
    name: str,
    how: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    straight = SearchResult.load(str(runs[0] / "finished" / "tiny"))
    run, experiment = copied(runs, "finished", tmp_path)
    (run / name).write_bytes(DAMAGES[how]((run / name).read_bytes()))
    result = run_search(experiment)
    said = capsys.readouterr().out
    assert result.trials == straight.trials
    assert damaged_files(open_run(str(run))) == []
    if name in AT_REST or name.startswith("trials/0/best"):
        assert "damaged" not in said
        return
    # With another letter in it, it accuses whatever the letter stood for.
    accused = "" if (name, how) == ("checksums.json", "changed") else name
    assert f"{accused} was damaged" in said
    assert result.best["validation"] == straight.best["validation"]
    assert open_run(str(run)).is_intact("best")
    assert json.loads((run / "results.json").read_text())["trials"] == straight.trials


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", INTERRUPTED)
def test_an_interrupted_run_goes_on(
    runs: tuple[Path, Experiment],
    name: str,
    how: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    straight = SearchResult.load(str(runs[0] / "finished" / "tiny"))
    run, experiment = copied(runs, "interrupted", tmp_path)
    (run / name).write_bytes(DAMAGES[how]((run / name).read_bytes()))
    result = run_search(experiment)
    said = capsys.readouterr().out
    assert result.trials == straight.trials
    assert result.best["validation"] == straight.best["validation"]
    assert damaged_files(open_run(str(run))) == []
    # The environment is written at every start; a last-good copy is only one of two; a text file
    # without a checksum may hold another letter.
    silent = name == "environment.json" or name.endswith(".good")
    if (
        not silent
        and not (how == "changed" and name.endswith(".jsonl"))
        and not (how == "emptied" and name == "test_access.jsonl")
    ):
        assert f"{name} was damaged" in said or f"{name} is damaged" in said
    if name == "study.journal":
        assert len(list(run.glob("study.journal.damaged-*"))) == 1


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_model_never_wins(
    runs: tuple[Path, Experiment], how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = SearchResult.load(str(runs[0] / "finished" / "tiny")).best["trial"]
    run, experiment = copied(runs, "interrupted", tmp_path)
    weights = run / f"trials/{best}/best/model.safetensors"
    weights.write_bytes(DAMAGES[how](weights.read_bytes()))
    result = run_search(experiment)
    said = capsys.readouterr().out
    assert f"trials/{best}/best is damaged; the model of trial {best} is lost" in said
    others = [row for row in result.trials if row["number"] != best]
    second = max(others, key=lambda row: (row["value"], -row["number"]))
    assert result.best["trial"] == second["number"]
    assert result.best["validation"] == second["metrics"]
    assert open_run(str(run)).is_intact("best")
