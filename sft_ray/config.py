"""One experiment as one tree: every key, its meaning, its unit and its default.

The order of precedence is defaults < YAML < command line.  Unknown keys are refused and all
problems are reported together.  The resolved tree is written into the run folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from sft_ray import space as spaces
from sft_ray.config_problems import NAME, delete_key, explain
from sft_ray.errors import ConfigError, did_you_mean
from sft_ray.location import Location
from sft_ray.yaml_text import read_tree

# Fields of a trial's outcome that a search can keep small beside its score.
COSTS = ("train_seconds", "trained_parameters", "memory_bytes")

Name = Annotated[str, Field(pattern=NAME, max_length=100)]  # of a run, or of what is in one
Fraction = Annotated[float, Field(ge=0, lt=1)]
# One column, or [start, end] columns of a span; null leaves an optional field out.
Column = Annotated[str, Field(min_length=1)] | list[str] | None


TrackingTool = Literal["tensorboard", "mlflow", "wandb"]


def as_list(value: Any) -> Any:
    """One word stands for a list of it."""
    return [value] if isinstance(value, str) else value


def label_name(label: Any) -> str:
    """Of a label that was read as true, false or a number; as YAML and JSON write it."""
    return str(label).lower() if isinstance(label, bool) else str(label)


class Section(BaseModel):
    """Base of every part of the tree: unknown keys, silent conversions, NaN and inf are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Limit(Section):
    """First n examples after a seeded shuffle; null takes all."""

    train: Annotated[int, Field(ge=1)] | None = None
    validation: Annotated[int, Field(ge=1)] | None = None


class Split(Section):
    """Fractions cut off one file or split that holds everything, by label or in whole groups."""

    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    test: Fraction = 0.0  # cut off first


class Splits(Section):
    """Names of the data set's splits, with `datasets`' own slicing (`train[5%:]`)."""

    train: str = "train"
    validation: str = "validation"
    test: str | None = None  # sealed: neither trained on nor scored while searching


class Data(Section):
    """Where examples come from: a data set (`path`) or files (`train`, `validation`, `test`)."""

    path: Location | None = None  # hub id, folder, or builtin:docstrings
    config: str | None = None  # of a hub data set, for example sst2 of nyu-mll/glue
    revision: str | None = None  # of a hub data set
    splits: Splits | None = None  # default: train, validation and test as far as they are there
    train: Location | None = None  # file: csv, tsv, json, jsonl or parquet
    validation: Location | None = None  # file beside `train`; left out, `split` cuts it off
    test: Location | None = None  # file beside `train`
    split: Split | None = None  # where there is no validation split
    columns: dict[str, Column] = {}  # field of the task -> column; default: the same name
    # In their order, where labels are whole numbers or the order of texts counts.
    label_names: list[str] | None = None
    negative_label: str | None = None  # relation-extraction: the label that says "no relation"
    max_length: Annotated[int, Field(ge=4, le=8192)] = 128  # tokens
    doc_stride: Annotated[int, Field(ge=0)] = 64  # question-answering: tokens windows share
    limit: Limit = Limit()  # fewer rows, drawn by the seed

    @field_validator("columns")
    @classmethod
    def _distinct(cls, columns: dict[str, Column]) -> dict[str, Column]:
        used: list[str] = []
        for field, column in columns.items():
            if isinstance(column, list) and len(column) != 2:
                raise ValueError(f"{field} takes one column or [start, end], got {column}")
            used += column if isinstance(column, list) else [column] if column else []
        if twice := [name for name in dict.fromkeys(used) if used.count(name) > 1]:
            fields = [
                f for f, c in columns.items() if twice[0] in (c if isinstance(c, list) else [c])
            ]
            raise ValueError(
                f"each field needs a column of its own, got {twice[0]!r} for {' and '.join(fields)}"
            )
        return columns

    @field_validator("label_names", mode="before")
    @classmethod
    def _of_truth(cls, names: Any) -> Any:
        """`[false, true]` names what csv, json and parquet call so."""
        if not isinstance(names, list):
            return names
        return [label_name(name) if isinstance(name, bool) else name for name in names]

    @field_validator("label_names")
    @classmethod
    def _named_once(cls, names: list[str] | None) -> list[str] | None:
        if names is not None and (len(names) < 2 or len(set(names)) < len(names)):
            raise ValueError(f"at least two different names are needed, got {names}")
        return names

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.train is None):
            got = "both" if self.path else "neither"
            raise ValueError(f"exactly one of `path` and `train` must be given, got {got}")
        if self.path is not None and (self.validation or self.test):
            raise ValueError("`validation` and `test` files go with `train`; use `splits` here")
        if self.train is not None and (self.splits or self.config):
            raise ValueError("`splits` and `config` go with `path`; remove them beside `train`")
        if self.validation is not None and self.split is not None:
            raise ValueError("a `validation` file and `split` exclude each other; keep one")
        if self.split is not None and self.split.validation + self.split.test >= 1:
            raise ValueError(f"split leaves nothing to train on, got {self.split!r}")
        return self


