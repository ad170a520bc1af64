"""However a search is ended from outside, nothing is lost and nothing is left behind."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_ray.config import Experiment
from sft_ray.yaml_text import dump_yaml

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("hears_signals"),
]


class Search:
    """`sft-ray search` on a terminal of its own, with a Ray of its own."""

    def __init__(self, experiment: Experiment, folder: Path) -> None:
        self.mark, self.run = uuid.uuid4().hex, Path(experiment.storage) / experiment.name
        file = folder / "experiment.yaml"
        file.write_text(dump_yaml(experiment.to_tree()))
        self.terminal, inside = pty.openpty()
        self.temp = folder / "t"
        self.temp.mkdir(exist_ok=True)
        environment = {**os.environ, "MARK": self.mark, "RAY_ADDRESS": "local", "TERM": "xterm"}
        # Ray's sockets lie below it, and their paths may not be long.
        environment["RAY_TMPDIR"] = f"/tmp/{self.mark[:6]}"
        Path(environment["RAY_TMPDIR"]).mkdir()
        self.ray_folder = Path(environment["RAY_TMPDIR"])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sft_ray.cli", "search", str(file)],
            stdin=inside,
            stdout=inside,
            stderr=inside,
            env=environment,
            preexec_fn=_take_the_terminal,
        )
        os.close(inside)
        os.set_blocking(self.terminal, False)
        self.said = b""

    def listen(self) -> None:
        try:
            while piece := os.read(self.terminal, 65536):
                self.said += piece
        except (BlockingIOError, OSError):
            return

    def wait_for(self, condition: Callable[[], Any], seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.said.decode()[-3000:]
            self.listen()
            time.sleep(0.02)

    def left_behind(self) -> list[str]:
        """Processes that carry its mark, whatever session they are in."""
        found = []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            try:
                if self.mark.encode() in environ.read_bytes():
                    found.append((environ.parent / "cmdline").read_text().replace("\0", " "))
            except OSError:  # gone meanwhile
                continue
        return found


def _take_the_terminal() -> None:
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def ctrl_c(search: Search) -> None:
    os.write(search.terminal, b"\x03")


def terminate_the_group(search: Search) -> None:
    os.killpg(search.process.pid, signal.SIGTERM)


def close_the_terminal(search: Search) -> None:
    os.close(search.terminal)
    search.terminal = os.open(os.devnull, os.O_RDWR)


def trials(run: Path) -> list[Any]:
    rows = json.loads((run / "results.json").read_text())["trials"]
    return [(r["number"], r["state"], r["params"], r["value"], r["curve"]) for r in rows]


@pytest.fixture
def lasting(experiment: Experiment) -> Experiment:
    """Three trials of about a thousand steps each."""
    train = experiment.train.model_copy(update={"epochs": 30, "batch_size": 8})
    raw = {"train.learning_rate": {"log_uniform": [1e-4, 1e-2]}}
    search = experiment.search.model_copy(
        update={"space": raw, "trials": 3, "default_recipe": False}
    )
    return experiment.model_copy(update={"train": train, "search": search})


@pytest.fixture
def calm(lasting: Experiment, tmp_path: Path) -> list[Any]:
    """The trials of the search that nobody disturbs."""
    (tmp_path / "calm").mkdir()
    undisturbed = lasting.model_copy(update={"storage": str(tmp_path / "calm" / "runs")})
    search = Search(undisturbed, tmp_path / "calm")
    search.wait_for(lambda: search.process.poll() is not None)
    assert search.process.returncode == 0, search.said.decode()
    return trials(search.run)


def shared_memory() -> set[Path]:
    """What lies there, but for the semaphores of whatever else runs on this machine."""
    return {path for path in Path("/dev/shm").iterdir() if not path.name.startswith("sem.mp-")}


def test_an_ended_search_goes_on_as_if_nothing_had_happened(
    lasting: Experiment, calm: list[Any], tmp_path: Path
) -> None:
    in_shared_memory = shared_memory()
    for end in (ctrl_c, terminate_the_group, close_the_terminal):
        search = Search(lasting, tmp_path)
        begun = [path.stat().st_mtime for path in search.run.glob("trials/*/metrics.jsonl")]
        search.wait_for(
            lambda search=search, begun=begun: (
                max(
                    (path.stat().st_mtime for path in search.run.glob("trials/*/metrics.jsonl")),
                    default=0,
                )
                > max(begun, default=0)
            )
        )
        end(search)
        search.wait_for(lambda search=search: search.process.poll() is not None, 100)
        search.listen()
        assert search.process.returncode == 130, search.said.decode()
        assert list(search.run.glob("trials/*/last/state.json")), end.__name__
        assert not (search.run / "results.json").exists()
        if end is not close_the_terminal:
            assert b"paused" in search.said
            assert b"the same command goes on where it stopped" in search.said
            assert b"Traceback" not in search.said
            assert b"\x1b[?25h" in search.said  # the cursor is back
        search.wait_for(lambda search=search: not search.left_behind(), 60)
        assert not list(search.ray_folder.glob("ray/session_2*")), end.__name__
        assert not (search.run.parent / ".ray").exists() or not list(
            (search.run.parent / ".ray").iterdir()
        )
    last = Search(lasting, tmp_path)
    last.wait_for(lambda: last.process.poll() is not None)
    assert last.process.returncode == 0, last.said.decode()
    assert trials(last.run) == calm
    assert not list(last.run.glob("trials/*/last"))
    assert shared_memory() <= in_shared_memory


def test_a_second_ctrl_c_ends_at_once(lasting: Experiment, tmp_path: Path) -> None:
    search = Search(lasting, tmp_path)
    search.wait_for(lambda: list(search.run.glob("trials/*/metrics.jsonl")))
    ctrl_c(search)
    time.sleep(0.3)
    ctrl_c(search)
    search.wait_for(lambda: search.process.poll() is not None, 30)
    search.listen()
    assert search.process.returncode == 130, search.said.decode()
    assert b"Traceback" not in search.said
    search.wait_for(lambda: not search.left_behind(), 60)
