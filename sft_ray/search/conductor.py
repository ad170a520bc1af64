"""Between Ray Tune and the study: a Tune searcher, a Tune scheduler, and what they share.

Tune's view of a trial is thin on purpose: it carries our number and nothing is decided from its
state, because it cannot tell a stop from a finish.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from optuna.trial import TrialState
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from sft_ray.analysis.outcome import Outcome
from sft_ray.analysis.results import row_of
from sft_ray.run_store import ERROR_LOG, RunStore, trial_folder
from sft_ray.screen import Screen, short_params
from sft_ray.search.study import PlannedTrial, SearchStudy

MAX_FAILURES_IN_A_ROW = 3


class Conductor:
    """Carries every message of a trial to study, run folder and screen.

    Attributes:
        stopped: why the search cannot go on, if so.
    """

    def __init__(
        self, study: SearchStudy, store: RunStore, screen: Screen, objective: str, slots: int
    ) -> None:
        self.study, self.store, self.screen = study, store, screen
        self.objective, self.slots = objective, slots
        self.stopped: str | None = None
        self.ready_at: float | None = None
        self.planned: dict[str, PlannedTrial] = {}  # by Tune's trial id
        self._last: dict[int, dict[str, Any]] = {}  # last message by our number
        self._lines: dict[int, list[str]] = {}  # of metrics.jsonl
        self._failures_in_a_row = 0
        self._best = study.best_score()

    def next_trial(self, tune_id: str) -> PlannedTrial | None:
        planned = self.study.next_trial()
        if planned is not None:
            self.planned[tune_id] = planned
            self.screen.event(f"trial {planned.number:<3} starts   {short_params(planned.params)}")
        return planned

    def on_message(self, tune_id: str, message: dict[str, Any]) -> bool:
        """Take in what a slot returned; whether the trial goes on."""
        number = self.planned[tune_id].number
        if self.ready_at is None:
            self.ready_at = time.monotonic() - message.get("slot_seconds", 0.0)
        if "failed" in message:
            self._log_error(number, message["failed"], message["traceback"])
            self._failures_in_a_row += 1
            last = {**self._last.get(number, {}), **message}
            if message.get("fault"):
                self._failures_in_a_row = 0
                self._end(number, TrialState.PRUNED, last, reason=message["failed"], fault=True)
            else:
                self._end(number, TrialState.FAIL, last, reason=message["failed"])
            return False
        self._failures_in_a_row = 0
        self._last[number] = message
        self._write_metrics(number, message)
        if message["fault"]:
            self._end(number, TrialState.PRUNED, message, reason=message["fault"], fault=True)
            return False
        score = message["metrics"][self.objective]
        reason = self.study.mark(number, message["percent"], score, message["slot_seconds"])
        self.screen.event(
            f"trial {number:<3} {message['percent']:3d}%    {self.objective} {score:.4f}  "
            f"train loss {message['train_loss']:.3f}  epoch {message['epochs_run']:.2f}"
        )
        if message["finished"]:
            self._end(number, TrialState.COMPLETE, message)
        elif reason is not None:
            self._end(number, TrialState.PRUNED, message, reason=reason)
        return not message["finished"] and reason is None

    def on_slot_lost(self, tune_id: str, reason: str) -> None:
        """A slot died under a trial: run it again elsewhere, a few times."""
        planned = self.planned.get(tune_id)
        if planned is None:
            return
        del self.planned[tune_id]
        self._log_error(planned.number, reason, "")
        self._failures_in_a_row += 1
        cause = reason.strip().splitlines()[-1]
        if self.study.restart(planned.number):
            self.screen.event(f"trial {planned.number:<3} lost its slot ({cause}), starts over")
        else:
            last = self._last.get(planned.number, {})
            self._end(planned.number, TrialState.FAIL, last, reason=f"slot lost: {cause}")

    def on_end(self, tune_id: str) -> None:
        self.planned.pop(tune_id, None)
        if self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
            self.stopped = f"{self._failures_in_a_row} failures in a row"

    def startup_seconds(self, since: float) -> float | None:
        """From `since` until the first slot was ready for its first trial."""
        return None if self.ready_at is None else self.ready_at - since

    def _end(
        self,
        number: int,
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
            restarts=self.study.restarts.get(number, 0),
            seconds=message.get("slot_seconds", 0.0),
        )
        self.study.finish(number, state, outcome)
        row = row_of(self.study.trials[number], self.study.experiment.seed)
        self.store.write_json(f"{trial_folder(number)}/trial.json", row)
        self.store.push_journal()
        self._retain()
        self._say_end(number, state, outcome)

    def _retain(self) -> None:
        kept = self.study.kept()
        for trial in self.study.trials:
            if trial.number not in kept:
                self.store.delete_folder(f"{trial_folder(trial.number)}/best")

    def _say_end(self, number: int, state: TrialState, outcome: Outcome) -> None:
        score = "" if outcome.score is None else f"{self.objective} {outcome.score:.4f}  "
        star = ""
        if state == TrialState.COMPLETE:
            assert outcome.score is not None  # a finished trial was evaluated
            sign = self.study.sign
            if self._best is None or sign * outcome.score > sign * self._best:
                self._best, star = outcome.score, "  best so far"
        why = f"({outcome.reason})  " if outcome.reason else ""
        if state == TrialState.FAIL:
            why = f"({outcome.reason}; see {self.store.path_of(ERROR_LOG)})  "
        self.screen.event(
            f"trial {number:<3} {state.name:<8} {score}{why}"
            f"{outcome.slot_seconds:.1f} s, {outcome.overhead_seconds:.2f} s overhead{star}"
        )

    def _write_metrics(self, number: int, message: dict[str, Any]) -> None:
        if message["index"] == 0:  # from the start, also after a restart
            self._lines[number] = []
        self._lines[number].append(json.dumps(message))
        self.store.write_text(
            f"{trial_folder(number)}/metrics.jsonl", "\n".join(self._lines[number]) + "\n"
        )

    def _log_error(self, number: int, reason: str, traceback: str) -> None:
        self.store.append_text(ERROR_LOG, f"trial {number}: {reason}\n{traceback}\n")


class StudySearcher(Searcher):
    """Tune asks it for trials; it answers while a slot is free."""

    def __init__(self, conductor: Conductor) -> None:
        super().__init__()
        self.conductor = conductor

    def suggest(self, trial_id: str) -> Any:
        if self.conductor.stopped is not None:
            return Searcher.FINISHED
        if len(self.conductor.planned) >= self.conductor.slots:
            return None
        planned = self.conductor.next_trial(trial_id)
        if planned is None:
            return None if self.conductor.planned else Searcher.FINISHED
        return {
            "assignment": {
                "number": planned.number,
                "train": planned.train.model_dump(mode="json"),
                "save_above": planned.save_above,
                "save_unfinished": planned.save_unfinished,
                "end_diverged": not planned.is_yardstick,
            }
        }

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        if error:
            self.conductor.on_slot_lost(trial_id, "the slot died")
        self.conductor.on_end(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the study is the state."""


class StudyScheduler(FIFOScheduler):
    """Tune asks it at every mark whether the trial goes on."""

    def __init__(self, conductor: Conductor) -> None:
        super().__init__()
        self.conductor = conductor

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        go_on = self.conductor.on_message(trial.trial_id, json.loads(result["message"]))
        return FIFOScheduler.CONTINUE if go_on else FIFOScheduler.STOP

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        error = Path(trial.error_file)  # Tune's local copy; the stored one comes later
        reason = error.read_text(encoding="utf-8") if error.exists() else "the slot died"
        self.conductor.on_slot_lost(trial.trial_id, reason)
