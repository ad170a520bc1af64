"""`sft-ray train`: one configuration, in this process, into a run folder like a search's."""

from __future__ import annotations

import json
import shlex
import time
from typing import Any

import torch

from sft_ray.analysis.model_card import model_card, settings_of
from sft_ray.analysis.outcome import Outcome, slot_seconds_of
from sft_ray.analysis.results import SearchResult
from sft_ray.analysis.rows import best_row, trial_row
from sft_ray.analysis.tables import padding_line, scored_words
from sft_ray.config import Experiment
from sft_ray.environment import continued, describe_environment
from sft_ray.errors import ResourceError, TrialError
from sft_ray.folder_rule import as_begun, check_folder_rule, check_made_by
from sft_ray.interrupt import interruptible
from sft_ray.run_store import (
    BEST,
    CHECKSUMS,
    CONFIRMATION,
    ENVIRONMENT,
    EXPERIMENT,
    PREDICTIONS,
    RESULTS,
    TRIAL,
    RunStore,
    damaged_files,
    delete_results,
    kept_environment,
    read_results,
    trial_folder,
    write_experiment,
    write_results,
)
from sft_ray.screen import Screen, duration, short_params
from sft_ray.training.beat import Beat
from sft_ray.training.checkpoint import save_model, save_predictions
from sft_ray.training.fitting import fit
from sft_ray.training.last_state import LastState
from sft_ray.training.micro_batch import StepOutOfMemoryError
from sft_ray.training.preparation import Prepared, check_origin, prepare_training
from sft_ray.training.progress import Progress
from sft_ray.training.resume_state import ResumeState
from sft_ray.training.setup import Setup, load_setup
from sft_ray.training.world import World

NUMBER = 0
FOLDER = trial_folder(NUMBER)
METRICS = f"{FOLDER}/metrics.jsonl"
# Of a finished training, what its trial.json and the experiment are enough to write anew.
REBUILT = {CHECKSUMS, CONFIRMATION, ENVIRONMENT, EXPERIMENT, RESULTS}
TIMES_HALVED = 2  # after running out of memory later than at the probe


def run_training(
    experiment: Experiment, *, fresh: bool = False, quiet: bool = False
) -> SearchResult:
    """Train the experiment's own configuration, or go on with an interrupted training.

    Needs no Ray.  One process: one GPU if there is one, else all cores.

    Args:
        experiment: its `train` section is what runs; its `search` section only names the objective
            and the rungs to evaluate at.
        fresh: set an existing run folder of that name aside and begin again.
        quiet: print nothing.

    Raises:
        SftError: something the user can mend; nothing has been written then.
        TrialError: the configuration is at fault; its marks are kept.
        KeyboardInterrupt: interrupted; the same call goes on from the step it stopped at.
    """
    screen = Screen(quiet)
    store = RunStore(experiment.storage, experiment.name)
    prepared = prepare_training(experiment if fresh else as_begun(experiment, store))
    experiment, tree = prepared.experiment, None
    if not fresh:
        check_made_by(store, "train")
        relation = check_folder_rule(store, experiment)
        # One training has no budget, so one that has grown changes nothing.
        if relation != "new" and not damaged_files(store):
            tree = read_results(store)
        check_origin(prepared, kept_environment(store), store.location)
    if tree is not None:
        screen.say(f"{store.location} is finished; its outcome:")
        result = SearchResult(store.location, tree)
        _say_outcome(screen, result, prepared)
        return result
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    setup = load_setup(experiment, prepared.dataset_folder, World(device=device))
    if fresh and store.is_there():
        screen.say(f"the old folder is now {store.set_aside()}")
    with store.locked() as notes:
        store.tidy()
        damaged = damaged_files(store)
        is_kept = bool(damaged) and set(damaged) <= REBUILT
        row = store.read_json(f"{FOLDER}/{TRIAL}") if is_kept else None
        how = "it is written anew" if row else "nothing else holds it, so the training is made anew"
        for note in [*notes, *(f"{path} was damaged; {how}" for path in damaged)]:
            screen.say(note)
        write_experiment(store, experiment)
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        now = describe_environment({"device": where, **prepared.facts()})
        environment = continued(now, kept_environment(store))
        store.write_json(ENVIRONMENT, environment)
        _say_truth(screen, prepared, store, device)
        if row:
            tree = _write_outcome(prepared, store, row, environment)
        else:
            delete_results(store)
            run = _Run(prepared, setup, store, screen)
            with interruptible() as interruption:
                outcome = run.train(lambda _: interruption.is_asked)
            tree = _conclude(prepared, store, run, outcome, environment)
    result = SearchResult(store.location, tree)
    _say_outcome(screen, result, prepared)
    return result


