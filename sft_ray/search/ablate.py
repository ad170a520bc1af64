"""`sft-ray ablate`: vary one thing around a base, over seeds that all arms share."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_ray.ablation_file import SHARE, Ablation, configuration
from sft_ray.analysis.ablation import BASE, Arm, ArmSummary, summarize, to_tree
from sft_ray.analysis.ablation_tables import to_csv, to_latex, to_markdown
from sft_ray.analysis.results import SearchResult, reading
from sft_ray.config import Experiment, Train
from sft_ray.environment import describe_environment
from sft_ray.errors import ConfigError
from sft_ray.run_store import RESULTS, RunStore, open_run, read_experiment
from sft_ray.screen import Screen, count
from sft_ray.search.fixed_runs import FixedRun, Row, run_fixed
from sft_ray.search.narration import say_ablation
from sft_ray.search.preflight import prepare_experiment
from sft_ray.training.preparation import Prepared, arm_problems, check_origin
from sft_ray.training.seeds import derived_seed

FOLDER = "ablations"  # below the run folder
RUNS = f"{FOLDER}/runs"  # of all ablations of a base, so that they share what they have in common


@dataclass(frozen=True)
class Base:
    """What an ablation departs from."""

    experiment: Experiment
    train: Train
    store: RunStore
    environment: dict[str, Any] | None = None  # of a run


@dataclass(frozen=True)
class Planned:
    """One ablation and its arms, the base first."""

    ablation: Ablation
    arms: list[Arm]
    runs: list[FixedRun]


def run_ablations(
    ablations: Sequence[Ablation], *, address: str | None = None, quiet: bool = False
) -> dict[str, list[ArmSummary]]:
    """Run what has not run before and write the tables and figures of every ablation.

    All arms of all ablations train on the same seeds, one seed after the other, so that what an
    interrupted ablation has is balanced.  More seeds or arms go on where fewer stopped.

    Returns:
        Folder of each ablation -> its summary.

    Raises:
        SftError: something the user can mend; nothing has been written then.
        TrialError: nothing can go on; what was finished is kept.
        KeyboardInterrupt: interrupted; the same call goes on where it stopped.
    """
    names = [(ablation.base, ablation.name) for ablation in ablations]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ConfigError(f"two ablations are called {twice[0][1]}; give each a name of its own")
    screen = Screen(quiet)
    bases = {ablation.base: find_base(ablation.base) for ablation in ablations}
    prepared = {place: prepare_experiment(base.experiment) for place, base in bases.items()}
    for place, base in bases.items():
        check_origin(prepared[place], base.environment, place)
    plans = [_plan(a, bases[a.base], prepared[a.base]) for a in ablations]
    summaries: dict[str, list[ArmSummary]] = {}
    for place, base in bases.items():
        mine = [plan for plan in plans if plan.ablation.base == place]
        summaries |= _run_base(base, prepared[place], mine, screen, address)
    return summaries


def find_base(place: str) -> Base:
    """A run's winner, or the `train` section of an experiment's file.

    Raises:
        ConfigError: neither is there, or the run has no winner yet.
    """
    if Path(place).is_file():
        experiment = Experiment.load(place)
        return Base(experiment, experiment.train, RunStore(experiment.storage, experiment.name))
    store = open_run(place)
    run = read_experiment(store)
    result = SearchResult.load(place)
    with reading(store.path_of(RESULTS)):
        train = Train.model_validate(result.best["train"])
    return Base(run, train, store, result.tree.get("environment"))


def _plan(ablation: Ablation, base: Base, prepared: Prepared) -> Planned:
    """The arms and their runs, checked against model and task."""
    changes = ablation.changes(base.train, prepared.model.num_layers)
    arms = [Arm(BASE), *_named(changes)]
    seeds = ablation_seeds(base.experiment.seed, ablation.seeds)
    settings = {arm.name: configuration(base.train, arm.changes) for arm in arms}
    problems = [
        f"{ablation.name}, {arm.label}: {problem}"
        for arm in arms
        for problem in arm_problems(prepared, settings[arm.name][0])
    ]
    if problems:
        raise ConfigError(*problems)
    runs = [
        FixedRun(
            arm.name,
            settings[arm.name][0],
            arm.changes,
            seed,
            settings[arm.name][1],
            setting=_setting(prepared),
        )
        for seed in seeds
        for arm in arms
    ]
    return Planned(ablation, arms, runs)


def _setting(prepared: Prepared) -> str:
    """What the numbers of all arms depend on: an experiment's file may change between calls."""
    experiment = prepared.experiment
    origin = [prepared.dataset.fingerprint, prepared.model.fingerprint]
    model = [experiment.model, experiment.revision]
    return json.dumps([*origin, *model, prepared.objective, experiment.search.rungs])