class Regularization(Section):
    """A penalty on the trained weights that are neither bias nor normalisation.

    `weight_decay` is decoupled (Loshchilov and Hutter 2019); `l1`, `l2` and `l2_sp` (Li et al.
    2018) are lambda R(theta), added to the loss.
    """

    kind: Literal["none", "weight_decay", "l1", "l2", "l2_sp"] = "none"
    strength: Annotated[float, Field(ge=0, le=1e3)] | None = None  # lambda; none takes none

    @model_validator(mode="after")
    def _strength_where_needed(self) -> Self:
        if self.strength is not None and "kind" not in self.model_fields_set:
            raise ValueError(
                f"a strength needs its kind, got strength {self.strength} alone; say also kind: "
                "weight_decay (or l1, l2, l2_sp)"
            )
        if self.kind == "none" and self.strength is not None:
            raise ValueError(f"kind none takes no strength, got {self.strength}; remove it")
        if self.kind != "none" and self.strength is None:
            raise ValueError(f"kind {self.kind} needs a strength, for example 0.01")
        return self


class Train(Section):
    """One configuration of fine-tuning; every field can be searched."""

    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    momentum: Fraction = 0.9  # of sgd
    # Of the learning rate, behind the warm-up.
    schedule: Literal["linear", "cosine", "constant", "constant_with_cooldown"] = "linear"
    warmup: Fraction = 0.06  # fraction of all optimiser steps
    cooldown: Fraction = 0.2  # fraction of all steps, of constant_with_cooldown
    # Of matrix products; auto: bf16 where the hardware multiplies it natively, else fp32.
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-5  # its peak
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0  # learning rate, per layer downwards
    head_learning_rate_multiplier: Annotated[float, Field(gt=0, le=1000)] = 1.0  # of the new head
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 32  # global: over all workers
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"  # most per worker and pass
    epochs: Annotated[int, Field(ge=1, le=1000)] = 3  # passes over the training rows
    compile: bool | Literal["auto"] = "auto"  # layers that pack; auto: off, not measured yet
    cuda_graphs: bool = False  # of the same families, one worker per trial; not measured yet
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0  # longer gradients are scaled down to it
    regularization: Regularization = Regularization(kind="weight_decay", strength=0.01)
    # From the bottom, with the embeddings; all leaves the pooler and the head.
    frozen_layers: Annotated[int, Field(ge=0)] | Literal["all"] = 0
    dropout: Fraction | None = None  # every dropout of the model; null keeps the model's own
    reinit_layers: Annotated[int, Field(ge=0)] = 0  # top layers, and the pooler, begun anew
    label_smoothing: Fraction = 0.0  # Szegedy et al. 2016
    # Of the loss, by label; balanced: 1 / a label's share of the training rows, 1 on average.
    class_weights: dict[str, float] | Literal["balanced"] | None = None

    def frozen_depth(self, num_layers: int) -> int:
        """`frozen_layers` as a number, of a model of so many layers."""
        return num_layers if self.frozen_layers == "all" else self.frozen_layers

    @field_validator("class_weights", mode="before")
    @classmethod
    def _by_name(cls, weights: Any) -> Any:
        """YAML reads labels that are numbers as numbers."""
        if not isinstance(weights, dict):
            return weights
        return {label_name(label): weight for label, weight in weights.items()}

    @field_validator("class_weights")
    @classmethod
    def _not_negative(
        cls, weights: dict[str, float] | Literal["balanced"] | None
    ) -> dict[str, float] | Literal["balanced"] | None:
        for name, weight in weights.items() if isinstance(weights, dict) else ():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"weights must be 0 or more, got {weight} for {name!r}")
        return weights

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        if self.schedule == "constant_with_cooldown" and self.warmup + self.cooldown > 1:
            raise ValueError(
                "warmup and cooldown together must not exceed 1, got "
                f"{self.warmup} + {self.cooldown}"
            )
        return self


