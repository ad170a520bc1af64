"""Run a search: preflight, a folder, slots, Ray Tune over the study, the outcome."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import optuna
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import FrozenTrial

from sft_ray.analysis.importance import importances
from sft_ray.analysis.model_card import model_card
from sft_ray.analysis.outcome import slot_seconds_of
from sft_ray.analysis.results import SearchResult, load_study, reading
from sft_ray.analysis.rows import best_row, gain_over_default, pareto_rows, ranking, row_of
from sft_ray.analysis.tables import scored_words
from sft_ray.config import Experiment
from sft_ray.environment import continued, describe_environment
from sft_ray.errors import ConfigError, TrialError
from sft_ray.folder_rule import as_begun, check_folder_rule, check_made_by
from sft_ray.recipes import default_recipe
from sft_ray.run_store import (
    BEFORE,
    BEST,
    CONFIRMATION,
    ENVIRONMENT,
    EXPERIMENT,
    JOURNAL,
    RESULTS,
    RunStore,
    damaged_files,
    delete_results,
    experiment_text,
    kept_environment,
    put_winner,
    read_experiment,
    read_results,
    trial_folder,
    write_experiment,
    write_results,
)
from sft_ray.screen import Screen, count
from sft_ray.search.cluster import accelerators, capacity_here, connected
from sft_ray.search.conductor import Conductor
from sft_ray.search.everywhere import check_storage_everywhere
from sft_ray.search.layout import Layout
from sft_ray.search.mending import damage_found, mend, records_back, winner_back
from sft_ray.search.narration import how_to_go_on, say_outcome, say_truth, say_unconfirmed
from sft_ray.search.preflight import (
    check_default_recipe,
    check_experiment,
    check_searches,
    runs_default_recipe,
    with_default_space,
)
from sft_ray.search.sharing import shared_layout, trains_of_search
from sft_ray.search.startup import Startup
from sft_ray.search.study import SearchStudy, open_storage
from sft_ray.search.tracking import Tracker
from sft_ray.search.warm_start import warm_configurations
from sft_ray.training.preparation import Prepared, check_origin


def run_search(
    experiment: Experiment,
    *,
    address: str | None = None,
    fresh: bool = False,
    extend: int = 0,
    quiet: bool = False,
    source: str | None = None,
) -> SearchResult:
    """Run or resume the search of an experiment and return its outcome.

    Args:
        experiment: what to search.
        address: of a Ray cluster; None uses the current `ray.init`, a cluster that runs on this
            machine, or starts Ray here.
        fresh: set an existing run folder of that name aside and begin again.
        extend: trials to add to those that the run folder was made for.
        quiet: print nothing.
        source: the command's arguments, for the hints at the end.

    Raises:
        SftError: something the user can mend; nothing has been written then.
        TrialError: the search could not go on; what was finished is kept.
        KeyboardInterrupt: interrupted; the same call goes on where it stopped.
    """
    screen, startup = Screen(quiet), Startup()
    if extend:
        experiment = extended(experiment, extend, screen)
    check_searches(experiment)
    store = RunStore(experiment.storage, experiment.name)
    if not fresh:
        experiment = as_begun(experiment, store)
    checked = check_experiment(experiment, capacity_here(address))
    warm = []
    search = experiment.search
    needs_space = (
        search.warm_start
        or search.enqueue
        or search.sampler == "grid"
        or search.pruner == "patient"
        or experiment.train.reinit_layers
        or experiment.train.schedule == "constant_with_cooldown"
    )
    if store.is_there() or needs_space:  # and what does not go with it is told before Ray starts
        checked = with_default_space(checked)
        if runs_default_recipe(experiment):
            check_default_recipe(checked)
        tree = None
        if not fresh:
            check_made_by(store, "search")
            relation = check_folder_rule(store, checked.experiment)
            check_origin(checked, kept_environment(store), store.location)
            tree = _outcome(checked, store, screen, has_grown=relation == "extended")
        if tree is not None:
            result = SearchResult(store.location, tree)
            say_outcome(screen, result, checked, source)
            return _confirmed(checked.experiment, store, result, address, quiet)
        if fresh or not store.exists(JOURNAL):
            facts, objective = checked.facts(), checked.objective
            warm = warm_configurations(checked.experiment, facts, objective)
    store.check_writable()  # before Ray starts in vain
    store.check_free()
    startup.end("checks")
    with connected(address, beside=checked.facts):
        startup.end("ray")
        prepared = with_default_space(checked)
        experiment = prepared.experiment
        check_storage_everywhere(store.anchored()[0])
        layout = shared_layout(prepared, trains_of_search(prepared), screen)
        tracker = Tracker(experiment.tracking, store, screen.event)
        if fresh and store.is_there():
            screen.say(f"the old folder is now {store.set_aside()}")
        with store.locked() as notes:
            for note in notes:
                screen.say(note)
            if not store.exists(EXPERIMENT):  # before there is a study, which is of no other
                write_experiment(store, prepared.experiment)
            store.tidy()
            damaged = damaged_files(store)
            study = _taken_up(prepared, store, damaged, layout.slots, warm, screen)
            before = _winner_before(store, damaged)
            is_over = study.is_over()  # a kill came between its last trial and its results
            best = _best_since(before, store, study, screen) if is_over else None
            is_lost = before is None and CONFIRMATION not in damaged and store.exists(CONFIRMATION)
            if is_lost and experiment.confirm is None:
                say_unconfirmed(store, screen)
            environment = _write_what_runs(prepared, store, layout)
            say_truth(screen, prepared, layout, store.location, study)
            if not is_over:
                _run(prepared, store, study, layout, screen, tracker, startup)
                store.tidy()  # of workers that were killed
                _forget_what_is_over(store, study)
                best = _best_since(before, store, study, screen)
            if best and before and before[CONFIRMATION] and experiment.confirm is None:
                say_unconfirmed(store, screen)
            result = _conclude(prepared, store, study, best, before, environment, startup)
        say_outcome(screen, result, prepared, source)
        return _confirmed(experiment, store, result, address, quiet)


def _confirmed(
    experiment: Experiment, store: RunStore, result: SearchResult, address: str | None, quiet: bool
) -> SearchResult:
    """The outcome behind the confirmation that the experiment asks for, within its budget."""
    if experiment.confirm is None:
        return result
    from sft_ray.search.confirm import run_confirm, seconds_taken

    budget, tree = experiment.search.budget, result.tree
    slots, left = tree["environment"].get("slots", 1), []
    if budget.wall_minutes is not None:
        left.append(60 * budget.wall_minutes - tree["wall_seconds"])
    if budget.worker_hours is not None:
        slot_seconds = sum(slot_seconds_of(row) for row in tree["trials"])
        workers = experiment.resources.workers_per_trial
        left.append((3600 * budget.worker_hours / workers - slot_seconds) / slots)
    # What runs of a confirmation that was interrupted have taken is not given again.
    seconds = min(left) - seconds_taken(store) / slots if left else None
    confirm = experiment.confirm
    return run_confirm(store, confirm, address=address, quiet=quiet, seconds=seconds).result


def extended(experiment: Experiment, by: int, screen: Screen) -> Experiment:
    """The experiment with so many trials more than its finished run was made for.

    A run that is not finished, or not confirmed as it asks for, goes on with the trials it has: it
    may be this very extension.
    """
    store = RunStore(experiment.storage, experiment.name)
    is_new = experiment_text(store) is None
    before = experiment if is_new else read_experiment(store)
    trials = before.search.trials
    is_finished = store.exists(RESULTS)
    if is_new or (is_finished and _has_its_confirmation(experiment, store)):
        trials += by
    else:
        lacking = "confirmed" if is_finished else f"finished with its {count(trials, 'trial')}"
        screen.say(
            f"{store.location} is not {lacking} yet, so --extend adds no trials this time; "
            f"search.trials={trials + by} would"
        )
    search = experiment.search.model_copy(update={"trials": trials})
    return experiment.model_copy(update={"search": search})


def _has_its_confirmation(experiment: Experiment, store: RunStore) -> bool:
    """Whether the run folder holds the confirmation that the experiment asks for, to its end."""
    if experiment.confirm is None:
        return True
    from sft_ray.search.confirm import is_confirmed

    try:
        # Its record comes before the outcome that speaks of its winner.
        with reading(store.path_of(RESULTS)):
            has_outcome = "expected" in read_results(store)["best"]
        return has_outcome and is_confirmed(store, experiment.seed, experiment.confirm)
    except ConfigError:  # damaged, and made anew
        return False


def _outcome(checked: Prepared, store: RunStore, screen: Screen, *, has_grown: bool) -> Any:
    """results.json of a run that has nothing left to run, and says so; else None.

    None too if more than records of trials is damaged, so that it is made anew.
    """
    damaged = damaged_files(store)
    if not store.exists(RESULTS) or _is_damaged(damaged):
        return None
    said, now = f"{store.location} is finished; its outcome:", dict[str, str]()
    if has_grown:
        ended_by = _ended_by(checked, store)
        if ended_by is None:
            return None
        now = {"ended_by": ended_by[0]}  # another limit than the one that was reached first
        said = f"{store.location}: nothing to run: {how_to_go_on(*ended_by)}; its outcome:"
    if damaged:
        with store.locked():
            for note in records_back(store, damaged):
                screen.say(note)
    screen.say(said)
    return read_results(store) | now


def _is_damaged(files: Sequence[str]) -> bool:
    """Whether more than records of trials, which the results have too, is among them."""
    return any(not path.startswith("trials/") for path in files)


def _ended_by(checked: Prepared, store: RunStore) -> tuple[str, str] | None:
    """See `SearchStudy.ended_by`, of the stored study and the experiment's limits as they are."""
    try:
        stored = load_study(store)
    except ConfigError:  # it is mended when it is taken up
        return None
    name, copy = stored.study_name, InMemoryStorage()
    optuna.copy_study(
        from_study_name=name, from_storage=stored._storage, to_storage=copy, to_study_name=name
    )
    environment = kept_environment(store)
    slots = environment.get("slots", 1) if isinstance(environment, dict) else 1
    study = _study(checked, copy, slots, [])
    return study.ended_by() if study.is_over() else None


