"""The first signal asks, the second ends; what was there before is put back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sft_ray.config import Experiment
from sft_ray.interrupt import SIGNALS, interruptible
from sft_ray.yaml_text import dump_yaml

pytestmark = pytest.mark.usefixtures("hears_signals")


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks_and_the_second_ends(number: signal.Signals) -> None:
    before = {s: signal.getsignal(s) for s in SIGNALS}
    with pytest.raises(KeyboardInterrupt), interruptible() as interruption:  # noqa: PT012
        assert not interruption.is_asked
        os.kill(os.getpid(), number)
        assert interruption.is_asked
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second signal was not heard")
    assert {s: signal.getsignal(s) for s in SIGNALS} == before


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As after `nohup`."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with interruptible() as interruption:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not interruption.is_asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.is_asked
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_another_thread_catches_nothing() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work() -> None:
        with interruptible():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def train(experiment: Experiment, storage: Path) -> subprocess.Popen[str]:
    """`sft-ray train` in a process of its own, long enough to be interrupted."""
    file = storage.parent / "experiment.yaml"
    file.write_text(dump_yaml(experiment.to_tree()))
    overrides = [f"storage={storage}", "train.epochs=12", "train.batch_size=4", "search.space={}"]
    return subprocess.Popen(
        [sys.executable, "-m", "sft_ray.cli", "train", str(file), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.cluster
def test_a_training_that_is_interrupted_goes_on_from_the_step_it_stopped_at(
    experiment: Experiment, tmp_path: Path
) -> None:
    whole = train(experiment, tmp_path / "whole")
    stopped = tmp_path / "stopped"
    files = {s: tmp_path / s / "tiny" / "trials" / "0" for s in ("whole", "stopped")}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        before = metrics_lines(files["stopped"])
        run = train(experiment, stopped)
        deadline = time.monotonic() + 120
        while metrics_lines(files["stopped"]) <= before and time.monotonic() < deadline:
            time.sleep(0.01)
        run.send_signal(number)
        out, err = run.communicate(timeout=300)
        assert run.returncode == 130, (out, err)
        assert "paused at step" in out
        assert err == "interrupted; the same command goes on where it stopped\n"
    last = train(experiment, stopped)
    out, err = last.communicate(timeout=200)
    assert last.returncode == 0, err
    assert "going on at step" in out
    whole.communicate(timeout=200)
    assert whole.returncode == 0
    rows = [json.loads((files[s] / "trial.json").read_text()) for s in ("whole", "stopped")]
    for row in rows:
        for name in [name for name in row if "second" in name]:
            del row[name]
    assert rows[0] == rows[1]
    assert not (files["stopped"] / "last").exists()


def metrics_lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0