class _Run:
    """What the marks of the one trial leave in the run folder."""

    def __init__(self, prepared: Prepared, setup: Setup, store: RunStore, screen: Screen) -> None:
        self.prepared, self.setup, self.store, self.screen = prepared, setup, store, screen
        self.messages: list[dict[str, Any]] = []
        self._saved_percent: int | None = None
        self._began = time.monotonic()
        experiment = prepared.experiment
        every_minutes, seed = experiment.checkpoint.every_minutes, experiment.seed
        self.last = LastState(
            store, FOLDER, every_minutes, experiment.train, seed, self._facts, may_write=self._holds
        )
        self._seconds_before = 0.0

    @property
    def curve(self) -> dict[int, float]:
        objective = self.prepared.objective
        return {m["percent"]: m["metrics"][objective] for m in self.messages if m["metrics"]}

    def train(self, beat: Beat) -> Outcome:
        """Fit, from the last state if there is one; halve the micro-batch when memory runs out."""
        experiment = self.prepared.experiment
        most_examples = None
        for halvings in range(TIMES_HALVED + 1):
            try:
                paused = fit(
                    experiment.train,
                    self.setup,
                    objective=self.prepared.objective,
                    rungs=experiment.search.rungs,
                    seed=experiment.seed,
                    report=self.report,
                    beat=beat,
                    last=self.last,
                    resume=self._take_up(),
                    most_examples=most_examples,
                )
                break
            except StepOutOfMemoryError as error:
                if error.micro_batch == 1 or halvings == TIMES_HALVED:
                    raise TrialError(f"{experiment.name}: {error}") from None
                most_examples = error.micro_batch // 2
                self.screen.event(f"out of memory; going on with {most_examples} examples per pass")
        if paused is not None:
            self._check_held()
            self.last.write(paused)
            self.screen.event(f"paused at step {paused.facts['step']}")
            raise KeyboardInterrupt
        last = self.messages[-1]
        return Outcome.from_message(
            last, reason=last["fault"], fault=last["fault"] is not None, seconds=self._seconds()
        )

    def _seconds(self) -> float:
        """Of this trial, in all sessions."""
        return self._seconds_before + time.monotonic() - self._began

    def report(self, progress: Progress) -> bool:
        """Keep what a mark found: its scores, the best weights, now and then the state."""
        self._check_held()
        best, experiment = progress.best, self.prepared.experiment
        precision = experiment.train.precision
        if best is not None and best.percent != self._saved_percent:
            with self.store.replacing_folder(BEST) as folder:
                save_model(folder, self.setup, best.weights, experiment.data, precision)
                save_predictions(folder / PREDICTIONS, self.setup, best.outputs)
                self.store.write_bytes(PREDICTIONS, (folder / PREDICTIONS).read_bytes())
                (folder / PREDICTIONS).unlink()
            self._saved_percent = best.percent
        message = progress.message(self._saved_percent)
        message["seconds"] = self._seconds()
        self.messages.append(message)
        lines = "".join(f"{json.dumps(m)}\n" for m in self.messages)
        self.store.write_text(METRICS, lines)
        self._say_mark(progress)
        self.last.consider(progress)
        return True

    def _facts(self) -> dict[str, Any]:
        """What goes with a state of this trial."""
        return {"messages": self.messages, "seconds_before": self._seconds()}

    def _holds(self) -> bool:
        self._check_held()
        return True

    def _check_held(self) -> None:
        """Raise ResourceError if another driver holds the run: nothing may be written any more."""
        if self.store.is_taken_over:
            raise ResourceError(f"{self.store.location}: another driver has taken the run over")

    def _say_mark(self, progress: Progress) -> None:
        score = progress.metrics.get(self.prepared.objective)
        found = progress.fault or f"{self.prepared.objective} {score:.4f}"
        self.screen.event(
            f"{progress.percent:3d}%  {found}  train loss {progress.train_loss:.3f}  "
            f"epoch {progress.epochs_run:.2f}"
        )

    def _take_up(self) -> ResumeState | None:
        """The state of an interrupted training, with the marks that lead up to it."""
        state = self.last.load()
        if state is None:
            self.messages, self._saved_percent = [], None
            return None
        # The next mark writes the state's best model: the one in the folder may be a later one.
        self.messages, self._saved_percent = state.facts["messages"], None
        self._seconds_before, self._began = state.facts["seconds_before"], time.monotonic()
        self.screen.event(f"going on at step {state.facts['step']}")
        return state


