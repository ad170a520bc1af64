"""Written configurations on written seeds, over the same warm slots as a search."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from optuna.trial import TrialState

from sft_ray.analysis.outcome import Outcome, slot_seconds_of
from sft_ray.analysis.results import check_row
from sft_ray.analysis.rows import trial_row
from sft_ray.config import Experiment, Train
from sft_ray.errors import ConfigError
from sft_ray.run_store import TRIAL, RunStore
from sft_ray.screen import Screen
from sft_ray.search.board import Board, EndedTrial
from sft_ray.search.cluster import capacity, connected
from sft_ray.search.conductor import Conductor
from sft_ray.search.everywhere import check_storage_everywhere
from sft_ray.search.layout import plan_layout, with_room
from sft_ray.search.sharing import shared_layout
from sft_ray.search.tracking import Tracker
from sft_ray.search.trials import PlannedTrial
from sft_ray.space import FROZEN_LAYERS
from sft_ray.training.preparation import Prepared

Row = dict[str, Any]


@dataclass(frozen=True)
class FixedRun:
    """One configuration on one seed.

    Attributes:
        arm: which configuration this is, in words; runs of an arm differ in their seeds.
        params: what of `train` is worth telling, flat, by dotted path.
        training_share: of the training rows.
        keep_model: whether its best weights stay on disk.
        until_percent: of its schedule; the run ends at the first mark there or behind.
        trunks_read: what it read when it ran before, if it is to give the same numbers.
        setting: of what else its numbers depend on, where runs of several settings share a folder.
    """

    arm: str
    train: Train
    params: dict[str, Any]
    seed: int
    training_share: float = 1.0
    keep_model: bool = False
    until_percent: int = 100
    trunks_read: str | None = None
    setting: str = ""

    @property
    def key(self) -> str:
        """The same for runs that come to the same numbers."""
        what = [self.train.model_dump(mode="json"), self.seed, self.training_share, self.setting]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def never(run: FixedRun, rows: Sequence[Row]) -> bool:
    """Leaves no run out."""
    return False


class FixedRuns:
    """The list in the shape the conductor drives; what has finished before is not run again.

    Args:
        runs: in the order they start.
        store: the run folder.
        folder: below it, where each run has a folder named by its key.
        leave_out: asked before a run starts, with the rows of those that have finished.

    Raises:
        ConfigError: the record of a run that has ended is damaged.
    """

    def __init__(
        self,
        runs: Sequence[FixedRun],
        store: RunStore,
        folder: str,
        leave_out: Callable[[FixedRun, Sequence[Row]], bool] = never,
    ) -> None:
        self.runs, self.folder, self._leave_out = list(runs), folder, leave_out
        self.rows: dict[int, Row] = {}
        for number, run in enumerate(self.runs):
            row = self._row_before(run, store)
            if row is not None:
                self.rows[number] = {**row, "number": number, "arm": run.arm}
        self._pending = [n for n in range(len(self.runs)) if n not in self.rows]
        self._curves: dict[int, dict[int, float]] = {}  # of live runs

    def _folder_of(self, run: FixedRun) -> str:
        return f"{self.folder}/{run.key}"

    def _row_before(self, run: FixedRun, store: RunStore) -> Row | None:
        """What an earlier session left of a run; None if it is to run, or to run again."""
        path = f"{self._folder_of(run)}/{TRIAL}"
        row = store.read_json(path)
        if row is None:
            return None
        check_row(row, store.path_of(path))
        if row.get("key") != run.key or row.get("seed") != run.seed:
            raise ConfigError(f"{store.path_of(path)}: damaged: of another run; delete its folder")
        if row["state"] == TrialState.FAIL.name:
            return None
        is_kept = run.keep_model and row["state"] == TrialState.COMPLETE.name
        is_lacking = is_kept and not store.is_intact(f"{self._folder_of(run)}/best")
        return None if is_lacking else dict(row)

    @property
    def finished_rows(self) -> list[Row]:
        """Rows of the runs that have ended, in the order of the list."""
        return [self.rows[number] for number in sorted(self.rows)]

    @property
    def num_pending(self) -> int:
        """Runs that are still to start, as far as is known now."""
        return len(self._wanted())

    def _wanted(self) -> list[int]:
        """Of those that are to start; what is left out now may be wanted after another end."""
        rows = self.finished_rows
        return [n for n in self._pending if not self._leave_out(self.runs[n], rows)]

    def next_trial(self) -> PlannedTrial | None:
        wanted = self._wanted()
        if not wanted:
            return None
        number = wanted[0]
        self._pending.remove(number)
        self._curves[number] = {}
        run = self.runs[number]
        return PlannedTrial(
            number=number,
            label=f"run {number}",
            said=f"{run.arm}, seed {run.seed}",
            folder=self._folder_of(run),
            train=run.train,
            params=run.params,
            seed=run.seed,
            training_share=run.training_share,
            save_finished=run.keep_model,
            trunks_read=run.trunks_read,
            resumes=True,
        )

    def mark(self, number: int, percent: int, score: float, slot_seconds: float) -> str | None:
        self._curves[number].setdefault(percent, score)
        until = self.runs[number].until_percent
        return f"at {until} %, as far as was asked" if until <= percent < 100 else None

    def overdue(self) -> str | None:
        return None

    def finish(self, number: int, state: TrialState, outcome: Outcome) -> None:
        run = self.runs[number]
        row = trial_row(
            number=number,
            state=state.name,
            role=run.arm,
            params=run.params,
            train=run.train.model_dump(mode="json"),
            outcome=outcome,
            curve=self._curves.pop(number),
            seed=run.seed,
        )
        self.rows[number] = {
            **row,
            "key": run.key,
            "arm": run.arm,
            "training_share": run.training_share,
        }

    def put_back(self, number: int) -> None:
        del self._curves[number]
        self._pending.insert(0, number)

    def set_slots(self, slots: int) -> None:
        """Nothing follows from it."""

    def row(self, number: int) -> Row:
        return self.rows[number]

    def improves(self, score: float) -> bool:
        """No: these are not after the best."""
        return False

    def outdated(self) -> list[str]:
        """None: `keep_model` says what is written."""
        return []

    def open_board(self, objective: str, slots: int) -> Board:
        """What a live view shows at first; runs whose arm has fallen behind may yet be left out."""
        board = Board(objective, len(self.runs), slots, noun="run")
        for row in self.finished_rows:
            number, seconds = row["number"], slot_seconds_of(row)
            said = f"{row['arm']}, seed {row['seed']}"
            ended = EndedTrial(
                number, f"run {number}", row["state"], row["value"], None, seconds, said
            )
            board.add(ended)
        return board

    def is_over(self) -> bool:
        return not self._curves and self.num_pending == 0


def run_fixed(
    prepared: Prepared,
    runs: Sequence[FixedRun],
    store: RunStore,
    folder: str,
    screen: Screen,
    *,
    address: str | None = None,
    leave_out: Callable[[FixedRun, Sequence[Row]], bool] = never,
) -> list[Row]:
    """Run what has not finished before; the rows of all that ended, in the order of the list.

    Starts Ray only if there is something to run.  The caller holds the run's lock.

    Args:
        store: the run folder; results go below `folder` in it.
        address: of a Ray cluster, as in `run_search`.
        leave_out: asked before a run starts, with the rows of those that have ended.

    Raises:
        ResourceError: the cluster does not fit the experiment.
        TrialError: nothing can go on; what was finished is kept.
        KeyboardInterrupt: interrupted; the same call goes on where it stopped.
    """
    store.tidy()  # of workers that were killed
    trials = FixedRuns(runs, store, folder, leave_out)
    before = len(trials.finished_rows)
    if before:
        screen.event(f"{before} of {len(runs)} runs were finished before")
    pending = trials.num_pending
    at_first = sum(not leave_out(run, []) for run in runs)
    if pending:
        with connected(address):
            from sft_ray.search.live_view import live_view
            from sft_ray.search.tune_run import run_on_slots  # brings Ray

            everything = _of_runs(prepared.experiment, runs)
            experiment = _as_many(everything, pending)
            check_storage_everywhere(store.anchored()[0])
            trains = [run.train for run in runs]
            layout = shared_layout(replace(prepared, experiment=experiment), trains, screen)
            if not layout.gpus_per_worker:  # as many CPUs as at the first start: the same numbers
                begun = plan_layout(_as_many(experiment, max(at_first, pending)), capacity())
                cpus = with_room(begun, experiment.resources).cpus_per_worker
                layout = replace(layout, cpus_per_worker=cpus)
            tracker = Tracker(experiment.tracking, store, screen.event)
            conductor = Conductor(
                trials, store, screen, prepared.objective, layout.slots, tracker=tracker
            )
            with closing(tracker), live_view(screen, conductor.board):
                run_on_slots(conductor, replace(prepared, experiment=everything), layout)
        store.tidy()
        ended = {f"{folder}/{runs[number].key}/last" for number in trials.rows}
        for state in ended & store.folders_below(folder):
            store.delete_folder(state)
    return trials.finished_rows


def _of_runs(experiment: Experiment, runs: Sequence[FixedRun]) -> Experiment:
    """The experiment with their frozen depths as its space, by which outputs of layers are kept."""
    depths = list(dict.fromkeys(run.train.frozen_layers for run in runs))
    search = experiment.search.model_copy(update={"space": {FROZEN_LAYERS: {"choice": depths}}})
    return _as_many(experiment.model_copy(update={"search": search}), len(runs))


def _as_many(experiment: Experiment, number: int) -> Experiment:
    """The experiment with so many runs, however many trials the search had."""
    search = experiment.search.model_copy(update={"trials": number})
    return experiment.model_copy(update={"search": search})
