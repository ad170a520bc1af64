"""`sft-ray verify`: whether a finished run still is what it says it is."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from sft_ray import __version__
from sft_ray.analysis.results import check_tree
from sft_ray.config import Experiment
from sft_ray.errors import ConfigError, SftError
from sft_ray.run_store import (
    BEST,
    CHECKSUMS,
    ENVIRONMENT,
    RESULTS,
    RunStore,
    checksummed_files,
    open_run,
    read_experiment,
    trial_folder,
    trial_records,
)
from sft_ray.screen import count
from sft_ray.serving.evaluate import examples_of
from sft_ray.serving.predict import Predictor, load_predictor, read_facts
from sft_ray.training.data import open_dataset, prepare
from sft_ray.training.examples import IGNORED, Examples
from sft_ray.training.metrics import Floats
from sft_ray.training.model_facts import resolve_model
from sft_ray.training.tasks import find_task

TOLERANCE = 1e-4  # of a score, between two devices or versions
SLACK = 1.5  # of what one example moves a score by: scores are fractions, which do not add up
TOLD = ("state", "value", "params", "metrics")  # what a trial's own record must agree on
NAMED_FILES = 5  # in a line


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; `ok` is None for a note that fails nothing."""

    name: str
    ok: bool | None
    found: str


@dataclass(frozen=True)
class Verification:
    """What was found in the run folder at `location`."""

    location: str
    checks: list[Check]

    @property
    def ok(self) -> bool:
        return all(check.ok is not False for check in self.checks)


def run_verification(place: str) -> Verification:
    """Compare a finished run with itself, its data and its model; changes nothing in it.

    What is damaged, missing or different is a failed check, never an exception.

    Args:
        place: path or URI of the run folder.

    Raises:
        SftError: there is no run, or it has not finished.
    """
    store = open_run(place)
    if not store.exists(RESULTS):
        raise ConfigError(f"{place} has not finished (no {RESULTS}); finish it with its command")
    _check_working_folder(store)
    checks: dict[str, Callable[[RunStore], Check]] = {
        "checksums": _check_checksums,
        "results": _check_results,
        "data": _check_data,
        "versions": _check_versions,
        "score": _check_score,
    }
    return Verification(
        store.location, [_look(name, check, store) for name, check in checks.items()]
    )


def _check_working_folder(store: RunStore) -> None:
    """Whether the data files of the run, if they are told from the working folder, are there.

    Elsewhere their absence says nothing of the run.
    """
    try:
        data = read_experiment(store).data
    except SftError:
        return  # which the checks will tell
    relative = [p for p in (data.train, data.validation, data.test) if p and not Path(p).anchor]
    if missing := [path for path in relative if not Path(path).exists()]:
        raise ConfigError(
            f"{missing[0]}: no such file here, and the run names its data from the folder that it "
            "was started in; verify it from there"
        )


def _look(name: str, check: Callable[[RunStore], Check], store: RunStore) -> Check:
    try:
        return check(store)
    except SftError as error:
        return Check(name, False, "; ".join(error.problems))
    except Exception as error:  # a changed file may make any library raise anything
        reason = " ".join(str(error).split())[:300]
        return Check(name, False, f"cannot be checked: {type(error).__name__}: {reason}")


def _verdict(name: str, problems: list[str], fine: str) -> Check:
    return Check(name, not problems, "; ".join(problems) or fine)


def _check_checksums(store: RunStore) -> Check:
    kept = store.read_json(CHECKSUMS)
    if kept is None:
        return Check("checksums", None, "the run was made before checksums were kept")
    listed = kept.get("sha256") if isinstance(kept, dict) else None
    if not isinstance(listed, dict):
        raise ConfigError(f"{store.path_of(CHECKSUMS)}: damaged: must hold an object `sha256`")
    present = checksummed_files(store)
    there = set(present) | {path for path in listed if store.exists(path)}
    files = {
        "missing": [path for path in listed if path not in there],
        "changed": [p for p in listed if p in there and store.sha256(p) != listed[p]],
        "unexpected": [path for path in present if path not in listed],
    }
    problems = [f"{what}: {_named(paths)}" for what, paths in files.items() if paths]
    return _verdict("checksums", problems, f"{count(len(listed), 'file')} as they were written")


def _check_results(store: RunStore) -> Check:
    """results.json against the records that the trials wrote themselves, and against itself."""
    tree, problems = _results(store), []
    rows = {row["number"]: row for row in tree["trials"]}
    records = set(trial_records(store))
    for number, row in rows.items():
        path = f"{trial_folder(number)}/trial.json"
        record = store.read_json(path)
        records.discard(path)
        if not isinstance(record, dict):
            problems.append(f"{path} is {'missing' if record is None else 'damaged'}")
        elif other := [name for name in TOLD if record.get(name) != row.get(name)]:
            problems.append(f"{path} has another {_named(other)}")
    if records:
        problems.append(f"not among its trials: {_named(sorted(records))}")
    best = tree["best"]
    row = rows.get(best["trial"], {})
    compared = {"params": "params", "validation": "metrics"}
    if "expected" in best:  # the confirmation has trained the winner anew
        del compared["validation"]
        if best["trial"] is None:  # it was the default recipe, and not among the trials
            del compared["params"]
    problems += [
        f"best.{name} is not that of trial {best['trial']}"
        for name, of_trial in compared.items()
        if best[name] != row.get(of_trial)
    ]
    return _verdict("results", problems, f"agree with {count(len(rows), 'trial')}")