def _conclude(
    prepared: Prepared,
    store: RunStore,
    run: _Run,
    outcome: Outcome,
    environment: dict[str, Any],
) -> dict[str, Any]:
    """Write the trial's record, then the outcome."""
    experiment = prepared.experiment
    row = trial_row(
        number=NUMBER,
        state="PRUNED" if outcome.fault else "COMPLETE",
        role="single",
        params=settings_of(experiment.train),
        train=experiment.train.model_dump(mode="json"),
        outcome=outcome,
        curve=run.curve,
        seed=experiment.seed,
    )
    store.write_json(f"{FOLDER}/{TRIAL}", row)
    if outcome.score is None:
        raise TrialError(f"{experiment.name}: {outcome.reason}; nothing was evaluated before")
    tree = _write_outcome(prepared, store, row, environment)
    run.last.delete()
    return tree


def _write_outcome(
    prepared: Prepared, store: RunStore, row: dict[str, Any], environment: dict[str, Any]
) -> dict[str, Any]:
    """The model card and results.json, which comes last."""
    experiment = prepared.experiment
    tree = {
        "name": experiment.name,
        "metric": prepared.objective,
        "direction": prepared.direction,
        "wall_seconds": slot_seconds_of(row),
        "startup_seconds": None,
        "best": best_row(row, None, store.path_of(BEST)),
        "trials": [row],
        "environment": environment,
    }
    labels, scored = prepared.dataset.label_names, scored_words(store)
    card = model_card(tree, experiment.to_tree(), labels, scored=scored)
    store.write_text(f"{BEST}/README.md", card)
    write_results(store, tree)
    return tree


def _say_truth(screen: Screen, prepared: Prepared, store: RunStore, device: torch.device) -> None:
    kind = "GPU" if device.type == "cuda" else "CPU"
    experiment = prepared.experiment
    unused = ["tracking"] if experiment.tracking else []
    said = experiment.resources.model_dump(exclude_defaults=True).keys() - {"trunk_cache_gb"}
    unused += [f"resources.{name}" for name in sorted(said)]
    screen.facts(
        {
            "train": f"{experiment.name} in {store.location}",
            **prepared.described(),
            "device": f"{kind}, {prepared.precision(kind)}",
            "settings": short_params(settings_of(experiment.train)),
            "objective": f"{prepared.objective}, {prepared.direction}; evaluated "
            + "".join(f"at {rung} %, " for rung in experiment.search.rungs)
            + "at every epoch's end",
            **({"not used": f"{', '.join(unused)}: of searches alone"} if unused else {}),
        }
    )
    screen.say()


def _say_outcome(screen: Screen, result: SearchResult, prepared: Prepared) -> None:
    best, trial = result.best, result.trials[0]
    screen.say()
    screen.facts(
        {
            "validation": ", ".join(f"{k} {v:.4f}" for k, v in best["validation"].items()),
            **({"ended": trial["reason"]} if trial["reason"] else {}),
            "time": duration(result.tree["wall_seconds"]),
            **padding_line(result.trials),
            "checkpoint": best["checkpoint"],
        }
    )
    screen.say()
    others = list[str]()
    if prepared.dataset.test_split == "labelled":
        others.append(f"sft-ray evaluate {shlex.quote(result.location)} --split test")
    prepared.say_next(screen, best["checkpoint"], *others)
