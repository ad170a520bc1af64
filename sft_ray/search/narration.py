"""What a search says before its first trial and after its last."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sft_ray import space as spaces
from sft_ray.analysis.importance import RELIABLE_FROM, is_reliable
from sft_ray.analysis.outcome import slot_seconds_of
from sft_ray.analysis.results import SearchResult
from sft_ray.analysis.rows import why_no_gain
from sft_ray.analysis.tables import padding_line, startup_line
from sft_ray.config import Budget, Experiment, Train
from sft_ray.folder_rule import BUDGET, SPACE, TARGET, TRIALS
from sft_ray.run_store import RunStore
from sft_ray.screen import Screen, count, duration, short_params
from sft_ray.search.layout import Layout
from sft_ray.search.study import SearchStudy
from sft_ray.training.preparation import Prepared

if TYPE_CHECKING:
    from sft_ray.analysis.ablation import ArmSummary  # brings scipy.stats


def say_truth(
    screen: Screen, prepared: Prepared, layout: Layout, location: str, study: SearchStudy
) -> None:
    """Everything that was resolved: device and why, layout, data, marks, budget, space."""
    experiment = prepared.experiment
    finished = sum(trial.state.is_finished() for trial in study.trials)
    resumed = f", going on with {finished} trials finished" if study.trials else ""
    device = "GPU" if layout.gpus_per_worker else "CPU"
    screen.facts(
        {
            "search": f"{experiment.name} in {location}{resumed}",
            **prepared.described(),
            "device": f"{device}, {prepared.precision(device)}",
            "layout": layout_in_words(layout),
            "objective": ", ".join(
                [f"{prepared.objective}, {prepared.direction}"]
                + [f"{cost}, minimize" for cost in experiment.search.costs]
            ),
            "search by": search_rules(prepared),
            "budget": budget(prepared),
            "default": short_params(spaces.parameters(study.recipe)),
            **space_lines(experiment),
        }
    )
    screen.say()


def layout_in_words(layout: Layout) -> str:
    gpus = f" and {count(layout.gpus_per_worker, 'GPU')}" if layout.gpus_per_worker else ""
    return (
        f"{count(layout.slots, 'slot')} x {count(layout.workers_per_trial, 'worker')} x "
        f"{count(layout.cpus_per_worker, 'CPU')}{gpus}"
    )


def search_rules(prepared: Prepared) -> str:
    search = prepared.experiment.search
    if search.pruner == "none":
        return f"{search.sampler}, no pruning"
    rungs = " and ".join(f"{rung} %" for rung in search.rungs)
    asked = f"at {rungs} of its own schedule a trial"
    if search.pruner == "successive_halving":
        rule = f"{asked} goes on if it is among the best 1/{search.reduction_factor}"
    else:
        rule = f"{asked} is judged by {search.pruner}"
    return f"{search.sampler}; {rule}; evaluated there and at every epoch's end"


def space_lines(experiment: Experiment) -> dict[str, str]:
    """What is searched, and what `train` says in vain."""
    space, train = experiment.search.domains, experiment.train
    searched = "; ".join(
        f"{path.removeprefix('train.')} {spaces.describe(domain)}" for path, domain in space.items()
    )
    names = [path.removeprefix("train.") for path in space]
    in_vain = [name for name in names if getattr(train, name) != getattr(Train(), name)]
    said = ", ".join(f"train.{name}" for name in in_vain)
    return {
        "space": searched or "nothing",
        **({"not used": f"{said} as written: search.space decides"} if said else {}),
    }


def budget(prepared: Prepared) -> str:
    search = prepared.experiment.search
    limits = [
        f"{name.replace('_', ' ')} {value:g}"
        for name, value in search.budget.model_dump().items()
        if value is not None
    ]
    return ", ".join([f"{search.trials} trials", *limits])


def say_outcome(
    screen: Screen, result: SearchResult, prepared: Prepared, source: str | None
) -> None:
    """The winner, what it gained, and the commands to type next."""
    best, gain = result.best, result.best["gain_over_default"]
    states = [trial["state"] for trial in result.trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    unfinished = "" if best["complete"] else " (unfinished: no trial reached its end)"
    over = "over the default recipe"
    who = "the default recipe" if best["trial"] is None else f"trial {best['trial']}"
    screen.say()
    screen.facts(
        {
            "best": f"{who}: {short_params(best['params'])}{unfinished}",
            "validation": ", ".join(f"{k} {v:.4f}" for k, v in best["validation"].items()),
            "gain": f"{gain:+.4f} {result.tree['metric']} {over}"
            if gain is not None
            else f"unknown {over}, {why_no_gain(result.trials)}",
            "trials": f"{len(states)}: {counts}; {duration(result.tree['wall_seconds'])}",
            **startup_line(result.tree),
            **padding_line(result.trials),
            **ended_line(result.tree.get("ended_by"), prepared.experiment.search.budget),
            **importance_lines(result.tree.get("importance", {})),
            "checkpoint": best["checkpoint"],
        }
    )
    say_pareto(screen, result)
    screen.say()
    if prepared.experiment.confirm is not None:
        return
    confirm = f"sft-ray confirm {shlex.quote(result.location)}"
    test = " and on test" if prepared.dataset.test_split == "labelled" else ""
    others = [f"{confirm}    # how good it is on fresh seeds{test}"]
    grown = grown_limits(result, prepared.experiment)
    if source is not None and grown:
        keys = tuple(f"{key}=" for key in grown)
        words = [word for word in shlex.split(source) if not word.startswith(keys)]
        words += [f"{key}{value}" for key, value in zip(keys, grown.values(), strict=True)]
        others.append(f"sft-ray search {shlex.join(words)}")
    prepared.say_next(screen, best["checkpoint"], *others)


def ended_line(ended_by: str | None, limits: Budget) -> dict[str, str]:
    """What ended a search before its trials were used up."""
    if ended_by == SPACE:
        return {"ended by": "its space, all of whose configurations have run"}
    name = (ended_by or "").removeprefix(BUDGET)
    limit = getattr(limits, name, None)
    return {} if limit is None else {"ended by": f"{ended_by}={limit:g}"}


def how_to_go_on(ended_by: str, words: str) -> str:
    """Why a search has ended, and what to change for it to go on."""
    if ended_by == SPACE:
        return f"{words}; a larger space needs another name=…"
    raised = f"{'change' if ended_by == TARGET else 'raise'} {ended_by}"
    return f"{words}; {raised}{', or set it to null' if ended_by.startswith(BUDGET) else ''}"


def grown_limits(result: SearchResult, experiment: Experiment) -> dict[str, str]:
    """What to give a search that has ended so that it goes on: key -> twice what was used up."""
    search, tree, rows = experiment.search, result.tree, result.trials
    ended_by = tree.get("ended_by")  # older runs do not say
    if ended_by == SPACE:
        return {}
    is_used_up = ended_by is None or len(rows) >= search.trials
    grown = {TRIALS: str((1 + is_used_up) * search.trials)}  # --extend is in no file
    if ended_by == TARGET:
        grown[TARGET] = "null"
    elif ended_by is not None and ended_by.startswith(BUDGET):
        name = ended_by.removeprefix(BUDGET)
        used = {
            "wall_minutes": tree["wall_seconds"] / 60,
            "worker_hours": sum(map(slot_seconds_of, rows))
            * experiment.resources.workers_per_trial
            / 3600,
            "patience": tree["environment"].get("slots", 1),  # trials that end behind it
        }
        limit = 2 * max(getattr(search.budget, name), used[name])
        grown[ended_by] = str(limit) if name == "patience" else f"{limit:.3g}"
    return grown


def say_unconfirmed(store: RunStore, screen: Screen) -> None:
    """A run that has changed is not the one that was confirmed."""
    screen.say(
        f"the confirmation of the outcome before goes; `sft-ray confirm "
        f"{shlex.quote(store.location)}` makes a new one, and trains again only what it has not"
    )


def importance_lines(importance: dict[str, Any]) -> dict[str, str]:
    """Shares of the score's variance in words, with how far they can be trusted."""
    lines = {}
    for label, key in (("importance", "finished"), ("at first rung", "first_rung")):
        judged = importance.get(key, {"parameters": {}, "trials": 0})
        doubt, shares = _doubt(judged["trials"]), []
        for name, found in judged["parameters"].items():
            shares.append(f"{name.removeprefix('train.')} {found['importance']:.2f}")
            if found["trials"] < judged["trials"]:
                few = "" if doubt else _doubt(found["trials"])  # which is said once of all
                shares[-1] += f" (among {found['trials']}{few})"
        if shares:
            lines[label] = f"{', '.join(shares)} ({count(judged['trials'], 'trial')}{doubt})"
    return lines