def _check_data(store: RunStore) -> Check:
    experiment, environment = read_experiment(store), _environment(store)
    with store.fetched_folder(BEST) as best:
        facts = read_facts(str(best))
        today = _fingerprint(experiment, best)
    problems = [
        f"the fingerprint of the data is {today}, in {where} it is {found}"
        for where, found in (
            (ENVIRONMENT, environment.get("data_fingerprint")),
            (f"{BEST}/sft_ray.json", facts.get("data_fingerprint")),
        )
        if found != today
    ]
    return _verdict("data", problems, f"fingerprint {today}, as it was")


def _fingerprint(experiment: Experiment, best: Path) -> str:
    """Of the data as it is today, in the tokens of the model that the run began with.

    A base model that is out of reach is no fault of the data: the winner has the same tokenizer.
    """
    data, task, seed = experiment.data, find_task(experiment.task), experiment.seed
    try:
        model = resolve_model(experiment.model)
        folder = prepare(data, task, model, experiment.revision, seed)
    except SftError as error:
        if not all(problem.startswith("model:") for problem in error.problems):
            raise
        folder = prepare(data, task, str(best), None, seed)
    return open_dataset(folder).fingerprint


def _check_versions(store: RunStore) -> Check:
    """Another version may well give the same scores, so that is only worth knowing."""
    environment = _environment(store)
    then = {name: environment.get(name) for name in ("sft_ray", "python")}
    now: dict[str, str] = {"sft_ray": __version__, "python": platform.python_version()}
    packages = environment.get("packages")
    if not isinstance(packages, dict):
        raise ConfigError(f"{store.path_of(ENVIRONMENT)}: damaged: must hold its packages")
    for name, version in packages.items():
        then[name], now[name] = version, _installed(name)
    other = [
        f"{name} {then[name]} then, {now[name]} now" for name in then if then[name] != now[name]
    ]
    for earlier in environment.get("earlier") or []:
        told = {name: earlier[name] for name in ("sft_ray", "python") if name in earlier}
        told |= earlier.get("packages") or {}
        other += [
            f"{name} {version} in an earlier session"
            for name, version in told.items()
            if version != then.get(name)
        ]
    return Check("versions", None if other else True, "; ".join(other) or "the same as then")


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _check_score(store: RunStore) -> Check:
    experiment, reported = read_experiment(store), _results(store)["best"]["validation"]
    with store.fetched_folder(BEST) as best:
        if not best.is_dir():
            raise ConfigError(f"{store.path_of(BEST)} is missing; there is nothing to score")
        predictor = load_predictor(str(best))
    if predictor.task.name != experiment.task:
        raise ConfigError(
            f"the model answers {predictor.task.name}, the experiment is about {experiment.task}"
        )
    examples = examples_of(predictor, experiment, "validation")
    outputs, num_examples = predictor.outputs(examples), len(np.unique(examples.rows))
    found = predictor.task.score(outputs, examples, predictor.label_set)
    moved = moved_by_a_close_call(outputs, examples, predictor, found)
    return compared_scores(reported, found, num_examples, moved)


def moved_by_a_close_call(
    outputs: Floats, examples: Examples, predictor: Predictor, found: dict[str, float]
) -> dict[str, float]:
    """By how much each score moves if the closest of all decisions falls otherwise.

    Number formats, batches and devices round otherwise.  Empty where nothing is decided between
    classes.
    """
    task, other = predictor.task, outputs.copy()
    if not task.classes:
        return {}
    if task.problem_type == "multi_label_classification":
        other.flat[np.abs(outputs).argmin()] *= -1
    else:
        best = np.argsort(outputs, axis=1)[:, -2:]
        second, first = np.take_along_axis(outputs, best, axis=1).T
        margin = first - second
        if task.per_token:
            margin[examples.labels == IGNORED] = np.inf
        row = margin.argmin()
        other[row, best[row]] = outputs[row, best[row][::-1]]
    moved = task.score(other, examples, predictor.label_set)
    return {name: abs(moved[name] - value) for name, value in found.items()}


def compared_scores(
    reported: dict[str, Any], found: dict[str, float], num_examples: int, moved: dict[str, float]
) -> Check:
    """Whether scores are the reported ones, up to rounding or an example that fell otherwise.

    Args:
        moved: by how much one close call moves a score, where that is known.
    """
    problems, differences = [], {}
    for name, value in reported.items():
        if not isinstance(value, int | float) or name not in found:
            problems.append(f"{name} is reported as {value}, and cannot be found again")
            continue
        differences[name] = abs(found[name] - value)
        of_an_example = SLACK * max(1 / num_examples, moved.get(name, 0.0))
        allowed = max(TOLERANCE * max(1.0, abs(value)), of_an_example)
        if not differences[name] <= allowed:
            problems.append(f"{name} is {found[name]:.6g}, reported as {value:.6g}")
    if not reported:
        problems.append("no score is reported")
    fine = f"{count(num_examples, 'example')} scored again"
    if differences:
        largest = max(differences, key=lambda name: differences[name])
        fine += f"; the largest difference is {differences[largest]:.2g}, in {largest}"
    return _verdict("score", problems, fine)


def _results(store: RunStore) -> dict[str, Any]:
    tree: dict[str, Any] = store.read_json(RESULTS)
    check_tree(tree, store.path_of(RESULTS))
    return tree


def _environment(store: RunStore) -> dict[str, Any]:
    environment = store.read_json(ENVIRONMENT)
    if not isinstance(environment, dict):
        what = "is missing" if environment is None else "is damaged"
        raise ConfigError(f"{store.path_of(ENVIRONMENT)} {what}")
    return environment


def _named(names: list[str]) -> str:
    more = len(names) - NAMED_FILES
    return ", ".join(names[:NAMED_FILES]) + (f" and {more} more" if more > 0 else "")
