"""tune.py gets the words that were typed, and an experiment that is there."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sft_ray.search import submit
from sft_ray.search.submit import ELSEWHERE, ON_GPUS, rejoined, with_experiment

ROOT = Path(__file__).parents[2]
TYPED = [
    ["experiments/sst2.yaml", "search.trials=64"],
    ["a.yaml", "search.space.train.epochs={int: [1, 3]}", "--fresh"],
    ["a.yaml", "search.objective=[accuracy, train_seconds]", "name=b", "--address", "auto"],
    ["search.space.train.learning_rate={log_uniform: [1e-6, 1e-3], prior: {center: 2e-5}}"],
    ["a.yaml", "search.enqueue=[{train.epochs: 1, a: b=c}, {train.epochs: 2}]", "--extend", "3"],
    ["a.yaml", "data.columns={text: a long name}", "name=two words"],
    ["search.space.x={int: [-3, -1]}"],
]


@pytest.mark.parametrize("words", TYPED)
def test_words_survive_a_shell_that_splits_them(words: list[str]) -> None:
    command = f"{shlex.quote(sys.executable)} -c 'import sys; print(*sys.argv[1:], sep=chr(10))' "
    shell = ["bash", "-c", command + " ".join(words)]  # as `ray submit` joins them
    arrived = subprocess.run(shell, capture_output=True, text=True, check=True).stdout.splitlines()
    assert rejoined(arrived) == words
    assert rejoined(words) == words


@pytest.mark.parametrize(("gpus", "expected"), [(0, ELSEWHERE), (4, ON_GPUS)])
def test_without_an_experiment_the_gpus_decide(
    gpus: int, expected: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert expected.exists()
    monkeypatch.setattr(submit, "capacity_here", lambda address: {"CPU": 8, "GPU": gpus})
    assert with_experiment([]) == [str(expected)]
    assert with_experiment(["search.trials=2"]) == [str(expected), "search.trials=2"]
    assert with_experiment(["--fresh"]) == [str(expected), "--fresh"]


def test_an_experiment_may_be_named_from_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "experiments/quickstart.yaml"
    assert with_experiment([name, "a=b"]) == [str(ROOT / name), "a=b"]
    (tmp_path / "experiments").mkdir()
    (tmp_path / name).write_text("")
    assert with_experiment([name]) == [name]
    assert with_experiment(["nowhere.yaml"]) == ["nowhere.yaml"]


def test_inside_a_job_nothing_is_submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

    monkeypatch.setenv(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}")
    monkeypatch.setattr(submit, "runs_here", lambda: True)
    assert submit.follow_as_job("tune.py", []) is None


def test_tune_runs_here_where_no_ray_runs(tmp_path: Path) -> None:
    """Up to the first thing that it refuses."""
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "tune.py",
            "experiments/quickstart.yaml",
            "search.trials=[1,",
            "2]",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "RAY_TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 2, done.stderr
    assert "search.trials" in done.stderr
