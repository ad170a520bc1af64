"""Where the seconds until the first slot go, with a clock of one's own and no Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from sft_ray.analysis.tables import STARTUP, startup_line
from sft_ray.run_store import METRICS, RunStore
from sft_ray.search import startup as startup_module
from sft_ray.search.startup import Startup
from tests.search.test_fixed_runs import FOLDER, Slots, run

TOLD = {"workers": 1.0, "loading": 3.0, "ready": 20.0}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The driver's time."""
    now = [100.0]
    monkeypatch.setattr(startup_module.time, "monotonic", lambda: now[0])
    return now


def test_the_parts_of_a_start_follow_one_another(clock: list[float]) -> None:
    startup = Startup()
    for part, at in (("checks", 102.0), ("ray", 105.0), ("study", 105.5)):
        clock[0] = at
        startup.end(part)
    assert startup.seconds is None
    clock[0] = 131.5  # 26 s behind the study, of which a slot has been ready for 20
    startup.hear(TOLD)
    wanted = {"checks": 2.0, "ray": 3.0, "study": 0.5, "slot": 2.0, "workers": 1.0, "loading": 3.0}
    assert startup.parts == wanted
    assert list(startup.parts) == list(STARTUP)
    assert startup.seconds == 11.5
    clock[0] = 200.0
    startup.hear(TOLD)  # of a second slot
    assert startup.seconds == 11.5


def test_the_line_names_every_part() -> None:
    parts = {"checks": 2.0, "ray": 3.04, "loading": 3.0, "other": 1.0}
    line = startup_line({"startup_seconds": 9.04, "startup_parts": parts})
    assert line == {"startup": "9 s: checks 2.0 s, Ray 3.0 s, model and data 3.0 s, other 1.0 s"}
    assert startup_line({"startup_seconds": 9.0}) == {"startup": "9 s"}  # of an older version
    assert startup_line({"startup_seconds": None, "startup_parts": None}) == {}
    assert startup_line({}) == {}


def test_a_trial_from_before_makes_no_start_shorter(clock: list[float], tmp_path: Path) -> None:
    store, mine = RunStore(str(tmp_path), "mine"), run()
    slots = Slots([mine], store)
    slots.start()
    startup = slots.conductor.startup
    startup.end("study")
    clock[0] += 26
    slots.mark(0, startup=dict(TOLD), seconds_before=3000.0, slot_seconds=3020.0)
    assert startup.seconds == 6.0  # 26 s, for 20 of which the slot has been at this trial
    clock[0] += 50
    slots.mark(1)
    assert startup.seconds == 6.0
    assert "startup" not in (store.read_text(f"{FOLDER}/{mine.key}/{METRICS}") or "")
