"""What an ablation's YAML means: its arms, and what is refused before anything runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sft_ray.ablation_file import MOST_ARMS, SHARE, Ablation, configuration
from sft_ray.analysis.ablation import Arm
from sft_ray.config import Experiment, Regularization, Train
from sft_ray.errors import ConfigError
from sft_ray.run_store import RunStore
from sft_ray.search.ablate import Base, _plan, ablation_seeds
from sft_ray.search.confirm import fresh_seeds
from sft_ray.search.preflight import prepare_experiment

SHIPPED = Path(__file__).parents[1] / "experiments" / "ablations"
RATE, BATCH, FROZEN = "train.learning_rate", "train.batch_size", "train.frozen_layers"
PENALTY = "train.regularization"


def ablation(**tree: Any) -> Ablation:
    return Ablation.model_validate({"name": "mine", "base": "runs/x", **tree})


def changes(base: Train | None = None, num_layers: int = 6, **tree: Any) -> list[dict[str, Any]]:
    return ablation(**tree).changes(base or Train(), num_layers)


def test_a_grid_has_every_combination_but_the_base() -> None:
    found = changes(vary={RATE: [2e-5, 1e-4], "train.epochs": [1, 3]})
    assert found == [
        {"train.epochs": 1},
        {RATE: 1e-4, "train.epochs": 1},
        {RATE: 1e-4},
    ]


def test_every_means_every_depth_of_the_model() -> None:
    assert changes(vary={FROZEN: "every"}) == [{FROZEN: k} for k in range(1, 7)]
    assert changes(Train(frozen_layers=2), 3, vary={FROZEN: "every"}) == [
        {FROZEN: k} for k in (0, 1, 3)
    ]
    assert len(changes(vary={FROZEN: "every", "train.epochs": [1, 2, 3]})) == 7 * 3 - 1


def test_arms_come_behind_the_grid_and_none_twice() -> None:
    sgd = {"train.optimizer": "sgd", RATE: 0.01}
    found = changes(vary={"train.epochs": [1]}, arms=[sgd, {"train.epochs": 1}, sgd])
    assert found == [{"train.epochs": 1}, sgd]


def test_what_equals_the_base_is_left_out() -> None:
    base = Train(optimizer="adam", regularization=Regularization(kind="l2", strength=0.5))
    arms = [
        {"train.optimizer": "adam"},
        {"train.optimizer": "sgd", "train.momentum": 0.9},
        {PENALTY: {"strength": 0.5, "kind": "l2"}, "train.epochs": 1},
    ]
    assert changes(base, arms=arms) == [{"train.optimizer": "sgd"}, {"train.epochs": 1}]


@pytest.mark.parametrize(
    ("scaling", "rates"),
    [
        (["none"], {16: [2e-5], 64: [2e-5], 128: [2e-5]}),
        (["linear"], {16: [1e-5], 64: [4e-5], 128: [8e-5]}),
        (["sqrt"], {16: [1.41421e-5], 64: [2.82843e-5], 128: [4e-5]}),
        (
            ["none", "sqrt", "linear"],
            {
                16: [2e-5, 1.41421e-5, 1e-5],
                64: [2e-5, 2.82843e-5, 4e-5],
                128: [2e-5, 4e-5, 8e-5],
            },
        ),
    ],
)
def test_the_learning_rate_follows_the_batch_size(
    scaling: list[str], rates: dict[int, list[float]]
) -> None:
    found = changes(vary={BATCH: [16, 32, 64, 128]}, learning_rate_scaling=scaling)
    by_size: dict[int, list[float]] = {}
    for change in found:  # the base's own size is the base, however it is scaled
        by_size.setdefault(change[BATCH], []).append(
            configuration(Train(), change)[0].learning_rate
        )
    assert by_size == rates


def test_scaling_starts_from_the_rate_of_the_grid_and_leaves_arms_alone() -> None:
    arm = {BATCH: 8}
    found = changes(vary={BATCH: [64], RATE: [1e-4]}, arms=[arm], learning_rate_scaling=["linear"])
    assert found == [{BATCH: 64, RATE: 2e-4}, arm]


def test_a_share_of_the_training_rows_is_no_setting_of_training() -> None:
    found = changes(vary={SHARE: [0.1, 0.5, 1, 1.0]})
    assert found == [{SHARE: 0.1}, {SHARE: 0.5}]
    assert configuration(Train(), found[0]) == (Train(), 0.1)
    assert configuration(Train(), {}) == (Train(), 1.0)
    train, share = configuration(Train(), {SHARE: 0.5, "train.epochs": 1})
    assert (train.epochs, share) == (1, 0.5)


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"vary": {FROZEN: [9, -1]}}, "train.frozen_layers: "),
        ({"vary": {RATE: ["fast"]}}, "train.learning_rate: "),
        ({"vary": {BATCH: [0]}, "learning_rate_scaling": ["sqrt"]}, "train.batch_size: "),
        ({"arms": [{PENALTY: {"kind": "l3"}}]}, "train.regularization.kind: "),
        ({"arms": [{PENALTY: {"kind": "l2"}}]}, "needs a strength"),
        ({"arms": [{"train.optimizer": "adamv"}]}, "did you mean 'adam"),
        ({"vary": {SHARE: [0]}}, "above 0 and at most 1, got 0"),
        ({"vary": {SHARE: [2]}}, "above 0 and at most 1, got 2"),
        ({"vary": {SHARE: [True]}}, "above 0 and at most 1, got True"),
        ({"vary": {SHARE: ["all"]}}, "above 0 and at most 1, got 'all'"),
        ({"vary": {SHARE: [float("nan")]}}, "above 0 and at most 1, got nan"),
        ({"vary": {SHARE: [None]}}, "above 0 and at most 1, got None"),
        ({"vary": {"train.epochs": [3]}}, "no arm departs from the base"),
        ({"arms": [{BATCH: 32, SHARE: 1}]}, "no arm departs from the base"),
        ({"vary": {BATCH: list(range(33, 60)), "train.epochs": list(range(1, 9))}}, "at most 200"),
    ],
)
def test_values_that_no_arm_can_take_are_one_line(tree: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        changes(**tree)
    (line,) = caught.value.problems
    assert line.startswith("mine: ")
    assert says in line
    assert "\n" not in line


def test_there_can_be_as_many_arms_as_that() -> None:
    assert len(changes(vary={BATCH: list(range(33, 33 + MOST_ARMS))})) == MOST_ARMS


GOOD = "name: mine\nbase: runs/x\n"
# Name -> YAML, and what the one line must say behind the file's name.
MALFORMED: dict[str, tuple[str, list[str]]] = {
    "name of the runs' folder": (
        "name: runs\nbase: runs/x\nvary: {train.epochs: [1]}",
        ["`runs`", "another name"],
    ),
    "scaling without batch sizes": (
        GOOD + "vary: {train.epochs: [1]}\nlearning_rate_scaling: [sqrt]",
        ["learning_rate_scaling", "train.batch_size"],
    ),
    "unknown key": (GOOD + "seed: 5\narms: [{train.epochs: 1}]", ["seed: unknown", "'seeds'"]),
    "unknown path": (GOOD + "vary: {train.epoch: [1]}", ["'train.epoch'", "'train.epochs'"]),
    "path without train": (GOOD + "vary: {epochs: [1]}", ["got 'epochs'", "'train.epochs'"]),
    "unknown path of an arm": (GOOD + "arms: [{train.frozen: 1}]", ["'train.frozen_layers'"]),
    "path below a field": (
        GOOD + "vary: {train.regularization.kind: [l1]}",
        ["got 'train.regularization.kind'", "'train.regularization'"],
    ),
    "share of another section": (GOOD + "vary: {train.train_share: [0.5]}", ["train_share"]),
    "data that cannot be varied": (GOOD + "vary: {data.max_length: [8]}", ["data.max_length"]),
    "every elsewhere": (GOOD + "vary: {train.epochs: every}", ["`every`", "train.epochs"]),
    "evry": (GOOD + "vary: {train.frozen_layers: evry}", ["list or 'every'", "'evry'"]),
    "a value for a list": (GOOD + "vary: {train.epochs: 3}", ["vary.train.epochs", "list", "3"]),
    "an empty list": (GOOD + "vary: {train.epochs: []}", ["train.epochs", "empty list"]),
    "an empty arm": (GOOD + "arms: [{train.epochs: 1}, {}]", ["arms", "got {}"]),
    "arms as a mapping": (GOOD + "arms: {train.epochs: 1}", ["arms", "list"]),
    "an arm that is a text": (GOOD + "arms: [sgd]", ["arms.0", "'sgd'"]),
    "vary as a list": (GOOD + "vary: [train.epochs]", ["vary", "dictionary"]),
    "a path that is a number": (GOOD + "vary: {3: [1]}", ["vary.3", "string"]),
    "nothing varied": (GOOD, ["nothing is varied", "`vary` or `arms`"]),
    "one seed": (GOOD + "seeds: 1\narms: [{train.epochs: 1}]", ["seeds", "2", "got 1"]),
    "seeds as a list": (GOOD + "seeds: [1, 2]\narms: [{train.epochs: 1}]", ["seeds", "integer"]),
    "seeds that are true": (GOOD + "seeds: true\narms: [{train.epochs: 1}]", ["seeds", "True"]),
    "unknown cost": (
        GOOD + "costs: [train_second]\narms: [{train.epochs: 1}]",
        ["costs.0", "did you mean 'train_seconds'"],
    ),
    "unknown scaling": (
        GOOD + "learning_rate_scaling: [lin]\narms: [{train.epochs: 1}]",
        ["learning_rate_scaling.0", "'lin'"],
    ),
    "no scaling at all": (
        GOOD + "learning_rate_scaling: []\nvary: {train.batch_size: [8]}",
        ["learning_rate_scaling", "at least 1"],
    ),
    "name with a slash": ("name: a/b\nbase: x\narms: [{train.epochs: 1}]", ["name", "'a/b'"]),
    "name that goes up": ("name: ..\nbase: x\narms: [{train.epochs: 1}]", ["name", "'..'"]),
    "name with a blank": ("name: my own\nbase: x\narms: [{train.epochs: 1}]", ["name", "my own"]),
    "no name": ("base: x\narms: [{train.epochs: 1}]", ["name: this key is required"]),
    "no base": ("name: x\narms: [{train.epochs: 1}]", ["base: this key is required"]),
    "empty base": ("name: x\nbase: ''\narms: [{train.epochs: 1}]", ["base", "''"]),
    "base that is nowhere said": (
        "name: x\nbase: ${SFT_RAY_NOT_SET}\narms: [{train.epochs: 1}]",
        ["SFT_RAY_NOT_SET is not set"],
    ),
    "no mapping": ("- 1", ["a mapping of keys, got list"]),
    "no YAML": ("name: [", ["not valid YAML"]),
    "a key twice": (GOOD + "name: again", ["not valid YAML"]),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_one_line_that_names_it(name: str, tmp_path: Path) -> None:
    text, fragments = MALFORMED[name]
    file = tmp_path / "ablation.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        Ablation.load(str(file), [])
    (line,) = caught.value.problems
    assert line.startswith(str(file)), line
    assert "\n" not in line
    assert len(line) < 600
    for fragment in fragments:
        assert fragment in line.removeprefix(str(file))


def test_there_are_enough_malformed_files() -> None:
    assert len(MALFORMED) >= 20


def test_every_problem_is_told_at_once_and_overrides_count(tmp_path: Path) -> None:
    file = tmp_path / "ablation.yaml"
    file.write_text("name: a b\nbase: x\nseeds: 1\nvary: {train.epochs: [1]}")
    with pytest.raises(ConfigError) as caught:
        Ablation.load(str(file), ["costs=[x]"])
    assert len(caught.value.problems) == 3
    mended = Ablation.load(str(file), ["name=ab", "seeds=3", "base=runs/y"])
    assert (mended.name, mended.seeds, mended.base) == ("ab", 3, "runs/y")


def test_every_shipped_ablation_has_arms() -> None:
    files = sorted(SHIPPED.glob("*.yaml"))
    assert len(files) == 5
    found = {}
    for file in files:
        shipped = Ablation.load(str(file), [])
        assert shipped.name == file.stem
        arms = shipped.changes(Train(), 6)
        labels = [Arm("", change).label for change in arms]
        assert len(set(labels)) == len(labels)
        for change in arms:
            train, share = configuration(Train(), change)
            assert (train, share) != (Train(), 1.0)
        found[shipped.name] = len(arms)
    assert found == {
        "batch_size": 12,
        "data_size": 4,
        "frozen_layers": 6,
        "optimizer": 4,
        "regularization": 6,
    }


def test_seeds_are_of_ablations_alone_and_more_of_them_begin_alike() -> None:
    assert ablation_seeds(17, 6)[:3] == ablation_seeds(17, 3)
    mine, confirmed = ablation_seeds(17, 100), fresh_seeds(17, 100)
    assert len({17, *mine, *confirmed}) == 201
    assert not set(mine) & set(ablation_seeds(18, 100))


@pytest.fixture
def base(experiment: Experiment, tmp_path: Path) -> Base:
    return Base(experiment, experiment.train, RunStore(str(tmp_path / "runs"), "tiny"))


def test_arms_are_checked_against_model_and_task(base: Base) -> None:
    prepared = prepare_experiment(base.experiment)
    with pytest.raises(ConfigError) as caught:
        _plan(ablation(vary={FROZEN: [1, 3]}), base, prepared)
    (line,) = caught.value.problems
    assert line.startswith("mine, frozen_layers 3: train.frozen_layers: ")
    assert "has 2 layers, got 3" in line
    weights = {"train.class_weights": {"animal": 2.0, "stone": 1.0}}
    with pytest.raises(ConfigError, match="class_weights"):
        _plan(ablation(arms=[weights]), base, prepared)
    tops = replace(base, train=Train(reinit_layers=1))
    with pytest.raises(ConfigError, match=r"train\.reinit_layers: .* 2 are frozen"):
        _plan(ablation(vary={FROZEN: "every"}), tops, prepared)


def test_runs_go_seed_by_seed_over_all_arms(base: Base) -> None:
    prepared = prepare_experiment(base.experiment)
    planned = _plan(ablation(vary={FROZEN: "every"}, seeds=3), base, prepared)
    assert [arm.name for arm in planned.arms] == ["base", "frozen_layers 1", "frozen_layers 2"]
    assert [run.arm for run in planned.runs] == [arm.name for arm in planned.arms] * 3
    assert [run.seed for run in planned.runs[::3]] == ablation_seeds(17, 3)
    assert len({run.key for run in planned.runs}) == 9
    shares = _plan(ablation(name="other", vary={SHARE: [0.5]}, seeds=2), base, prepared)
    mine = {run.key for run in planned.runs}
    assert [run.key in mine for run in shares.runs] == [True, False] * 2  # they share the base


def test_runs_of_other_data_are_other_runs(base: Base) -> None:
    """An experiment's file can change between two calls, and keeps its name and folder."""
    tree = base.experiment.to_tree()
    tree["data"]["limit"] = {"train": 100, "validation": None}
    other = Base(Experiment.from_tree(tree), base.train, base.store)
    plans = [
        _plan(ablation(vary={FROZEN: "every"}), one, prepare_experiment(one.experiment))
        for one in (base, other)
    ]
    keys = [{run.key for run in planned.runs} for planned in plans]
    assert not keys[0] & keys[1]


def test_arms_whose_short_labels_agree_are_told_apart_by_all_digits(base: Base) -> None:
    prepared = prepare_experiment(base.experiment)
    rates = [1.0000001e-4, 1.0000002e-4]
    planned = _plan(ablation(vary={RATE: rates}), base, prepared)
    assert [arm.name for arm in planned.arms[1:]] == [f'{{"{RATE}": {r!r}}}' for r in rates]


def test_the_bases_own_batch_size_is_no_arm_whatever_its_learning_rate() -> None:
    base = Train(learning_rate=3.123456789e-05, batch_size=32)
    found = changes(base, vary={BATCH: [16, 32]}, learning_rate_scaling=["linear"])
    assert [change[BATCH] for change in found] == [16]