def _taken_up(
    prepared: Prepared,
    store: RunStore,
    damaged: Sequence[str],
    slots: int,
    warm: list[dict[str, Any]],
    screen: Screen,
) -> SearchStudy:
    """The study of a run folder, new or as it was left; says what it finds damaged."""
    notes = [*damage_found(store, damaged), *winner_back(store, damaged), *store.pull_journal()]
    for note in notes:
        screen.say(note)
    study = _open_study(prepared, store, slots, warm)
    store.push_journal()  # what runs first is settled from here on
    study.without_model = _without_model(store, study)
    study.left_behind = _forget_what_is_over(store, study)
    for note in mend(store, study):
        screen.say(note)
    return study


def _write_what_runs(prepared: Prepared, store: RunStore, layout: Layout) -> dict[str, Any]:
    """The experiment and its environment, which is returned; results of before go."""
    delete_results(store)
    write_experiment(store, prepared.experiment)
    now = describe_environment(
        {
            "slots": layout.slots,
            "workers_per_trial": layout.workers_per_trial,
            "cpus_per_worker": layout.cpus_per_worker,
            "gpus_per_worker": layout.gpus_per_worker,
            "accelerators": accelerators(),
            **prepared.facts(),
        }
    )
    environment = continued(now, kept_environment(store))
    store.write_json(ENVIRONMENT, environment)
    return environment