class Budget(Section):
    """Ends a search before its trials are used up; the first limit that is reached counts."""

    wall_minutes: Annotated[float, Field(gt=0)] | None = None  # of all sessions
    worker_hours: Annotated[float, Field(gt=0)] | None = None  # slot time times workers per trial
    target: float | None = None  # a value of the objective that is good enough
    patience: Annotated[int, Field(ge=1)] | None = None  # trials without a better one


class Search(Section):
    """What is searched, by what, and how long."""

    objective: str | list[str] | None = None  # a list: a score, then costs to keep small
    space: dict[str, Any] | None = None  # path -> domain; default: by model family
    trials: Annotated[int, Field(ge=1, le=100_000)] = 32  # most, the default recipe among them
    sampler: Literal["tpe", "gp", "random", "qmc", "grid", "nsga2"] = "tpe"  # who proposes
    # Who ends trials early.
    pruner: Literal["successive_halving", "median", "hyperband", "patient", "none"] = (
        "successive_halving"
    )
    rungs: list[Annotated[int, Field(ge=1, le=99)]] = [33]  # percent of a trial's schedule
    reduction_factor: Annotated[int, Field(ge=2, le=100)] = 2  # of n trials 1/n go on at a rung
    default_recipe: bool = True  # runs first, to its end
    enqueue: list[dict[str, Any]] = []  # configurations that run next: path -> value
    warm_start: list[Location] = []  # run folders whose best configurations run early
    budget: Budget = Budget()  # ends the search before its trials are used up

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_nsga2(cls, tree: Any) -> Any:
        """It is that of several objectives, and breeds finished trials only, so none is pruned."""
        if isinstance(tree, dict) and isinstance(tree.get("objective"), list):
            tree = {"sampler": "nsga2", "pruner": "none", **tree}
        if isinstance(tree, dict) and tree.get("sampler") == "nsga2":
            tree = {"pruner": "none", **tree}
        return tree

    @field_validator("objective")
    @classmethod
    def _score_and_costs(cls, objective: str | list[str] | None) -> str | list[str] | None:
        if not isinstance(objective, list):
            return objective
        if len(objective) < 2 or len(set(objective)) < len(objective):
            raise ValueError(f"a list needs a score and different costs, got {objective}")
        if unknown := [cost for cost in objective[1:] if cost not in COSTS]:
            raise ValueError(
                f"beside the score come {', '.join(COSTS)}, got {unknown[0]!r}; "
                f"{did_you_mean(unknown[0], COSTS)}"
            )
        return objective

    @model_validator(mode="after")
    def _unpruned(self) -> Self:
        if isinstance(self.objective, list) and self.pruner != "none":
            raise ValueError(
                f"several objectives cannot be pruned, got pruner {self.pruner}; write "
                "`pruner: none` or leave it out"
            )
        return self

    @property
    def costs(self) -> list[str]:
        """The objectives beside the score."""
        return self.objective[1:] if isinstance(self.objective, list) else []

    @property
    def score(self) -> str | None:
        """The metric that decides which weights are best; None for the task's first."""
        return self.objective[0] if isinstance(self.objective, list) else self.objective

    @field_validator("rungs")
    @classmethod
    def _ascending(cls, rungs: list[int]) -> list[int]:
        if sorted(set(rungs)) != rungs:
            raise ValueError(f"rungs must ascend and not repeat, got {rungs}")
        return rungs

    @field_validator("space")
    @classmethod
    def _parses(cls, raw: dict[str, Any] | None) -> dict[str, Any] | None:
        if raw is not None:
            problems = _space_problems(raw)
            if problems:
                raise ValueError("\n".join(problems))
        return raw

    @property
    def domains(self) -> spaces.Space:
        """The parsed space; empty until a default has been filled in."""
        return spaces.parse_space(self.space or {})

    @property
    def others_per_depth(self) -> float:
        """How many trials, beside one, freeze a given number of layers, on average."""
        return (self.trials - 1) / len(self._depths())

    @property
    def trunk_depths(self) -> list[int | Literal["all"]]:
        """Frozen layers that trials ask for, beside 0; empty if they are not searched."""
        return [depth for depth in self._depths() if depth]

    def _depths(self) -> Sequence[Any]:
        domain = spaces.domains(self.domains).get("train.frozen_layers")
        if domain is None:
            return [None]  # the one of `train`
        if isinstance(domain, spaces.Choice):
            return domain.options
        return range(int(domain.low), int(domain.high) + 1)