def ablation_seeds(seed: int, count: int) -> list[int]:
    """Seeds of their own: those of the confirmation have chosen the winner and flatter it."""
    return [derived_seed(seed, "ablation", i) for i in range(count)]


def _named(changes: Sequence[dict[str, Any]]) -> list[Arm]:
    """Arms called by their label, or by all their digits where labels are too short."""
    labels = [Arm("", change).label for change in changes]
    if len(set(labels)) < len(labels):
        labels = [json.dumps(change, sort_keys=True) for change in changes]
    return [Arm(label, change) for label, change in zip(labels, changes, strict=True)]


def _run_base(
    base: Base,
    prepared: Prepared,
    plans: Sequence[Planned],
    screen: Screen,
    address: str | None,
) -> dict[str, list[ArmSummary]]:
    """The runs of all ablations of one base, each configuration and seed once."""
    union = {run.key: run for plan in plans for run in plan.runs}
    order = list(dict.fromkeys(run.seed for plan in plans for run in plan.runs))
    runs = sorted(union.values(), key=lambda run: order.index(run.seed))
    screen.say(
        f"{count(len(plans), 'ablation')} around {base.store.location}: {len(runs)} runs, "
        f"{count(len(order), 'seed')}"
    )
    with base.store.locked():
        rows = run_fixed(prepared, runs, base.store, RUNS, screen, address=address)
        by_key = {row["key"]: row for row in rows}
        environment = describe_environment(prepared.facts())
        return {
            base.store.path_of(f"{FOLDER}/{plan.ablation.name}"): _write(
                plan, by_key, base, prepared, environment, screen
            )
            for plan in plans
        }


def _write(
    plan: Planned,
    by_key: dict[str, Row],
    base: Base,
    prepared: Prepared,
    environment: dict[str, Any],
    screen: Screen,
) -> list[ArmSummary]:
    """Tables as Markdown, CSV, LaTeX and JSON, and the figure as SVG and PNG."""
    from sft_ray.analysis.figures import draw_ablation, save_figure  # brings matplotlib

    name, metric, store = plan.ablation.name, prepared.objective, base.store
    rows = [{**by_key[run.key], "arm": run.arm} for run in plan.runs if run.key in by_key]
    summaries = summarize(plan.arms, rows, sign=prepared.task.sign(metric))
    folder, train = f"{FOLDER}/{name}", base.train.model_dump(mode="json")
    values = {SHARE: 1.0, **{f"train.{field}": value for field, value in train.items()}}
    tree = {
        "name": name,
        "base": train,
        "metric": metric,
        "seeds": list(dict.fromkeys(run.seed for run in plan.runs)),
        **to_tree(summaries),
        "environment": environment,
    }
    store.write_text(f"{folder}/table.md", to_markdown(summaries, metric))
    store.write_text(f"{folder}/table.csv", to_csv(summaries, metric))
    store.write_text(f"{folder}/table.tex", to_latex(summaries, metric))
    figure = draw_ablation(
        summaries, metric=metric, title=name, costs=plan.ablation.costs, base_values=values
    )
    with tempfile.TemporaryDirectory(prefix="sft_ray-") as local:
        for file in save_figure(figure, Path(local), "figure"):
            store.write_bytes(f"{folder}/{file.name}", file.read_bytes())
    store.write_json(f"{folder}/ablation.json", tree)
    say_ablation(screen, name, metric, summaries, store.path_of(folder))
    return summaries