def _winner_before(store: RunStore, damaged: Sequence[str]) -> dict[str, Any] | None:
    """The best trial of a finished run, and its confirmation; None if they are not whole.

    Kept where a kill leaves them, until there are other results.
    """
    if store.exists(RESULTS) and _is_damaged(damaged):
        store.delete_file(BEFORE)  # of results before these
    elif store.exists(RESULTS):
        confirmation = store.read_json(CONFIRMATION)
        store.write_json(BEFORE, {"best": read_results(store)["best"], CONFIRMATION: confirmation})
    before: dict[str, Any] | None = store.read_json(BEFORE)
    return before


def _run(
    prepared: Prepared,
    store: RunStore,
    study: SearchStudy,
    layout: Layout,
    screen: Screen,
    tracker: Tracker,
    startup: Startup,
) -> None:
    """Run trials until the study is over."""
    from sft_ray.search.live_view import live_view
    from sft_ray.search.tune_run import run_on_slots  # brings Ray

    conductor = Conductor(
        study,
        store,
        screen,
        prepared.objective,
        layout.slots,
        lambda: store.push_journal(now=False),
        tracker,
        startup,
    )
    try:
        with closing(tracker), live_view(screen, conductor.board):
            run_on_slots(conductor, prepared, layout)
    finally:
        if not store.is_taken_over:
            study.note_wall_seconds()  # it may have ended between two trials
            store.push_journal()


def _without_model(store: RunStore, study: SearchStudy) -> frozenset[int]:
    """Numbers of the ended trials whose models are not there."""
    there = store.folders_below("trials")
    ended = (trial.number for trial in study.trials if trial.state.is_finished())
    return frozenset(number for number in ended if f"{trial_folder(number)}/{BEST}" not in there)


def _forget_what_is_over(store: RunStore, study: SearchStudy) -> frozenset[int]:
    """States of trials that have ended, models that are not kept: a kill may have left some.

    Returns:
        Numbers of the trials whose state stays.
    """
    ended = {trial_folder(t.number) for t in study.trials if t.state.is_finished()}
    outdated = set(study.outdated())
    numbers = set[int]()
    for path in sorted(store.folders_below("trials")):
        folder, _, kind = path.rpartition("/")
        if (kind == "last" and folder in ended) or (kind == BEST and folder in outdated):
            store.delete_folder(path)
        elif kind == "last":
            numbers.add(int(folder.rpartition("/")[2]))
    return frozenset(numbers)


