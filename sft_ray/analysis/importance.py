"""Which hyperparameters mattered: shares of the score's variance (fANOVA, Hutter et al. 2014)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from sft_ray.analysis.outcome import curve_of, is_yardstick, score_of

RELIABLE_FROM = 30  # trials; the field's rule of thumb for a forest over a handful of dimensions
FEWEST = 4


def is_reliable(trials: int) -> bool:
    """Whether a figure of so many trials can be trusted; not every results.json says it of each."""
    return trials >= RELIABLE_FROM


def importances(trials: Sequence[FrozenTrial], rungs: Sequence[int]) -> dict[str, Any]:
    """Of the finished trials, and at the first rung of all that reached it.

    Trials that were stopped early have no final score, so the first figure rests on few; the
    second knows how fast all of them set out.  A parameter that only one kind of trial has, such as
    the strength of a penalty, is judged among the trials of that kind.

    Returns:
        `finished` and `first_rung`, each with `trials`, `reliable`, and `parameters`: name ->
        {"importance": share of the variance, "trials": those it was judged among, "reliable"}, the
        reliable ones first.
    """

    def final(trial: FrozenTrial) -> float | None:
        return score_of(trial) if trial.state == TrialState.COMPLETE else None

    def at_first_rung(trial: FrozenTrial) -> float | None:
        return curve_of(trial).get(rungs[0]) if rungs else None

    return {"finished": _judge(trials, final), "first_rung": _judge(trials, at_first_rung)}


def _judge(
    trials: Sequence[FrozenTrial], score: Callable[[FrozenTrial], float | None]
) -> dict[str, Any]:
    scored = [(t, value) for t in trials if (value := score(t)) is not None]
    # A default recipe outside the space lacks what all others have, which would not be judged.
    others = [set(trial.params) for trial, _ in scored if not is_yardstick(trial)]
    always = set.intersection(*others) if others else set()
    scored = [(t, v) for t, v in scored if not is_yardstick(t) or always <= set(t.params)]
    found = {name: _judged(share, len(scored)) for name, share in _shares(scored).items()}
    names = {name for trial, _ in scored for name in trial.params}
    for name in sorted(n for n in names if any(n not in trial.params for trial, _ in scored)):
        having = [(t, value) for t, value in scored if name in t.params]
        share = _shares(having).get(name)
        if share is not None:
            found[name] = _judged(share, len(having))
    ordered = sorted(found.items(), key=lambda kv: (not kv[1]["reliable"], -kv[1]["importance"]))
    return {
        "trials": len(scored),
        "reliable": is_reliable(len(scored)),
        "parameters": dict(ordered),
    }


def _judged(share: float, among: int) -> dict[str, Any]:
    return {"importance": share, "trials": among, "reliable": is_reliable(among)}


def _shares(scored: Sequence[tuple[FrozenTrial, float]]) -> dict[str, float]:
    """Of the parameters that all of these trials have; empty where there is nothing to compare."""
    if len(scored) < FEWEST or len({value for _, value in scored}) == 1:
        return {}
    shared = set.intersection(*(set(trial.params) for trial, _ in scored))
    varied = {name for name in shared if len({t.params[name] for t, _ in scored}) > 1}
    if not varied:
        return {}
    study = optuna.create_study()
    for trial, value in scored:
        params = {name: trial.params[name] for name in varied}
        distributions = {name: trial.distributions[name] for name in varied}
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=distributions, value=value)
        )
    found = optuna.importance.FanovaImportanceEvaluator(seed=0).evaluate(study)
    total = sum(found.values())  # 0 where the forest splits nowhere
    return {name: float(share / total) for name, share in found.items()} if total else {}
