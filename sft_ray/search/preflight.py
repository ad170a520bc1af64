"""What can be wrong is found before anything heavy starts, and all of it is said at once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace

from pydantic import ValidationError

from sft_ray import space as spaces
from sft_ray.config import Experiment, Resources, Search, Train, apply_values
from sft_ray.config_problems import explain
from sft_ray.errors import ConfigError, did_you_mean
from sft_ray.recipes import default_recipe, recipe_of
from sft_ray.search.finite_space import num_points
from sft_ray.search.layout import plan_layout
from sft_ray.search.samplers import grid_points
from sft_ray.training.model_facts import ModelFacts, inspect_model
from sft_ray.training.preparation import Prepared, collect, prepare_with_model
from sft_ray.training.progress import schedule_marks

EVALUATIONS_OF_PATIENCE = 3
MOST_OF_A_GRID = 100_000  # as many as a search may have trials
# Fields of train that are valid or not together, beside the depths.
SCHEDULE_PATHS = ("train.schedule", "train.warmup", "train.cooldown")


def prepare_experiment(experiment: Experiment, has: Mapping[str, float] | None = None) -> Prepared:
    """Check model, data, space and layout, encode the data, fill in the default space.

    Args:
        experiment: as it was read.
        has: what the cluster has, if that is known already.

    Raises:
        SftError: every problem found, one line each.
    """
    return with_default_space(check_experiment(experiment, has))


def check_experiment(experiment: Experiment, has: Mapping[str, float] | None = None) -> Prepared:
    """`prepare_experiment` without what needs the model's code, which takes seconds to import."""
    problems: list[str] = []
    model = collect(problems, inspect_model, experiment.model, experiment.revision)
    if experiment.search.space is not None:
        problems += _space_problems(experiment, model)
    problems += _schedule_problems(experiment)
    problems += _sharing_problems(experiment.resources)
    if has is not None:
        collect(problems, plan_layout, experiment, has)
    return prepare_with_model(experiment, model, problems)


def with_default_space(checked: Prepared) -> Prepared:
    """The default space of the model's family and size, where the experiment names none.

    What its `train` section names is as it says, and left out of that space.

    Raises:
        ConfigError: the configuration describes no model, or what it says beside the space does
            not go with the default.
    """
    experiment, model = checked.experiment, checked.model
    size = model.layer_parameters  # whatever the space: raises if there can be no such model
    if experiment.search.space is not None:
        return checked
    recipe = recipe_of(model.model_type, size)
    written = {f"train.{name}" for name in experiment.train.model_fields_set}
    default = spaces.default_space(model.num_layers, recipe)
    experiment = experiment.with_space({p: d for p, d in default.items() if p not in written})
    if problems := _space_problems(experiment, model):
        raise ConfigError(*problems)
    return replace(checked, experiment=experiment)


def check_searches(experiment: Experiment) -> None:
    """Whether anything is left to search, as nothing is in the file of a single training.

    Raises:
        ConfigError: `train` names all of the default space.
    """
    written, searched = experiment.train.model_fields_set, spaces.searched_by_default()
    if experiment.search.space is None and written >= searched:
        raise ConfigError(
            "search.space: `train` names all that is searched by default; write a space, or leave "
            "out of `train` what is to be searched"
        )


def runs_default_recipe(experiment: Experiment) -> bool:
    """Whether a search, or the confirmation behind it, trains the default recipe."""
    return experiment.search.default_recipe or experiment.confirm is not None


def check_default_recipe(prepared: Prepared) -> None:
    """Whether the default recipe of the model's size goes with what `train` says beside it.

    Raises:
        ConfigError: it does not.
    """
    recipe = default_recipe(prepared.model.layer_parameters)
    try:
        apply_values(prepared.experiment.train, recipe)
    except ValidationError as error:  # no other rule of `train` is about two fields
        most = round(1 - recipe["train.warmup"], 4)
        raise ConfigError(
            "train: does not go with the default recipe, which runs too: "
            f"{explain(error, Train)[0]}; lower train.cooldown to {most:g}"
        ) from None


def _space_problems(experiment: Experiment, model: ModelFacts | None) -> list[str]:
    problems = [] if model is None else _depth_problems(experiment, model)
    problems += _enqueue_problems(experiment)
    problems += _patience_problems(experiment)
    problems += _grid_problems(experiment.search)
    return problems


def _grid_problems(search: Search) -> list[str]:
    """A grid needs finitely many points, and is listed whole."""
    problems, points = list[str](), num_points(search.domains)
    if search.sampler != "grid":
        return problems
    if MOST_OF_A_GRID < points < math.inf:
        return [
            f"search.space: a grid has at most {MOST_OF_A_GRID:,} configurations, got "
            f"{points:,.0f}; write fewer values (`choice: […]`), or take another sampler"
        ]
    collect(problems, grid_points, search.domains)
    return problems