def _doubt(trials: int) -> str:
    return "" if is_reliable(trials) else f", unreliable under {RELIABLE_FROM}"


def say_pareto(screen: Screen, result: SearchResult) -> None:
    """What every saving costs: the trials that no other beats in every objective."""
    if not result.tree.get("pareto"):
        return
    screen.say()
    screen.say(f"nothing is better in every objective than these, in {result.location}:")
    for row in result.tree["pareto"]:
        costs = "  ".join(f"{cost} {row[cost]:.4g}" for cost in result.tree["costs"])
        score = f"{result.tree['metric']} {row['score']:.4f}"
        screen.say(f"  {score}  {costs}  {row['path']}/best")


def say_confirmation(
    screen: Screen,
    tree: dict[str, Any],
    result: SearchResult,
    prepared: Prepared,
    scored: str | None,
) -> None:
    """Every configuration over the fresh seeds, the two gaps, and what is in best/ now.

    Args:
        scored: how often the test split was scored in the run, in words.
    """
    metric, test = tree["metric"], tree["test"] or {}
    screen.say()
    screen.say(f"over fresh seeds, {metric} (mean and 95 % interval):")
    for row in tree["configurations"]:
        screen.say(f"  {row['arm']:<15} {confirmed_line(row)}")
        screen.say(f"  {'':<15} {short_params(row['params'])}")
    winner, lines = tree["configurations"][0], {}
    lines["winner"] = f"{winner['arm']}, the model of seed {tree['seeds'][0]}"
    lines["validation"] = ", ".join(f"{k} {v:.4f}" for k, v in result.best["validation"].items())
    expected = winner["expected"]
    lines["expected"] = f"{metric} {expected['mean']:.4f}{interval(expected)}"
    if winner["flattered"] is not None:
        lines["search to mean"] = (
            f"the search scored it {winner['search_value']:.4f}: "
            f"{abs(winner['flattered']):.4f} too {'good' if winner['flattered'] >= 0 else 'bad'}"
        )
    for arm, found in test.items():
        lines[f"test, {arm}"] = (
            ", ".join(f"{k} {v:.4f}" for k, v in found["metrics"].items())
            + f" ({found['num_examples']} examples, {scored or 'scored once'})"
        )
    if winner["arm"] in test:
        gap = test[winner["arm"]]["metrics"][metric] - expected["mean"]
        lines["mean to test"] = f"{gap:+.4f} {metric}"
    else:
        lines["test"] = "the experiment has no labelled test split"
    lines["checkpoint"] = result.best["checkpoint"]
    screen.say()
    screen.facts(lines)
    screen.say()
    prepared.say_next(
        screen, result.best["checkpoint"], f"sft-ray verify {shlex.quote(result.location)}"
    )


