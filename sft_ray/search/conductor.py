"""Carries what slots report to whoever planned the trials, to the run folder and to the screen."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from optuna.trial import TrialState

from sft_ray.analysis.outcome import Outcome
from sft_ray.file_store import NEXT
from sft_ray.run_store import ERROR_LOG, METRICS, TRIAL, RunStore
from sft_ray.screen import Screen
from sft_ray.search.startup import Startup
from sft_ray.search.tracking import Tracker
from sft_ray.search.trials import PlannedTrial, Trials

MAX_FAILURES_IN_A_ROW = 3
MAX_RESTARTS = 2  # of a trial on another slot, after its own was lost


class Conductor:
    """Every message of every trial goes through here.

    Args:
        slots: most trials at a time.
        store_study: stores what the trials' states follow from, and says whether all of it is
            stored; called when a trial has begun, when its end has been taken in, and when `settle`
            is.
        tracker: tells other tools.
        startup: of the command; from here on if None.

    Attributes:
        stopped: why nothing can go on, if so.
        is_pausing: whether running trials are to write their states and no other may start.
        disk_problem: what the owner of a worker's disk has to mend before the search goes on.
        board: the state of all trials, for a live view.
    """

    def __init__(
        self,
        trials: Trials,
        store: RunStore,
        screen: Screen,
        objective: str,
        slots: int,
        store_study: Callable[[], bool] = lambda: True,
        tracker: Tracker | None = None,
        startup: Startup | None = None,
    ) -> None:
        self.trials, self.store, self.screen = trials, store, screen
        self.objective, self.slots, self._store_study = objective, slots, store_study
        self.board = trials.open_board(objective, slots)
        self._tracker = tracker or Tracker((), store, screen.event)
        self.startup = startup or Startup()
        self.stopped: str | None = None
        self.is_pausing = False
        self.disk_problem: str | None = None
        self.planned: dict[str, PlannedTrial] = {}  # by Tune's trial id
        self._last: dict[int, dict[str, Any]] = {}  # last message by our number
        self._lines: dict[int, list[str]] = {}  # of metrics.jsonl
        self._restarts: dict[int, int] = {}  # of slots that died under a trial, by our number
        self._failures_in_a_row = 0
        self._ended: list[str] = []  # folders of trials whose states go when their ends are stored
        self._with_models: set[str] | None = None  # folders of trials that may hold a model

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune writes down all that it is given, and the run folder is the state."""
        return {}

    @property
    def pauses(self) -> bool:
        """Whether running trials are to stop between two steps."""
        return self.is_pausing or self.trials.overdue() is not None

    @property
    def starts_no_more(self) -> bool:
        """Whether no trial may start any more."""
        return self.is_pausing or self.stopped is not None

    def next_trial(self, tune_id: str) -> PlannedTrial | None:
        if self._is_taken_over():
            return None
        planned = self.trials.next_trial()
        if planned is not None:
            self.planned[tune_id] = planned
            self._store_study()
            if self._with_models is not None:
                self._with_models.add(planned.folder)
            self.board.start(planned)
            self._tracker.start(planned)
            self.screen.event(f"{planned.label:<9} starts   {planned.said}")
        return planned

    def on_message(self, tune_id: str, message: dict[str, Any]) -> bool:
        """Take in what a slot returned; whether the trial goes on."""
        if self._is_taken_over():
            return False
        planned = self.planned[tune_id]
        number = planned.number
        if "paused" in message:
            if "disk" in message:
                self.disk_problem, self.is_pausing = message["disk"], True
            last = self._last.get(number, {})
            if not self.is_pausing and (overdue := self.trials.overdue()):
                last = {**last, **message, **_longer(last, message)}
                self._end(planned, TrialState.PRUNED, last, reason=f"budget: {overdue}")
            else:
                self._put_back(planned, f"paused   behind {last.get('percent', 0)} %")
            return False
        if "startup" in message:
            self.startup.hear(message.pop("startup"))
        if "failed" in message:
            self._log_error(planned, message["failed"], message["traceback"])
            if self.is_pausing and not message.get("fault"):
                self._put_back(planned, f"failed   ({message['failed']}), to be tried again")
                return False
            self._failures_in_a_row += 1
            last = self._last.get(number, {})
            last = {**last, **message, **_longer(last, message)}
            if message.get("fault"):
                self._failures_in_a_row = 0
                self._end(planned, TrialState.PRUNED, last, reason=message["failed"], fault=True)
            else:
                self._end(planned, TrialState.FAIL, last, reason=message["failed"])
            return False
        self._failures_in_a_row = 0
        if message["fault"]:
            self._write_metrics(planned, message)
            last = self._last.get(number, message)
            if last["percent"] > message["percent"]:  # after a restart, before marks of old
                message = {**last, "fault": message["fault"], **_longer(last, message)}
            self._end(planned, TrialState.PRUNED, message, reason=message["fault"], fault=True)
            return False
        self._last[number] = message
        self._write_metrics(planned, message)
        score = message["metrics"][self.objective]
        self.board.mark(number, message["percent"], score, message["train_loss"])
        self._tracker.mark(number, message)
        reason = self.trials.mark(number, message["percent"], score, message["slot_seconds"])
        if message.get("replayed"):
            return True
        self.screen.event(
            f"{planned.label:<9} {message['percent']:3d}%    {self.objective} {score:.4f}  "
            f"train loss {message['train_loss']:.3f}  epoch {message['epochs_run']:.2f}",
            passing=True,
        )
        if message["finished"]:
            self._end(planned, TrialState.COMPLETE, message)
        elif reason is not None:
            self._end(planned, TrialState.PRUNED, message, reason=reason)
        return not message["finished"] and reason is None

    def on_slot_lost(self, tune_id: str, reason: str, *, excused: bool = False) -> None:
        """A slot died under a trial: run it again elsewhere, a few times.

        Args:
            excused: the machine's end was the cause, which does not count against anybody.
        """
        planned = self.planned.get(tune_id)
        if planned is None:
            return
        del self.planned[tune_id]
        cause = reason.strip().splitlines()[-1]
        if excused:
            percent = self._last.get(planned.number, {}).get("percent", 0)
            self._put_back(planned, f"moves    behind {percent} % ({cause})")
            return
        self._log_error(planned, reason, "")
        self._failures_in_a_row += 1
        if self.is_pausing:
            self._put_back(planned, f"lost its slot ({cause})")
        elif self._restarts.get(planned.number, 0) < MAX_RESTARTS:
            self._restarts[planned.number] = self._restarts.get(planned.number, 0) + 1
            self._put_back(planned, f"lost its slot ({cause}), goes on elsewhere")
        else:
            last = self._last.get(planned.number, {})
            self._end(planned, TrialState.FAIL, last, reason=f"slot lost: {cause}")

    def _put_back(self, planned: PlannedTrial, said: str) -> None:
        """A trial that the same command will go on with."""
        self.trials.put_back(planned.number)
        self.board.lose(planned.number)
        self.screen.event(f"{planned.label:<9} {said}")

    def set_slots(self, slots: int) -> None:
        """There is room for more, or for fewer: those beyond it get no other trial."""
        self.slots = self.board.slots = slots
        self.trials.set_slots(slots)

    def forgive(self) -> None:
        """The failures so far have a cause that is out of the way."""
        self._failures_in_a_row = 0

    def on_slot_free(self, tune_id: str) -> None:
        self.planned.pop(tune_id, None)
        if self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
            self.stopped = f"{self._failures_in_a_row} failures in a row"

    def settle(self) -> None:
        """To be called now and then: store the study, then remove what it has no more use for.

        A driver that takes up an older copy finds the states and models that this one speaks of.
        No slot that trains waits for it.
        """
        if self._is_taken_over() or not self._store_study() or not self._ended:
            return
        for folder in self._ended:
            self.store.delete_folder(f"{folder}/last")
        self._ended.clear()
        self._delete_outdated()

    def _end(
        self,
        planned: PlannedTrial,
        state: TrialState,
        message: dict[str, Any],
        *,
        reason: str | None = None,
        fault: bool = False,
    ) -> None:
        outcome = Outcome.from_message(
            message,
            reason=reason,
            fault=fault,
            restarts=self._restarts.get(planned.number, 0),
            seconds=message.get("slot_seconds", 0.0),
        )
        is_best = (
            state == TrialState.COMPLETE
            and outcome.score is not None
            and self.trials.improves(outcome.score)
        )
        self.trials.finish(planned.number, state, outcome)
        self.board.end(planned.number, state.name, outcome.score, outcome.slot_seconds)
        self._tracker.end(planned.number, has_failed=state == TrialState.FAIL)
        row = self.trials.row(planned.number)
        if self.store.local_root is None:
            self._store_metrics(planned)
        self.store.write_json(f"{planned.folder}/{TRIAL}", row)
        self._last.pop(planned.number, None)
        self._lines.pop(planned.number, None)
        self._ended.append(planned.folder)
        self._store_study()
        self._say_end(planned, state, outcome, is_best)

    def _delete_outdated(self) -> None:
        """Remove models that are not among the best; asks storage only about what may be there."""
        outdated = set(self.trials.outdated())
        if self._with_models is None and outdated:
            there = self.store.files_below("trials")
            running = {planned.folder for planned in self.planned.values()}
            self._with_models = running | {p.partition("/best")[0] for p in there if "/best" in p}
        for folder in sorted((self._with_models or set()) & outdated):
            self.store.delete_folder(f"{folder}/best")
            self.store.delete_folder(f"{folder}/best{NEXT}")
        self._with_models = self._with_models and self._with_models - outdated

    def _is_taken_over(self) -> bool:
        """Whether another driver holds the run by now: nothing may be written any more."""
        if self.store.is_taken_over:
            self.stopped = "another driver took the run over"
        return self.store.is_taken_over

    def _say_end(
        self, planned: PlannedTrial, state: TrialState, outcome: Outcome, is_best: bool
    ) -> None:
        score = "" if outcome.score is None else f"{self.objective} {outcome.score:.4f}  "
        star = "  best so far" if is_best else ""
        why = f"({outcome.reason})  " if outcome.reason else ""
        trunk = outcome.trunk_seconds
        frozen = f", {trunk:.1f} s of it for frozen layers" if trunk >= 0.1 else ""
        if state == TrialState.FAIL:
            why = f"({outcome.reason}; see {self.store.path_of(ERROR_LOG)})  "
        self.screen.event(
            f"{planned.label:<9} {state.name:<8} {score}{why}"
            f"{outcome.slot_seconds:.1f} s, {outcome.overhead_seconds:.2f} s overhead{frozen}{star}"
        )

    def _write_metrics(self, planned: PlannedTrial, message: dict[str, Any]) -> None:
        if message["index"] == 0 and not message["fault"]:  # from the start, also after a restart
            self._lines[planned.number] = []
        self._lines.setdefault(planned.number, []).append(json.dumps(message))
        # An object store gets them at the end: whoever takes the trial up is told every mark anew.
        if self.store.local_root is not None:
            self._store_metrics(planned)

    def _store_metrics(self, planned: PlannedTrial) -> None:
        if lines := self._lines.get(planned.number):
            text = "\n".join(lines)
            self.store.write_text(f"{planned.folder}/{METRICS}", f"{text}\n", waits=False)

    def _log_error(self, planned: PlannedTrial, reason: str, traceback: str) -> None:
        self.store.append_text(ERROR_LOG, f"{planned.label}: {reason}\n{traceback}\n")


def _longer(last: dict[str, Any], message: dict[str, Any]) -> dict[str, float]:
    """A trial that starts over in another slot has taken the time that it took before, too."""
    return {"slot_seconds": max(m.get("slot_seconds", 0.0) for m in (last, message))}