def _sharing_problems(resources: Resources) -> list[str]:
    """A written share of a GPU leaves nothing for `trials_per_gpu` to say."""
    shared, gpus = resources.trials_per_gpu, resources.gpus_per_worker
    if shared == 1 or gpus == "auto":
        return []
    return [
        f"resources.trials_per_gpu: {shared} goes with gpus_per_worker auto, got {gpus:g}; write "
        "one of the two"
    ]


def _patience_problems(experiment: Experiment) -> list[str]:
    """Optuna's PatientPruner says nothing before a trial's third evaluation."""
    search = experiment.search
    if search.pruner != "patient":
        return []
    ends = spaces.boundary_values(search.domains)
    searched = [int(value) for path, value in ends if path == "train.epochs"]
    epochs = max(searched, default=experiment.train.epochs)
    marks = schedule_marks(search.rungs, epochs, steps_per_epoch=1000)
    most = sum(mark.percent <= max(search.rungs, default=0) for mark in marks)
    if most >= EVALUATIONS_OF_PATIENCE:
        return []
    return [
        f"search.pruner: patient needs {EVALUATIONS_OF_PATIENCE} evaluations up to a rung, but got "
        f"{most} with search.rungs={search.rungs} and {epochs} epochs; write more rungs, such as "
        "search.rungs=[10, 20, 33]"
    ]


def _depth_problems(experiment: Experiment, model: ModelFacts) -> list[str]:
    """Every depth that can be drawn must exist, beside every number of re-initialised layers."""
    paths = ("train.frozen_layers", "train.reinit_layers")
    train = experiment.train
    fixed = (train.frozen_depth(model.num_layers), train.reinit_layers)
    most = dict(zip(paths, fixed, strict=True))
    problems = []
    searched = [
        (path, model.num_layers if value == "all" else value)
        for path, value in spaces.boundary_values(experiment.search.domains)
        if path in paths
    ]
    for path in paths:
        drawn = [value for name, value in searched if name == path]
        if drawn:
            most[path] = max(drawn)
            if most[path] > model.num_layers:
                problems.append(
                    f"search.space.{path}: {experiment.model} has {model.num_layers} layers, got "
                    f"{most[path]}; take 0 to {model.num_layers}"
                )
    if searched and not problems:
        frozen, fresh = most.values()
        if frozen + fresh > model.num_layers:
            problems.append(
                f"search.space: at most {model.num_layers} layers can be frozen or begin anew, got "
                f"up to {frozen} frozen and {fresh} re-initialised"
            )
    return problems


def _schedule_problems(experiment: Experiment) -> list[str]:
    """Every corner of what is searched of the schedule must be a valid configuration."""
    ends = [
        [value for name, value in spaces.boundary_values(experiment.search.domains) if name == path]
        or [getattr(experiment.train, path.removeprefix("train."))]
        for path in SCHEDULE_PATHS
    ]
    for corner in itertools.product(*ends):
        try:
            apply_values(experiment.train, dict(zip(SCHEDULE_PATHS, corner, strict=True)))
        except ValidationError as error:
            problem = explain(error, Train)[0]
            return [f"search.space: not all combinations work: {problem}; narrow their ranges"]
    return []


def _enqueue_problems(experiment: Experiment) -> list[str]:
    """Every enqueued value must be one the space could draw, or has anyway."""
    problems, space = list[str](), experiment.search.domains
    known, constants = spaces.domains(space), spaces.constants(space)
    conditions = spaces.conditions(space)
    for i, values in enumerate(experiment.search.enqueue):
        lacking = [p for p, v in values.items() if isinstance(v, dict) and "kind" not in v]
        if lacking:
            problems.append(f"search.enqueue.{i}.{lacking[0]}: needs a `kind`, got {values}")
            continue
        params = spaces.parameters(values)
        for name, value in params.items():
            where = f"search.enqueue.{i}.{name}"
            choice, kind = conditions.get(name, ("", None))
            if params.get(choice) != kind:
                problems.append(
                    f"{where}: counts where {choice} is {kind}, got {params.get(choice)}; write it "
                    f"too: {{{choice}: {kind}, {name}: {value}}}"
                )
                continue
            if name in constants:
                if value != constants[name]:
                    problems.append(f"{where}: the space has {constants[name]!r}, got {value!r}")
            elif name not in known:
                problems.append(f"{where}: not in the search space; {did_you_mean(name, known)}")
            elif value not in known[name]:
                problems.append(
                    f"{where}: outside the search space, which is "
                    f"{spaces.describe(known[name])}, got {value!r}"
                )
    return problems