class Confirm(Section):
    """Runs of a search's best configurations on fresh seeds, which count in its budget."""

    top: Annotated[int, Field(ge=1, le=100)] = 3  # configurations, beside the default recipe
    seeds: Annotated[int, Field(ge=2, le=100)] = 5  # fresh ones, the same for all


class Checkpoint(Section):
    """Which checkpoints stay on disk."""

    every_minutes: Annotated[float, Field(gt=0)] = 10  # between two states to go on from
    keep: Annotated[int, Field(ge=1)] = 5  # best model folders under trials/


class Watchdog(Section):
    """How long what may take before its slot is killed and the trial goes on elsewhere."""

    silence_seconds: Annotated[float, Field(gt=2)] = 120  # of a process that does not answer
    stall_minutes: Annotated[float, Field(gt=0)] = 15  # of one step, one batch, one writing
    loading_minutes: Annotated[float, Field(gt=0)] = 60  # of model and data
    placement_minutes: Annotated[float, Field(gt=0)] = 60  # until the cluster has room for a trial


class Resources(Section):
    """What one trial uses and how many run at once; `auto` follows the cluster."""

    workers_per_trial: Annotated[int, Field(ge=1)] = 1  # which share every batch
    # And as many threads; auto: all cores in equal parts, and 1 beside a GPU.
    cpus_per_worker: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    # auto: 1, or a share of one, where the cluster has GPUs or can start some, else 0.
    gpus_per_worker: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    slots: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"  # auto: what fits
    trials_per_gpu: Annotated[int, Field(ge=1)] | Literal["auto"] = 1  # auto measures one trial
    # Of disk on every machine, for the outputs of frozen layers; 0 computes them each time.
    trunk_cache_gb: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"

    @property
    def trunk_cache_bytes(self) -> int | None:
        """Of the outputs of frozen layers; None for a part of the free disk."""
        return None if self.trunk_cache_gb == "auto" else int(self.trunk_cache_gb * 1e9)

    @model_validator(mode="after")
    def _ranks_never_share_a_gpu(self) -> Self:
        shared = self.trials_per_gpu
        if shared != "auto" and shared > 1 and self.workers_per_trial > 1:
            raise ValueError(
                "trials_per_gpu above 1 needs workers_per_trial 1 (two ranks of a trial never "
                f"share a GPU), got workers_per_trial {self.workers_per_trial}"
            )
        gpus = self.gpus_per_worker
        if gpus == "auto" or gpus == int(gpus):
            return self
        if gpus > 1:
            raise ValueError(f"gpus_per_worker above 1 must be a whole number, got {gpus:g}")
        if self.workers_per_trial > 1:
            raise ValueError(
                "gpus_per_worker below 1 needs workers_per_trial 1 (two ranks of a trial never "
                f"share a GPU), got {gpus:g} and workers_per_trial {self.workers_per_trial}"
            )
        return self

    @property
    def fewest_cpus(self) -> float:
        """CPUs that a worker has at least; slots are counted by it."""
        return 1.0 if self.cpus_per_worker == "auto" else self.cpus_per_worker


