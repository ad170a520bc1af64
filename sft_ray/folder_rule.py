"""The folder rule: the same command on the same folder goes on, another one is refused."""

from __future__ import annotations

from typing import Any, Literal

from sft_ray.config import Experiment
from sft_ray.errors import ConfigError
from sft_ray.run_store import EXPERIMENT, RunStore, experiment_text, kept_environment
from sft_ray.yaml_text import parse_yaml

# What ends a search, as keys of the experiment: `BUDGET` leads those of its budget.
SPACE, TRIALS, BUDGET = "search.space", "search.trials", "search.budget."
# Keys that may grow on a finished or interrupted run; everything else must stay as it was.
BUDGETS = (TRIALS, *(f"{BUDGET}{name}" for name in ("wall_minutes", "worker_hours", "patience")))
ENQUEUED = "search.enqueue"  # to which more may be added at its end
TARGET = f"{BUDGET}target"  # of a loss a lower one is more, so any other is taken for more


def check_made_by(store: RunStore, verb: Literal["search", "train"]) -> None:
    """Whether the run folder, if there is one, is of this verb; both take the same experiments.

    Raises:
        ConfigError: it is the other's.
    """
    environment = kept_environment(store)
    if isinstance(environment, dict):
        made_by = "search" if "slots" in environment else "train"
        if made_by != verb:
            raise ConfigError(
                f"{store.location} was made by `sft-ray {made_by}`; choose another name=…, or "
                "--fresh to set it aside"
            )


def as_begun(experiment: Experiment, store: RunStore) -> Experiment:
    """The experiment at the hub commit that the run in this folder began with.

    Args:
        experiment: if it names a revision itself, that one counts.

    Raises:
        ConfigError: what the folder says of its experiment is damaged.
    """
    text = experiment_text(store)
    if text is None or experiment.revision is not None:
        return experiment
    old = parse_yaml(text, store.path_of(EXPERIMENT))
    if not isinstance(old, dict) or old.get("model") != experiment.model:
        return experiment  # which the folder rule has something to say about
    return experiment.model_copy(update={"revision": old.get("revision")})


def check_folder_rule(
    store: RunStore, experiment: Experiment
) -> Literal["new", "same", "extended"]:
    """How the experiment relates to what the folder holds; only budgets may have grown.

    Raises:
        ConfigError: the folder holds another experiment; names each difference and both ways out.
    """
    text = experiment_text(store)
    if text is None:
        return "new"
    old = _flat(parse_yaml(text, store.path_of(EXPERIMENT)))
    new = _flat(experiment.to_tree())
    keys = (old.keys() | new.keys()) - {"name", "storage"}  # a run folder may be moved
    # These decide no number of the run.
    keys = {key for key in keys if key.partition(".")[0] not in ("confirm", "watchdog", "tracking")}
    if old.get("revision") is None:  # of a local folder, or not told yet
        keys.discard("revision")
    changed = {key for key in keys if old.get(key) != new.get(key)}
    differences = [
        f"{key} is {old.get(key)!r} there and {new.get(key)!r} here"
        for key in sorted(changed)
        if not _grew(key, old.get(key), new.get(key))
    ]
    if differences:
        raise ConfigError(
            *(f"{store.location} holds another experiment: {text}" for text in differences),
            f"{store.location}: choose another name=…, or --fresh to set the old folder aside",
        )
    return "extended" if changed else "same"


def _grew(key: str, old: Any, new: Any) -> bool:
    """A budget grew when it is larger or has become unlimited; a target when it is another."""
    if old is None:
        return False
    if key == ENQUEUED:
        return isinstance(old, list) and bool(new[: len(old)] == old)
    return key == TARGET or (key in BUDGETS and (new is None or new > old))


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted path -> value; lists and the entries of a search space are values."""
    if not isinstance(tree, dict) or prefix.startswith(f"{SPACE}."):
        return {prefix.rstrip("."): tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.")
    return found