def confirmed_line(row: dict[str, Any]) -> str:
    """Mean, interval and difference to the default recipe, in one line."""
    expected, over = row["expected"], row["over_default"]
    if expected is None:
        return "finished on no seed"
    parts = [f"{expected['mean']:.4f}{interval(expected)}, {count(expected['n'], 'seed')}"]
    if over is not None:
        parts.append(f"{over['difference']:+.4f}{interval(over)} over the default recipe")
    if row["behind"]:
        parts.append("clearly behind")
    return "; ".join(parts)


def interval(found: dict[str, Any]) -> str:
    """` (low to high)`, or nothing for a single run."""
    return "" if found["low"] is None else f" ({found['low']:.4f} to {found['high']:.4f})"


def say_ablation(
    screen: Screen, name: str, metric: str, summaries: Sequence[ArmSummary], folder: str
) -> None:
    """Every arm with its difference to the base, and where the tables are."""
    screen.say()
    screen.say(f"{name}: {metric}, mean and 95 % interval; difference to the base")
    width = max(len(summary.arm.label) for summary in summaries)
    for summary in summaries:
        parts = ["finished on no seed"]
        if summary.score is not None:
            score = asdict(summary.score)
            parts = [f"{score['mean']:.4f}{interval(score)}, {count(summary.n, 'seed')}"]
        if summary.versus_base is not None:
            versus = asdict(summary.versus_base)
            parts.append(f"{versus['difference']:+.4f}{interval(versus)}")
            if summary.is_told_apart:
                parts.append("told apart")
        screen.say(f"  {summary.arm.label:<{width}}  {'; '.join(parts)}")
    screen.say(f"tables and figures: {folder}")
