"""Written lists of runs: order, keys, what is run again, ends, on invented messages without Ray."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sft_ray.config import Regularization, Train
from sft_ray.errors import ConfigError
from sft_ray.run_store import RunStore
from sft_ray.screen import Screen
from sft_ray.search.conductor import Conductor
from sft_ray.search.fixed_runs import FixedRun, FixedRuns, Row

FOLDER = "confirm"
MARKS = (10, 33, 67, 100)


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(str(tmp_path), "mine")


def run(arm: str = "a", rate: float = 1e-4, seed: int = 1, **more: Any) -> FixedRun:
    train = Train(learning_rate=rate)
    return FixedRun(arm, train, {"train.learning_rate": rate}, seed, **more)


def grid() -> list[FixedRun]:
    """Two configurations on two seeds, one seed after the other."""
    return [run(arm, rate, seed) for seed in (1, 2) for arm, rate in (("a", 1e-4), ("b", 2e-4))]


def score_of(planned_run: FixedRun, percent: int) -> float:
    return 0.5 + planned_run.seed / 100 + percent / 1000


def message(score: float, index: int, **more: Any) -> dict[str, Any]:
    percent = MARKS[index]
    return {
        "index": index,
        "percent": percent,
        "epochs_run": percent / 50,
        "metrics": {"accuracy": score},
        "train_loss": 0.5,
        "fault": None,
        "finished": percent == 100,
        "score": score,
        "score_percent": percent,
        "best_metrics": {"accuracy": score},
        "train_seconds": percent / 100,
        "eval_seconds": 0.125,
        "trained_parameters": 1000,
        "memory_bytes": 2000,
        "slot_seconds": 2.0 + percent / 100,
        **more,
    }


class Slots:
    """What slots do to a list of runs, by the conductor that real slots report to."""

    def __init__(
        self, runs: Sequence[FixedRun], store: RunStore, slots: int = 1, **more: Any
    ) -> None:
        self.trials, self.store = FixedRuns(runs, store, FOLDER, **more), store
        self.conductor = Conductor(self.trials, store, Screen(quiet=True), "accuracy", slots)
        self.started: list[int] = []

    def start(self) -> FixedRun | None:
        planned = self.conductor.next_trial(f"tune {len(self.started)}")
        if planned is None:
            return None
        self.started.append(planned.number)
        return self.trials.runs[planned.number]

    def mark(self, index: int, tune: int = -1, **more: Any) -> bool:
        """Whether the run of this start goes on behind its mark."""
        tune %= len(self.started)
        mine = self.trials.runs[self.started[tune]]
        found = message(score_of(mine, MARKS[index]), index, **more)
        if found["finished"] and mine.keep_model:
            with self.store.replacing_folder(f"{FOLDER}/{mine.key}/best") as folder:
                (folder / "model.safetensors").touch()
        goes_on = self.conductor.on_message(f"tune {tune}", found)
        if not goes_on:
            self.conductor.on_slot_free(f"tune {tune}")
        return goes_on

    def finish(self, tune: int = -1) -> None:
        for index in range(len(MARKS)):
            if not self.mark(index, tune):
                return

    def fail(self) -> None:
        tune = f"tune {len(self.started) - 1}"
        failed = {"failed": "ValueError: a bug", "traceback": "…"}
        assert not self.conductor.on_message(tune, failed)
        self.conductor.on_slot_free(tune)

    def run_all(self, most: int = 100) -> list[Row]:
        while len(self.started) < most and self.start() is not None:
            self.finish()
        return self.trials.finished_rows


def test_runs_start_in_their_order_and_leave_a_record_each(store: RunStore) -> None:
    slots = Slots(grid(), store)
    assert slots.trials.num_pending == 4
    assert not slots.trials.is_over()
    rows = slots.run_all()
    assert slots.started == [0, 1, 2, 3]
    assert slots.trials.is_over()
    assert [(row["arm"], row["seed"]) for row in rows] == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    for mine, row in zip(grid(), rows, strict=True):
        folder = store.local_root / FOLDER / mine.key
        assert json.loads((folder / "trial.json").read_text()) == row
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == len(MARKS)
        assert row["state"] == "COMPLETE"
        assert row["value"] == score_of(mine, 100)
        assert row["curve"] == [[percent, score_of(mine, percent)] for percent in MARKS]
        assert row["train"]["learning_rate"] == mine.train.learning_rate
        assert (row["role"], row["training_share"], row["key"]) == (mine.arm, 1.0, mine.key)
        parts = ("train_seconds", "eval_seconds", "overhead_seconds")
        assert sum(row[part] for part in parts) == 3.0  # all of its slot's time


def test_workers_are_told_what_to_keep(store: RunStore) -> None:
    slots = Slots([run(keep_model=True, training_share=0.5), run(seed=2)], store)
    told = [slots.conductor.next_trial(name) for name in "xy"]
    assert [planned is not None and planned.assignment() for planned in told] == [
        {
            "folder": f"{FOLDER}/{mine.key}",
            "train": mine.train.model_dump(mode="json"),
            "seed": mine.seed,
            "training_share": mine.training_share,
            "save_finished": mine.keep_model,
            "save_above": None,
            "save_unfinished": False,
            "end_diverged": False,
            "trunks_read": None,
            "resumes": True,
        }
        for mine in slots.trials.runs
    ]
    assert slots.trials.outdated() == []
    assert not slots.trials.improves(1.0)


def test_a_key_is_what_a_run_comes_to_and_nothing_else() -> None:
    mine = run()
    assert mine.key == run("called otherwise", keep_model=True, until_percent=10).key
    assert mine.key == FixedRun("a", Train(learning_rate=1e-4), {}, 1).key
    assert len(mine.key) == 16
    assert int(mine.key, 16) >= 0
    others = [
        run(rate=2e-4),
        run(seed=2),
        run(training_share=0.5),
        run(setting="of other data"),
        FixedRun("a", Train(learning_rate=1e-4, regularization=Regularization()), {}, 1),
    ]
    assert len({mine.key, *(other.key for other in others)}) == 6
    # Of a folder that another session wrote: it must be found again.
    reread = Train.model_validate_json(mine.train.model_dump_json())
    assert mine.key == FixedRun("a", reread, {}, 1).key


def test_what_has_finished_is_not_run_again(store: RunStore) -> None:
    first = Slots(grid(), store).run_all(most=2)
    slots = Slots(grid(), store)
    assert slots.trials.finished_rows == first
    assert slots.trials.num_pending == 2
    rows = slots.run_all()
    assert slots.started == [2, 3]
    assert rows[:2] == first
    again = Slots(grid(), store)
    assert again.trials.is_over()
    assert again.start() is None
    assert again.trials.finished_rows == rows


def test_a_longer_list_keeps_its_own_numbers_and_names(store: RunStore) -> None:
    Slots(grid()[2:], store).run_all()  # two runs, numbered 0 and 1
    more = [run("new", 3e-4), *[run(f"my {r.arm}", r.train.learning_rate, r.seed) for r in grid()]]
    slots = Slots(more, store)
    assert [(row["number"], row["arm"]) for row in slots.trials.finished_rows] == [
        (3, "my a"),
        (4, "my b"),
    ]
    rows = slots.run_all()
    assert slots.started == [0, 1, 2]
    assert [row["number"] for row in rows] == list(range(5))
    assert [row["arm"] for row in rows] == [mine.arm for mine in more]
    assert [row["seed"] for row in rows] == [mine.seed for mine in more]
    assert [slots.trials.row(number) for number in range(5)] == rows


def test_a_failed_run_is_run_again(store: RunStore) -> None:
    slots = Slots(grid()[:2], store)
    slots.start()
    slots.fail()
    (row,) = slots.trials.finished_rows
    assert (row["state"], row["reason"], row["value"]) == ("FAIL", "ValueError: a bug", None)
    slots.start()
    slots.finish()
    assert slots.start() is None  # not in the same session
    again = Slots(grid()[:2], store)
    assert [row["arm"] for row in again.trials.finished_rows] == ["b"]
    rows = again.run_all()
    assert again.started == [0]
    assert [row["state"] for row in rows] == ["COMPLETE", "COMPLETE"]


def test_a_run_at_fault_is_done_even_though_it_leaves_no_model(store: RunStore) -> None:
    runs = [run(keep_model=True)]
    slots = Slots(runs, store)
    slots.start()
    slots.mark(0)
    assert not slots.mark(1, fault="gradient not finite", metrics={})
    (row,) = slots.trials.finished_rows
    assert (row["state"], row["reason"]) == ("PRUNED", "gradient not finite")
    assert row["curve"] == [[10, score_of(runs[0], 10)]]
    again = Slots(runs, store)
    assert again.trials.is_over()
    assert again.trials.finished_rows == [row]


def test_a_run_whose_model_is_gone_is_run_again_where_it_is_wanted(store: RunStore) -> None:
    kept, plain = [run(keep_model=True)], [run()]
    slots = Slots(kept, store)
    slots.run_all()
    assert Slots(kept, store).trials.is_over()
    store.delete_folder(f"{FOLDER}/{kept[0].key}/best")
    assert Slots(plain, store).trials.is_over()
    again = Slots(kept, store)
    assert again.trials.num_pending == 1
    again.run_all()
    assert Slots(kept, store).trials.is_over()


@pytest.mark.parametrize(
    "text",
    [
        '{"number": 0, "state": "COMPL',
        "",
        "[]",
        "{}",
        '"COMPLETE"',
        '{"number": 0, "state": 3, "role": "a", "params": {}, "metrics": {}}',
        '{"number": 0, "state": "COMPLETE", "role": "a", "params": {}, "metrics": {}}',
        '{"number": 0, "state": "COMPLETE", "role": "a", "params": {}, "metrics": {"loss": "x"}}',
        '{"number": 0, "state": "COMPLETE", "role": "a", "params": {}, "metrics": {}, "key": "0"}',
        '{"number": 0, "state": "COMPLETE", "role": "a", "params": {}, "metrics": {}, "value": ""}',
    ],
)
def test_a_damaged_record_is_one_line_that_names_the_file(store: RunStore, text: str) -> None:
    Slots(grid(), store).run_all(most=2)
    path = f"{FOLDER}/{grid()[1].key}/trial.json"
    (store.local_root / path).write_text(text)
    with pytest.raises(ConfigError) as caught:
        FixedRuns(grid(), store, FOLDER)
    (line,) = caught.value.problems
    assert line.startswith(f"{store.location}/{path}: damaged")
    assert "\n" not in line


def test_runs_are_left_out_by_what_has_ended(store: RunStore) -> None:
    asked: list[tuple[int, int]] = []

    def leave_out(mine: FixedRun, rows: Sequence[Row]) -> bool:
        asked.append((mine.seed, len(rows)))
        return mine.arm == "b" and any(row["arm"] == "b" for row in rows)

    slots = Slots(grid(), store, leave_out=leave_out)
    assert slots.trials.num_pending == 4
    rows = slots.run_all()
    assert slots.started == [0, 1, 2]
    assert [(row["arm"], row["seed"]) for row in rows] == [("a", 1), ("b", 1), ("a", 2)]
    assert slots.trials.is_over()
    assert max(asked, key=lambda pair: pair[1]) == (2, 3)
    # What ended before counts too, whatever is left out of the rest.
    again = Slots(grid(), store, leave_out=leave_out)
    assert again.trials.is_over()
    assert again.trials.finished_rows == rows
    everything = Slots(grid(), store, leave_out=lambda *_: True)
    assert everything.trials.finished_rows == rows


def test_a_run_that_was_left_out_is_wanted_again_when_the_reason_is_gone(store: RunStore) -> None:
    def leave_out(mine: FixedRun, rows: Sequence[Row]) -> bool:
        return mine.arm == "b" and len(rows) < 2

    slots = Slots(grid(), store, leave_out=leave_out)
    slots.run_all()
    assert slots.started == [0, 2, 1, 3]


def test_a_run_ends_at_the_first_mark_as_far_as_was_asked(store: RunStore) -> None:
    for until, marks in ((10, 1), (11, 2), (67, 3), (100, 4)):
        store.delete()
        slots = Slots([run(until_percent=until)], store)
        slots.start()
        went_on = [slots.mark(0)]
        while went_on[-1]:
            went_on.append(slots.mark(len(went_on)))
        assert len(went_on) == marks
        (row,) = slots.trials.finished_rows
        assert [percent for percent, _ in row["curve"]] == list(MARKS[:marks])
        assert row["state"] == ("COMPLETE" if until == 100 else "PRUNED")
        assert (row["reason"] is None) == (until == 100)


def test_a_lost_slot_starts_a_run_over_a_few_times(store: RunStore) -> None:
    slots = Slots(grid()[:2], store)
    for lost in range(3):
        mine = slots.start()
        assert mine is not None
        assert mine.arm == "a"  # at once, before the rest of the list
        slots.mark(0)
        slots.conductor.on_slot_lost(f"tune {lost}", "Traceback …\nthe node is gone\n")
    slots.start()
    slots.finish()
    assert slots.trials.is_over()
    lost_row, fine = slots.trials.finished_rows
    assert (lost_row["state"], lost_row["restarts"]) == ("FAIL", 2)
    assert lost_row["reason"] == "slot lost: the node is gone"
    assert lost_row["curve"] == [[10, score_of(grid()[0], 10)]]
    assert (fine["state"], fine["restarts"]) == ("COMPLETE", 0)


def test_a_restarted_run_has_one_curve_and_one_record_of_marks(store: RunStore) -> None:
    slots = Slots([run()], store)
    slots.start()
    slots.mark(0)
    slots.mark(1)
    slots.conductor.on_slot_lost("tune 0", "gone")
    assert not slots.trials.is_over()
    (row,) = slots.run_all()
    assert row["restarts"] == 1
    assert [percent for percent, _ in row["curve"]] == list(MARKS)
    metrics = (store.local_root / FOLDER / run().key / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["percent"] for line in metrics] == list(MARKS)


def test_nothing_is_over_while_something_runs(store: RunStore) -> None:
    slots = Slots(grid()[:3], store, slots=2)
    slots.start()
    slots.start()
    slots.finish(1)
    slots.start()
    assert slots.start() is None
    assert not slots.trials.is_over()  # two are running
    slots.finish(0)
    assert not slots.trials.is_over()
    slots.finish(2)
    assert slots.trials.is_over()
    # In the order of the list, not of the ends.
    assert [row["number"] for row in slots.trials.finished_rows] == [0, 1, 2]


def test_three_failures_in_a_row_stop_the_list_and_the_next_call_goes_on(store: RunStore) -> None:
    slots = Slots(grid(), store)
    for _ in range(3):
        slots.start()
        slots.fail()
    assert slots.conductor.stopped == "3 failures in a row"
    again = Slots(grid(), store)
    assert [row["state"] for row in again.run_all()] == ["COMPLETE"] * 4


def test_states_and_models_go_only_when_the_study_that_says_so_is_stored(store: RunStore) -> None:
    stored = [False]
    slots = Slots([run(keep_model=True), run("b", 2e-4)], store)
    slots.conductor._store_study = lambda: stored[0]
    first = slots.start()
    assert first is not None
    last = f"{FOLDER}/{first.key}/last"
    with store.replacing_folder(last) as folder:
        (folder / "state").touch()
    slots.finish()
    slots.start()
    slots.conductor.settle()
    assert store.is_intact(last)
    stored[0] = True
    slots.conductor.settle()
    assert not store.files_below(last)


def test_a_fault_that_lies_before_old_marks_leaves_them(store: RunStore) -> None:
    slots = Slots([run()], store)
    mine = slots.start()
    assert mine is not None
    for index in (0, 1):
        slots.mark(index)
    found = {"fault": "not finite", "percent": 0, "slot_seconds": 9.0, "score": None}
    assert not slots.conductor.on_message("tune 0", {**message(0.0, 0), **found})
    (row,) = slots.trials.finished_rows
    assert (row["state"], row["reason"], len(row["curve"])) == ("PRUNED", "not finite", 2)
    assert row["value"] == pytest.approx(score_of(mine, MARKS[1]))
    assert sum(row[f"{kind}_seconds"] for kind in ("train", "eval", "overhead")) == 9.0
    lines = store.read_text(f"{FOLDER}/{mine.key}/metrics.jsonl")
    assert lines is not None
    assert len(lines.splitlines()) == 3


def test_who_fails_while_a_search_is_stopping_is_tried_again(store: RunStore) -> None:
    slots = Slots([run()], store)
    slots.start()
    slots.conductor.is_pausing = True
    slots.fail()
    assert slots.trials.finished_rows == []
    assert slots.trials.num_pending == 1
    assert "a bug" in (store.read_text("errors.log") or "")


def test_a_run_that_fails_in_another_slot_has_no_negative_overhead(store: RunStore) -> None:
    slots = Slots([run()], store)
    slots.start()
    slots.mark(0, train_seconds=300.0, slot_seconds=310.0)
    slots.conductor.on_slot_lost("tune 0", "gone", excused=True)
    slots.start()
    failed = {"failed": "ValueError: a bug", "traceback": "…", "slot_seconds": 20.0}
    slots.conductor.on_message("tune 1", failed)
    (row,) = slots.trials.finished_rows
    assert (row["train_seconds"], row["eval_seconds"]) == (300.0, 0.125)
    assert row["overhead_seconds"] == pytest.approx(310 - 300 - 0.125)
