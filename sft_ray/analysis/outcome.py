"""How a trial ended, as the study keeps it and results.json tells it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from optuna.trial import BaseTrial, FrozenTrial

from sft_ray.recipes import YARDSTICK

PARTS = ("train_seconds", "eval_seconds", "overhead_seconds")  # of a trial's time in its slot


@dataclass(frozen=True)
class Outcome:
    """The end of one trial.

    Attributes:
        reason: why a trial that is not COMPLETE ended.
        fault: the configuration itself was at fault (a violated constraint).
        score: best evaluation of the objective, and the percent of the schedule it was made at.
        metrics: of that evaluation.
        has_checkpoint: whether `trials/<n>/best` was written with the weights of `score`.
        dtype: number format of matrix products, at the end.
        trunks_read: which splits' outputs of frozen layers were read (`training.progress`).
        padding_share: of the positions that the first worker's layers computed in training.
        trained_parameters: how many numbers were trained.
        memory_bytes: most that the first worker's device held (see `training.backward`).
        overhead_seconds: of the slot, neither training nor evaluation.
        trunk_seconds: of these, making and opening the outputs of frozen layers, which other
            trials use, too.
    """

    reason: str | None = None
    fault: bool = False
    score: float | None = None
    score_percent: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    has_checkpoint: bool = False
    restarts: int = 0
    schedule_percent: int = 0
    epochs_run: float = 0.0
    examples_seen: int = 0
    # From here on FIGURES, which a trial's last message tells under the same names.
    dtype: str | None = None
    trunks_read: str | None = None
    micro_batch: int = 0
    padding_share: float = 0.0
    trained_parameters: int = 0
    memory_bytes: int = 0
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    overhead_seconds: float = 0.0
    trunk_seconds: float = 0.0

    @classmethod
    def from_message(
        cls,
        message: dict[str, Any],
        *,
        reason: str | None = None,
        fault: bool = False,
        restarts: int = 0,
        seconds: float = 0.0,
    ) -> Self:
        """From the last message of a trial; `seconds` is everything it took its slot."""
        told = {f.name: message[f.name] for f in fields(cls) if f.name in message}
        told |= {
            "reason": reason,
            "fault": fault,  # of which a message tells the words
            "metrics": message.get("best_metrics", {}),  # a message's own are those of its mark
            "restarts": message.get("restarts", 0) + restarts,
            "schedule_percent": message.get("percent", 0),
        }
        found = cls(**told)
        return replace(found, overhead_seconds=seconds - found.train_seconds - found.eval_seconds)

    @property
    def slot_seconds(self) -> float:
        return slot_seconds_of(vars(self))

    @property
    def examples_per_second(self) -> float | None:
        """Training throughput."""
        return self.examples_seen / self.train_seconds if self.train_seconds else None

    def to_attributes(self) -> dict[str, Any]:
        """Every field, so that nothing of an earlier attempt at the trial stays behind."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def of(cls, trial: FrozenTrial) -> Self:
        """What the study keeps of a trial that has ended."""
        known = {f.name for f in fields(cls)}
        return cls(**{name: v for name, v in trial.user_attrs.items() if name in known})


_FIELDS = [f.name for f in fields(Outcome)]
# What results.json and its table tell under the same names, in this order.
FIGURES = tuple(_FIELDS[_FIELDS.index("dtype") :])


def slot_seconds_of(row: Mapping[str, Any]) -> float:
    """What a trial of results.json took of its slot; a damaged or younger row says less."""
    return sum(row.get(part) or 0.0 for part in PARTS)


def role_of(trial: BaseTrial) -> str:
    """Where its configuration comes from."""
    return str(trial.user_attrs.get("role", "sampled"))


def is_yardstick(trial: BaseTrial) -> bool:
    """Whether it is the default recipe."""
    return role_of(trial) == YARDSTICK


def score_of(trial: FrozenTrial) -> float:
    """The first objective of a COMPLETE trial."""
    return float(trial.values[0])


def curve_of(trial: FrozenTrial) -> dict[int, float]:
    """Percent of the schedule -> score; with several objectives Optuna keeps none itself.

    A trial that started over, and ended before marks of old, was there no more.
    """
    curve = trial.intermediate_values or dict(trial.user_attrs.get("curve", []))
    last = trial.user_attrs.get("schedule_percent", 100)  # told at its end
    return {percent: score for percent, score in curve.items() if percent <= last}