class Experiment(Section):
    """The whole experiment; the contract of the YAML."""

    name: Name  # of the run folder
    model: Location  # hub id, local folder, or package:NAME/FOLDER
    revision: str | None = None  # of a hub model; a run keeps the commit it finds
    task: str = "text-classification"  # one of training/tasks.py
    data: Data  # what is learned from
    train: Train = Train()  # what trials have in common
    search: Search = Search()  # what is searched, and how
    confirm: Confirm | None = None  # null: `sft-ray confirm` does it when it is asked
    watchdog: Watchdog = Watchdog()  # what counts as hanging
    checkpoint: Checkpoint = Checkpoint()  # what stays on disk
    resources: Resources = Resources()  # of one trial, and how many run at once
    # Tools that are told of every trial.
    tracking: Annotated[list[TrackingTool], BeforeValidator(as_list)] = []
    # Folder or URI of the run folders.
    storage: Annotated[Location, Field(validate_default=True)] = "${SFT_RAY_STORAGE:-runs}"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 17  # all random numbers follow from it

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | None = None) -> Self:
        """Read a YAML file and apply `dotted.path=value` overrides.

        Raises:
            ConfigError: every problem found, one line each, led by the file's name.
        """
        return cls.from_tree(read_tree(path, overrides or []), source=str(path))

    @classmethod
    def from_tree(cls, tree: dict[str, Any], source: str = "experiment") -> Self:
        """Validate a plain tree.

        Raises:
            ConfigError: every problem found, one line each, led by `source`.
        """
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise ConfigError(*(f"{source}: {p}" for p in explain(error, cls))) from None

    @classmethod
    def what_is_valid(cls, tree: dict[str, Any]) -> tuple[Self | None, list[str]]:
        """The tree without its invalid keys, for finding further problems, and these keys.

        None if what is left says too little; so it does of the data without a task.
        """
        deleted: list[str] = []
        for _ in range(2):
            try:
                return cls.model_validate(tree), deleted
            except ValidationError as error:
                deleted += [delete_key(tree, problem["loc"]) for problem in error.errors()]
            if "task" in deleted:
                break
        return None, deleted

    def to_tree(self) -> dict[str, Any]:
        """Plain values, ready for YAML or JSON."""
        return self.model_dump(mode="json")

    def anchored(self) -> Self:
        """The same experiment with absolute local paths, for processes that work elsewhere."""
        data = self.data.model_copy(
            update={
                name: _absolute(getattr(self.data, name))
                for name in ("path", "train", "validation", "test")
            }
        )
        places = {"model": _absolute(self.model), "data": data}
        if "://" not in self.storage:
            places["storage"] = str(Path(self.storage).absolute())
        return self.model_copy(update=places)

    def with_space(self, raw: dict[str, Any]) -> Self:
        """The same experiment with its search space written out."""
        return self.model_copy(update={"search": self.search.model_copy(update={"space": raw})})


def _absolute(place: str | None) -> str | None:
    """A path that exists here as an absolute one; hub ids and URIs pass through."""
    return str(Path(place).absolute()) if place and Path(place).exists() else place


def apply_values(train: Train, values: dict[str, Any]) -> Train:
    """`train` with `train.<field>` paths replaced; values are validated."""
    fields = {path.removeprefix("train."): value for path, value in values.items()}
    return Train.model_validate({**train.model_dump(), **fields})


def _space_problems(raw: dict[str, Any]) -> list[str]:
    """Every path must be a field of `train` that accepts each end of its domain."""
    problems: list[str] = []
    known = [f"train.{name}" for name in Train.model_fields]
    for path in raw:
        if path not in known:
            hint = did_you_mean(path, known)
            problems.append(f"search.space.{path}: only fields of train can be searched; {hint}")
    try:
        space = spaces.parse_space({path: raw[path] for path in raw if path in known})
    except ConfigError as error:
        return problems + list(error.problems)
    told: set[str] = set()
    for path, value in spaces.boundary_values(space):
        if path in told:
            continue
        try:
            apply_values(Train(), {path: value})
        except ValidationError as error:
            tail = explain(error, Train)[0].split(": ", 1)[-1]
            problems.append(f"search.space.{path}: {tail}")
            told.add(path)
    return problems
