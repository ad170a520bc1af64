"""What a slot says that a trial has taken, with a mailbox that answers at once and no Ray."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace
from typing import Any

import pytest

from sft_ray.search import slot as slot_module
from sft_ray.search.slot import Slot


def slot_with(messages: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Slot:
    """A slot that has been free for 20 seconds, and what its mailbox will say."""
    monkeypatch.setattr(slot_module.ray, "get", lambda answer: answer)
    slot = Slot.__new__(Slot)
    slot._pulse = SimpleNamespace(enter=lambda activity: None)
    slot._watch = SimpleNamespace(works_on=SimpleNamespace(remote=lambda *_: None))
    slot._name, slot._returned_at, slot._startup = "a", time.monotonic() - 20, None
    slot._mailbox = SimpleNamespace(
        **{name: SimpleNamespace(remote=lambda *_: None) for name in ("assign", "advance")},
        message=SimpleNamespace(remote=lambda index: messages[index]),
    )
    slot.reset_config({"trial_id": "t", "assignment": {}})
    return slot


def seconds_of(slot: Slot) -> float:
    return float(json.loads(slot.step()["message"])["slot_seconds"])


def test_a_trial_that_fails_where_it_was_taken_up_has_taken_what_it_took_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken_up = {"percent": 33, "seconds_before": 3000.0}
    slot = slot_with([taken_up, {"failed": "ValueError", "traceback": ""}], monkeypatch)
    assert 3020 <= seconds_of(slot) < 3030
    slot._free_since -= 5
    assert 3025 <= seconds_of(slot) < 3035
    slot.reset_config({"trial_id": "u", "assignment": {}})
    slot._free_since = time.monotonic() - 20
    slot._mailbox.message.remote = lambda index: {"failed": "at once", "traceback": ""}
    assert 20 <= seconds_of(slot) < 30


def test_a_slot_tells_of_its_start_once(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = [{"percent": 33, "seconds_before": 3000.0}, {"percent": 100}]
    slot = slot_with(marks, monkeypatch)
    slot._began_at, slot._free_since = time.monotonic() - 10, None
    slot._wait = lambda ask, arguments, _: ask(*arguments)
    slot._mailbox.ready = SimpleNamespace(remote=lambda: {"loading": 7.0})
    told = json.loads(slot.step()["message"])["startup"]
    assert told == {"workers": pytest.approx(3, abs=0.5), "loading": 7.0, "ready": told["ready"]}
    assert 0 <= told["ready"] < 0.5  # without what the trial took before
    assert "startup" not in json.loads(slot.step()["message"])
