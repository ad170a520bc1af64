"""`sft-ray plan`: what a search will cost, before it is spent; what would be refused, and why.

Nothing is written into the run folder.  Only a look at a cluster asks for Ray, and for one of its
GPUs if it is to be found how many trials share one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext

import torch

from sft_ray.config import Experiment, Resources
from sft_ray.errors import ConfigError
from sft_ray.folder_rule import as_begun, check_folder_rule, check_made_by
from sft_ray.recipes import default_recipe
from sft_ray.run_store import JOURNAL, RunStore, kept_environment
from sft_ray.screen import Screen, count, duration
from sft_ray.search.cluster import capacity, capacity_here, connected, free_gpus
from sft_ray.search.draws import drawn_trials
from sft_ray.search.estimate import STARTUP_SECONDS, Plan, Range, estimate
from sft_ray.search.layout import Layout, plan_layout, with_room
from sft_ray.search.narration import budget, layout_in_words, search_rules, space_lines
from sft_ray.search.preflight import (
    check_default_recipe,
    check_searches,
    prepare_experiment,
    runs_default_recipe,
)
from sft_ray.search.sharing import (
    LATER,
    ask_the_cluster,
    ask_this_machine,
    is_asked,
    trains_of_search,
    without_probe,
)
from sft_ray.search.speed import Speed, measure
from sft_ray.search.warm_start import warm_configurations
from sft_ray.training.preparation import Prepared, check_origin, collect

PROBE_SECONDS = 20.0
SHARING_SECONDS = 300.0  # until a GPU of a cluster has answered


def run_plan(
    experiment: Experiment,
    *,
    address: str | None = None,
    price_per_hour: float | None = None,
    probe_seconds: float = PROBE_SECONDS,
    quiet: bool = False,
    source: str | None = None,
) -> Plan:
    """Say what a search of the experiment will do and take; starts neither it nor Ray.

    Args:
        experiment: what would be searched.
        address: of a Ray cluster to lay the slots out on; None takes a cluster that runs on this
            machine, else this machine.
        price_per_hour: dollars for one worker and hour.
        probe_seconds: about so long training and evaluation are measured.
        quiet: print nothing.
        source: the command's arguments, for the command that starts the search.

    Raises:
        SftError: what the search would refuse, every problem found.
    """
    screen = Screen(quiet)
    check_searches(experiment)
    screen.say("reading model and data …")
    has = capacity_here(address)
    store, problems = RunStore(experiment.storage, experiment.name), list[str]()
    prepared = prepare_experiment(as_begun(experiment, store), has)
    experiment = prepared.experiment
    if runs_default_recipe(experiment):
        collect(problems, check_default_recipe, prepared)
    collect(problems, store.check_writable)
    collect(problems, check_made_by, store, "search")
    relation = collect(problems, check_folder_rule, store, experiment)
    collect(problems, check_origin, prepared, kept_environment(store), store.location)
    layout = collect(problems, _layout, experiment, has, address)
    warm = []
    if not store.exists(JOURNAL):
        facts, objective = prepared.facts(), prepared.objective
        warm = collect(problems, warm_configurations, experiment, facts, objective)
    if problems:
        raise ConfigError(*problems)
    sharing = None
    if is_asked(experiment.resources):
        sharing, layout = _shared(screen, prepared, has, address)
    model = prepared.model
    drawn = drawn_trials(experiment, default_recipe(model.layer_parameters), model.num_layers, warm)
    screen.say(f"measuring training and evaluation, about {probe_seconds:g} s …")
    speed = measure(prepared, layout, [trial.train for trial in drawn], probe_seconds)
    plan = estimate(prepared, layout, speed, drawn, price_per_hour)
    begun = relation != "new"
    say_plan(screen, plan, prepared, store.location, begun=begun, sharing=sharing)
    if source is not None:
        screen.say()
        screen.say("start it:")
        screen.say(f"  sft-ray search {source}" + (f" --address {address}" if address else ""))
    return plan


def _layout(experiment: Experiment, has: Mapping[str, float] | None, address: str | None) -> Layout:
    """Slots on what this machine has, or on a cluster."""
    if has is not None:
        return plan_layout(experiment, has)
    with connected(address):
        return with_room(plan_layout(experiment, capacity()), experiment.resources)


def _shared(
    screen: Screen, prepared: Prepared, has: Mapping[str, float] | None, address: str | None
) -> tuple[str, Layout]:
    """How many trials share a GPU, in words, and the slots that come of it.

    Measures only on a GPU that is there and free; no cluster is to start a machine for a plan.
    """
    experiment, trains = prepared.experiment, trains_of_search(prepared)
    with nullcontext() if has is not None else connected(address):
        on_cluster = has is None
        has = capacity() if has is None else has
        sharing = without_probe(experiment, has)
        if sharing is None and (free_gpus() if on_cluster else torch.cuda.device_count()) >= 1:
            screen.say("measuring how busy one trial keeps a GPU …")
            sharing = (
                ask_the_cluster(prepared, trains, has, SHARING_SECONDS)
                if on_cluster
                else ask_this_machine(prepared, trains, has)
            )
        layout = plan_layout(experiment, has, 1 if sharing is None else sharing.trials_per_gpu)
        if on_cluster:
            layout = with_room(layout, experiment.resources)
    return LATER if sharing is None else sharing.reason, layout


def say_plan(
    screen: Screen,
    plan: Plan,
    prepared: Prepared,
    location: str,
    *,
    begun: bool = False,
    sharing: str | None = None,
) -> None:
    """The plan, and what is worth knowing about it; `sharing` says how trials share GPUs."""
    layout, speed, resources = plan.layout, plan.speed, prepared.experiment.resources
    gain = speed.gain_of_two
    confirm = f", then up to {plan.confirm_runs} runs to confirm the best"
    pruning = "; the more is pruned, the less" if len({*plan.wall_seconds}) > 1 else ""
    training = ", ".join(
        f"{_number(1 / seconds)} with {count(depth, 'layer') if depth else 'nothing'} frozen"
        for depth, seconds in speed.train_seconds.items()
    )
    facts = {
        "plan": f"{prepared.experiment.name} in {location}; nothing has been started",
        **prepared.described(),
        "layout": layout_in_words(layout),
        **({} if gain is None else {"slots": _why_slots(resources, layout, gain)}),
        **({} if sharing is None else {"sharing": sharing}),
        "search by": search_rules(prepared),
        "budget": budget(prepared),
        **space_lines(prepared.experiment),
        "trials": f"{plan.trials}{confirm if plan.confirm_runs else ''}",
        "a trial": f"{_between(plan.steps, _number)} optimizer steps and "
        f"{_between(plan.marks, _number)} evaluations, unless it is pruned",
        "speed": f"training {training}; evaluation {_number(1 / speed.eval_seconds)} (examples "
        f"per second of one worker by itself, measured on this machine's {speed.device})",
        "time": f"{_between(plan.wall_seconds, duration)}, of which about {STARTUP_SECONDS:g} s "
        f"are assumed for starting{pruning}",
        "work": f"{_between(plan.worker_hours, _number)} worker hours",
    }
    facts["frozen"] = _trunks(plan.speed)
    if plan.dollars is not None:
        facts["price"] = _between(plan.dollars, lambda dollars: f"${dollars:,.2f}")
    facts["disk"] = f"up to {plan.disk_bytes / 1e6:,.0f} MB"
    screen.say()
    screen.facts(facts)
    for note in _notes(plan, prepared, begun):
        screen.facts({"note": note})


def _why_slots(resources: Resources, layout: Layout, gain_of_two: float) -> str:
    """Many slots of few workers, or few of many: what was measured, and what it speaks for."""
    measured = f"a worker with twice the CPUs trains {gain_of_two:.1f} times as fast"
    if gain_of_two < 2:
        said = f"{measured}, two slots train 2 trials in that time: many slots finish more trials"
        if layout.slots > 1:
            return said
        settings = [] if resources.slots == "auto" else ["resources.slots=2"]
        if layout.workers_per_trial > 1:
            settings.append("resources.workers_per_trial=1")
        elif resources.cpus_per_worker != "auto" and layout.cpus_per_worker > 1:
            half = max(1.0, layout.cpus_per_worker // 2)
            settings.append(f"resources.cpus_per_worker={half:g}")
        return f"{said}; {' '.join(settings)}" if settings else said
    if layout.slots == 1:
        return f"{measured}: one slot finishes as many trials as two, each of them sooner"
    twice = 2 * layout.workers_per_trial
    return f"{measured}: resources.workers_per_trial={twice} may finish as many trials, sooner each"


def _trunks(speed: Speed) -> str:
    """Whether the output of frozen layers is kept, and what for."""
    if not speed.trunk_seconds:
        return "computed each time"
    depth = max(speed.trunk_seconds, key=lambda depth: (speed.trunk_seconds[depth] > 0, depth))
    if speed.trunk_seconds[depth] == 0:
        return "computed each time: to keep what frozen layers give does not pay, or has no room"
    share = speed.trunk_seconds[depth] / speed.train_seconds[depth]
    few = [k for k, seconds in speed.trunk_seconds.items() if k and not seconds]
    return (
        f"computed once for about {_number(speed.trunk_uses)} trials, then read from disk; "
        f"{100 * share:.0f}% of a training step with {count(depth, 'layer')} frozen"
        + (f"; computed each time with {count(max(few), 'layer')}" if few else "")
    )


def _notes(plan: Plan, prepared: Prepared, begun: bool) -> Iterator[str]:
    """What is worth knowing, a sentence each."""
    trials = prepared.experiment.search.trials
    if begun:
        yield "the run folder holds this search already; the numbers are for all of its trials"
    if plan.trials < trials:
        number = count(plan.trials, "configuration")
        yield f"there are only {number} to try; the search ends before its {trials} trials"
    if round(plan.trials_in_budget.low) < plan.trials:
        number = _between(plan.trials_in_budget, lambda some: f"{some:.0f}")
        yield f"the budget ends the search after about {number} of {plan.trials} trials"
    if plan.layout.gpus_per_worker and plan.speed.device == "CPU":
        yield "the speed is a CPU's, the trials will have GPUs: expect far less time"
    if 0 < plan.layout.gpus_per_worker < 1 and plan.speed.device == "GPU":
        yield "the speed is of one trial that has the GPU to itself: expect more time"


def _between(some: Range, text: Callable[[float], str]) -> str:
    low, high = text(some.low), text(some.high)
    return low if low == high else f"{low} to {high}"


def _number(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"