def _open_study(
    prepared: Prepared, store: RunStore, slots: int, warm: list[dict[str, Any]]
) -> SearchStudy:
    if not store.journal.exists():  # with all that is first in line, or not at all
        begun = store.journal.with_name(f".{JOURNAL}.begun")
        begun.unlink(missing_ok=True)
        _study(prepared, open_storage(begun), slots, warm)
        begun.replace(store.journal)
    try:
        storage = open_storage(store.journal)
    except Exception as error:  # Optuna takes the records at their word
        raise ConfigError(
            f"{store.path_of(JOURNAL)}: damaged: {type(error).__name__}: {error}; --fresh sets the "
            "run aside"
        ) from None
    return _study(prepared, storage, slots, warm)


def _study(
    prepared: Prepared, storage: BaseStorage, slots: int, warm: list[dict[str, Any]]
) -> SearchStudy:
    return SearchStudy(
        prepared.experiment,
        storage,
        recipe=default_recipe(prepared.model.layer_parameters),
        num_layers=prepared.model.num_layers,
        direction=prepared.direction,
        slots=slots,
        warm=warm,
    )


def _conclude(
    prepared: Prepared,
    store: RunStore,
    study: SearchStudy,
    best: FrozenTrial | None,
    before: dict[str, Any] | None,
    environment: dict[str, Any],
    startup: Startup,
) -> SearchResult:
    """Put the winner in best/ and write results.json last.

    Args:
        best: the best trial; None where what `_winner_before` has found stays.
    """
    ended_by = study.ended_by()
    tree = {
        "name": prepared.experiment.name,
        "metric": prepared.objective,
        "direction": prepared.direction,
        "costs": list(study.costs),
        "wall_seconds": study.wall_seconds(),
        "startup_seconds": startup.seconds,
        "startup_parts": None if startup.seconds is None else startup.parts,
        "ended_by": None if ended_by is None else ended_by[0],
        "best": before and before["best"],
        "pareto": pareto_rows(study.trials, study.pareto_set(), study.costs),
        "importance": importances(study.trials, prepared.experiment.search.rungs),
        "trials": [row_of(trial, prepared.experiment.seed) for trial in study.trials],
        "environment": environment,
    }
    if best is not None:
        gain = gain_over_default(study.trials, best, study.sign)
        tree["best"] = best_row(row_of(best, prepared.experiment.seed), gain, store.path_of(BEST))
        card = model_card(
            tree,
            prepared.experiment.to_tree(),
            prepared.dataset.label_names,
            scored=scored_words(store),
        )
        put_winner(store, f"{trial_folder(best.number)}/best", card)
    elif before is not None and before[CONFIRMATION] is not None:
        store.write_json(CONFIRMATION, before[CONFIRMATION])
    write_results(store, tree)
    store.delete_file(BEFORE)
    return SearchResult(store.location, tree)


def _best_since(
    before: dict[str, Any] | None, store: RunStore, study: SearchStudy, screen: Screen
) -> FrozenTrial | None:
    """The best trial of a study that is over; None where the winner of before stays.

    Raises:
        TrialError: there is neither.
    """
    try:
        return _best_with_model(store, study, screen)
    except TrialError:
        if before is None:
            raise
        screen.say("no trial since has left a model, so the winner of before stays")
        return None


def _best_with_model(store: RunStore, study: SearchStudy, screen: Screen) -> FrozenTrial:
    """The best trial whose model folder is whole; says which ones before it are not.

    Raises:
        TrialError: there is none.
    """
    damaged = list[int]()
    for place, trial in enumerate(ranking(study.trials, study.sign)):
        folder = f"{trial_folder(trial.number)}/{BEST}"
        if store.is_intact(folder):
            if damaged:
                screen.say(f"the winner is the best trial with a whole model, {trial.number}")
            return trial
        is_there = bool(store.files_below(folder))
        if is_there or place < study.experiment.checkpoint.keep:  # others were not kept
            what = "damaged" if is_there else "gone"
            screen.say(f"{folder} is {what}; the model of trial {trial.number} is lost")
            damaged.append(trial.number)
    whole = "whole " if damaged else ""
    ended_by = study.ended_by()
    how = "" if ended_by is None else f"; {how_to_go_on(*ended_by)}"
    raise TrialError(
        f"none of {len(study.trials)} trials left a {whole}model; their reasons are in "
        f"{store.path_of('trials')}{how}"
    )
