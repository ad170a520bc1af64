"""Which configurations of a search are confirmed on fresh seeds, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sft_ray.analysis.statistics import mean_interval, paired_difference
from sft_ray.recipes import YARDSTICK

RACE_FROM = 3  # seeds before a configuration can be dropped
# Of the test that drops one; low, because the leader of a few noisy means is itself flattered and
# the test is made again with every seed.
RACE_LEVEL = 0.01


@dataclass(frozen=True)
class Candidate:
    """A configuration to confirm.

    Attributes:
        arm: its name in tables.
        trial: number in the search; None if it was not among the trials.
        search_value: what the search scored it at.
    """

    arm: str
    trial: int | None
    params: dict[str, Any]
    train: dict[str, Any]
    search_value: float | None


def candidates(
    rows: Sequence[Mapping[str, Any]], top: int, sign: int, default: Candidate
) -> list[Candidate]:
    """The best finished trials of a search, best first, and the default recipe as the last.

    Trials of the same configuration count once.

    Args:
        rows: `trials` of results.json.
        default: taken where the default recipe was not among the trials.
    """
    finished = [row for row in rows if row["state"] == "COMPLETE"]
    chosen: list[Candidate] = []
    for row in sorted(finished, key=lambda row: (-sign * row["value"], row["number"])):
        is_default = row["role"] == YARDSTICK or row["train"] == default.train
        arm = YARDSTICK if is_default else f"trial {row['number']}"
        found = Candidate(arm, row["number"], row["params"], row["train"], row["value"])
        if found.train in [other.train for other in chosen]:
            continue
        if is_default:
            default = found
        chosen.append(found)
    return [one for one in chosen[:top] if one is not default] + [default]


def scores_by_seed(rows: Sequence[Mapping[str, Any]], arm: str) -> dict[int, float]:
    """Of the runs that came to their end."""
    finished = [row for row in rows if row["arm"] == arm and row["state"] == "COMPLETE"]
    return {row["seed"]: row["value"] for row in finished}


def has_failed(arm: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a run of a configuration ended before its end."""
    return any(row["arm"] == arm and row["state"] != "COMPLETE" for row in rows)


def is_out_of_the_race(arm: str, rows: Sequence[Mapping[str, Any]], sign: int) -> bool:
    """Whether a configuration is clearly worse than the best one, over the seeds it has finished.

    Racing (Maron and Moore 1994) by paired t-tests, one-sided, Bonferroni over the configurations,
    from `RACE_FROM` seeds on, against those that have finished the same seeds and failed on none.
    One that failed on a seed is out; the default recipe, which every other is measured against,
    never is.
    """
    if arm == YARDSTICK:
        return False
    if has_failed(arm, rows):
        return True
    scores = {name: scores_by_seed(rows, name) for name in {row["arm"] for row in rows}}
    mine = scores.get(arm, {})
    if len(mine) < RACE_FROM:
        return False
    rivals = {
        name: [found[seed] for seed in mine]
        for name, found in scores.items()
        if set(mine) <= set(found) and not has_failed(name, rows)
    }
    leader = max(rivals, key=lambda name: sign * sum(rivals[name]))
    if leader == arm:
        return False
    behind = paired_difference(rivals[leader], rivals[arm])
    assert behind.p_value is not None  # of several pairs
    return sign * behind.difference > 0 and behind.p_value / 2 < RACE_LEVEL / (len(scores) - 1)


def confirmation(
    chosen: Sequence[Candidate], rows: Sequence[Mapping[str, Any]], sign: int
) -> list[dict[str, Any]]:
    """A row per configuration, the best first; those clearly behind come last.

    The others rank by their means over the seeds that all of them have finished: a budget may have
    cut the runs of some, and seeds are not equally hard.

    Returns:
        Per configuration `arm`, `trial`, `params`, `search_value`, `scores` by seed, `expected`
        (mean, sd, low, high, n: 95 % t interval over seeds; None without a finished run),
        `flattered` (how much better the search's score was than the mean, negative if it was
        worse), `behind` (clearly worse than the best, or failed), and `over_default`: the paired
        difference to the default recipe, its interval and n, positive if better; None for the
        default itself.
    """
    default = scores_by_seed(rows, YARDSTICK)
    table: list[dict[str, Any]] = []
    for one in chosen:
        scores = scores_by_seed(rows, one.arm)
        expected = mean_interval([*scores.values()]) if scores else None
        shared = sorted(set(scores) & set(default)) if one.arm != YARDSTICK else []
        ahead = None
        if shared:
            ahead = paired_difference(
                [sign * scores[s] for s in shared], [sign * default[s] for s in shared]
            )
        table.append(
            {
                "arm": one.arm,
                "trial": one.trial,
                "params": one.params,
                "search_value": one.search_value,
                "scores": {str(seed): value for seed, value in scores.items()},
                "expected": None if expected is None else asdict(expected),
                "flattered": None
                if expected is None or one.search_value is None
                else sign * (one.search_value - expected.mean),
                "behind": has_failed(one.arm, rows) or is_out_of_the_race(one.arm, rows, sign),
                "over_default": None if ahead is None else asdict(ahead),
            }
        )

    in_race = [row for row in table if row["scores"] and not row["behind"]]
    shared_by_all = set.intersection(*(set(row["scores"]) for row in in_race)) if in_race else set()

    def rank(row: dict[str, Any]) -> tuple[bool, bool, float]:
        scores = [row["scores"][seed] for seed in shared_by_all if seed in row["scores"]]
        scores = scores or [*row["scores"].values()]
        return row not in in_race, not scores, -sign * sum(scores) / max(len(scores), 1)

    return sorted(table, key=rank)
