from pathlib import Path
from typing import Any

import pytest

from sft_ray.config import Experiment, Search, Train, apply_values
from sft_ray.config_problems import may_come_of
from sft_ray.errors import ConfigError
from sft_ray.yaml_text import dump_yaml, parse_yaml

MINIMAL = {"name": "x", "model": "m", "data": {"path": "builtin:docstrings"}}
EXPERIMENTS = sorted((Path(__file__).parents[1] / "experiments").glob("*.yaml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "experiment.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_shipped_experiment_parses() -> None:
    names = {Experiment.load(path).name for path in EXPERIMENTS}
    assert names == {"quickstart", "sst2", "my-reviews"}


def test_the_resolved_tree_reads_back_as_the_same_experiment() -> None:
    for path in EXPERIMENTS:
        experiment = Experiment.load(path)
        assert Experiment.from_tree(parse_yaml(dump_yaml(experiment.to_tree()), "")) == experiment


def test_numbers_follow_yaml_1_2(tmp_path: Path) -> None:
    text = "{name: x, model: m, data: {path: d}, train: {learning_rate: 2e-5}}"
    assert Experiment.load(write(tmp_path, text)).train.learning_rate == 2e-5
    assert parse_yaml("{a: no, b: 012, c: 1.0e-3}", "") == {"a": "no", "b": 12, "c": 1e-3}


def test_defaults_yield_to_yaml_and_yaml_to_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "{name: x, model: m, data: {path: d}, train: {epochs: 2}}")
    experiment = Experiment.load(
        path,
        [
            "name=short",
            "train.batch_size=8",
            "search.space.train.epochs={int: [1, 2]}",
            "search.budget.target=0.9",
        ],
    )
    assert (experiment.name, experiment.train.epochs, experiment.train.batch_size) == (
        "short",
        2,
        8,
    )
    assert experiment.search.space == {"train.epochs": {"int": [1, 2]}}
    assert experiment.search.budget.target == 0.9
    assert experiment.train.warmup == Train().warmup


def test_storage_takes_an_environment_variable_or_its_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tree = {**MINIMAL, "storage": "${SFT_RAY_STORAGE:-runs}"}
    assert Experiment.from_tree(tree).storage == "runs"
    monkeypatch.setenv("SFT_RAY_STORAGE", "/somewhere")
    assert Experiment.from_tree(tree).storage == "/somewhere"


def test_all_problems_are_reported_together() -> None:
    tree = {
        **MINIMAL,
        "train": {"learning_rat": 1e-5, "epochs": 0, "batch_size": "32", "frozen_layers": "al"},
        "search": {"sampler": "tpee", "space": {"train.bach_size": {"choice": [1]}}},
        "resources": {"slots": "many"},
        "sead": 3,
    }
    with pytest.raises(ConfigError) as caught:
        Experiment.from_tree(tree, source="my.yaml")
    lines = caught.value.problems
    assert all(line.startswith("my.yaml: ") for line in lines)
    for part in (
        "train.learning_rat: unknown key; did you mean 'learning_rate'?",
        "train.epochs",
        "train.batch_size",
        "train.frozen_layers: ",
        "search.sampler",
        "did you mean 'tpe'",
        "search.space.train.bach_size",
        "did you mean 'train.batch_size'",
        "resources.slots: ",
        "sead: unknown key; did you mean 'seed'?",
    ):
        assert any(part in line for line in lines), part
    assert len(lines) == 8


@pytest.mark.parametrize(
    ("path", "value", "hint"),
    [
        ("trials", 9, "did you mean 'search.trials'?"),
        ("seeds", 9, "did you mean 'confirm.seeds' or 'seed'?"),
        ("validation", "dev.csv", "did you mean 'data.validation'?"),
        ("train.seed", 1, "did you mean 'seed', outside of train?"),
        ("train.strength", 0.1, "did you mean 'train.regularization.strength'?"),
        ("train.weight_decay", 0.01, "mean 'regularization: {kind: weight_decay, strength: …}'?"),
        ("weight_decay", 0.01, "mean 'train.regularization: {kind: weight_decay, strength: …}'?"),
        ("train.lr", 1e-4, "did you mean 'learning_rate'?"),
        ("train.num_train_epochs", 2, "did you mean 'epochs'?"),
        ("resources.num_workers", 2, "did you mean 'workers_per_trial'?"),
        ("train.num_workers", 2, "did you mean 'resources.workers_per_trial'?"),
        ("data.text", "review", "did you mean 'data.columns.text' or 'test'?"),
        ("data.subject", ["s", "e"], "did you mean 'data.columns.subject'?"),
        ("data.max_lenght", 64, "did you mean 'max_length'?"),
        ("confirm.best", 3, "known: top, seeds"),
    ],
)
def test_an_unknown_key_is_sought_in_all_sections(path: str, value: Any, hint: str) -> None:
    section, _, key = path.rpartition(".")
    tree: dict[str, Any] = {**MINIMAL, "data": {"path": "d"}}
    (tree.setdefault(section, {}) if section else tree)[key] = value
    with pytest.raises(ConfigError) as caught:
        Experiment.from_tree(tree)
    assert str(caught.value).startswith(f"experiment: {path}: unknown key; ")
    assert str(caught.value).endswith(hint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "a/b"}, "name: "),
        ({"data": {}}, "exactly one of `path` and `train`"),
        ({"data": {"path": "a", "train": "b.csv"}}, "got both"),
        ({"data": {"path": "a", "validation": "b.csv"}}, "go with `train`"),
        ({"data": {"train": "a", "validation": "b", "split": {}}}, "exclude each other"),
        ({"data": {"train": "a", "split": {"validation": 0.6, "test": 0.5}}}, "nothing to train"),
        ({"data": {"path": "a", "columns": {"text": "t", "label": "t"}}}, "a column of its own"),
        ({"data": {"path": "a", "columns": {"text": 3}}}, "data.columns.text"),
        ({"data": {"path": "a", "columns": {"subject": ["s"]}}}, "one column or [start, end]"),
        ({"data": {"path": "a", "columns": {"s": ["x", "x"]}}}, "a column of its own"),
        ({"data": {"path": "a", "label_names": ["one"]}}, "two different names"),
        ({"data": {"path": "a", "label_names": ["one", "one"]}}, "two different names"),
        ({"data": {"path": "a", "max_length": 3}}, "data.max_length"),
        ({"data": {"path": "a", "doc_stride": -1}}, "data.doc_stride"),
        ({"train": {"optimizer": "adamax"}}, "train.optimizer"),
        ({"train": {"precision": "fp8"}}, "train.precision"),
        ({"train": {"momentum": 1.0}}, "train.momentum"),
        ({"train": {"layer_decay": 0.0}}, "train.layer_decay"),
        ({"train": {"dropout": 1.0}}, "train.dropout"),
        ({"train": {"micro_batch": 0}}, "train.micro_batch"),
        ({"train": {"reinit_layers": -1}}, "train.reinit_layers"),
        ({"train": {"label_smoothing": -0.1}}, "train.label_smoothing"),
        ({"train": {"class_weights": {"a": -1.0}}}, "train.class_weights: weights must be 0 or"),
        ({"train": {"class_weights": "even"}}, "train.class_weights"),
        ({"train": {"regularization": {"kind": "l2"}}}, "needs a strength"),
        ({"train": {"regularization": {"kind": "none", "strength": 1.0}}}, "takes no strength"),
        ({"train": {"regularization": {"strength": 1.0}}}, "needs its kind, got strength 1.0"),
        ({"train": {"batch_size": True}}, "train.batch_size"),
        ({"train": {"learning_rate": 0}}, "greater than 0"),
        ({"train": "fast"}, "train: "),
        ({"search": {"rungs": [33, 10]}}, "rungs must ascend"),
        ({"search": {"space": {"seed": {"int": [1, 2]}}}}, "only fields of train"),
        ({"search": {"space": {"train.epochs": {"int": [0, 2]}}}}, "search.space.train.epochs"),
        ({"search": {"space": {"train.schedule": {"choice": ["liner"]}}}}, "'liner'"),
        ({"confirm": {"top": 0}}, "confirm.top"),
        ({"confirm": {"seeds": 1}}, "confirm.seeds"),
        ({"confirm": {"best": 3}}, "confirm.best: unknown key"),
        ({"resources": {"trials_per_gpu": 2, "workers_per_trial": 2}}, "never share a GPU"),
        ({"resources": {"gpus_per_worker": 0.5, "workers_per_trial": 2}}, "never share a GPU"),
        ({"resources": {"gpus_per_worker": 1.5}}, "must be a whole number, got 1.5"),
        ({"resources": {"trials_per_gpu": 0}}, "resources.trials_per_gpu"),
        ({"resources": {"trials_per_gpu": "all"}}, "resources.trials_per_gpu"),
        ({"resources": {"trials_per_gpu": 1.5}}, "resources.trials_per_gpu"),
        ({"storage": "${NOT_SET_ANYWHERE}"}, "NOT_SET_ANYWHERE is not set"),
    ],
)
def test_a_value_that_breaks_a_rule_is_refused_in_one_line(
    change: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Experiment.from_tree({**MINIMAL, **change})
    assert message in str(caught.value)
    assert len(caught.value.problems) == 1


def test_trials_per_gpu_is_a_number_or_auto() -> None:
    assert Experiment.from_tree(MINIMAL).resources.trials_per_gpu == 1
    for workers in (1, 2):
        resources = {"trials_per_gpu": "auto", "workers_per_trial": workers}
        found = Experiment.from_tree({**MINIMAL, "resources": resources})
        assert found.resources.trials_per_gpu == "auto"
        assert Experiment.from_tree(found.to_tree()) == found


def test_warmup_and_cooldown_fit_into_a_schedule_that_has_both() -> None:
    too_much = {"warmup": 0.5, "cooldown": 0.6}
    assert Experiment.from_tree({**MINIMAL, "train": too_much}).train.cooldown == 0.6
    with pytest.raises(ConfigError, match="together must not exceed 1"):
        Experiment.from_tree(
            {**MINIMAL, "train": {**too_much, "schedule": "constant_with_cooldown"}}
        )


def test_columns_may_be_left_out_or_be_a_pair() -> None:
    columns = {"text": "t", "text_pair": None, "subject": ["s", "e"]}
    experiment = Experiment.from_tree({**MINIMAL, "data": {"path": "d", "columns": columns}})
    assert experiment.data.columns == columns


def test_only_the_fields_that_share_a_column_are_named() -> None:
    columns = {"text": "t", "label": "t", "group": "text"}
    with pytest.raises(ConfigError, match=r"got 't' for text and label$"):
        Experiment.from_tree({**MINIMAL, "data": {"path": "d", "columns": columns}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "not valid YAML"),
        ("- a\n- b", "a mapping of keys"),
        ("", "a mapping of keys"),
        ("name: x\nname: y", "not valid YAML"),
        ("a: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_experiment_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Experiment.load(write(tmp_path, text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override", ["search.trials", "=3", "a..b=1", "name.first=x", "train.epochs=["]
)
def test_a_malformed_override_is_refused(tmp_path: Path, override: str) -> None:
    path = write(tmp_path, "{name: x, model: m, data: {path: d}}")
    with pytest.raises(ConfigError, match=r"override|no keys below|not valid YAML"):
        Experiment.load(path, [override])


def test_further_problems_can_be_sought_in_what_is_valid() -> None:
    tree = {**MINIMAL, "train": {"epochs": 0, "batch_size": 8}, "bogus": 1}
    rest, deleted = Experiment.what_is_valid(tree)
    assert rest is not None
    assert sorted(deleted) == ["bogus", "train.epochs"]
    assert (rest.train.epochs, rest.train.batch_size) == (3, 8)
    assert Experiment.what_is_valid({"name": "x"})[0] is None
    assert Experiment.what_is_valid({**MINIMAL, "task": 3}) == (None, ["task"])


@pytest.mark.parametrize(
    ("line", "deleted", "may"),
    [
        ("data.max_length: tiny takes at most 80 tokens, got 128", "data.max_length", True),
        ("data.train (my.csv): no column 'text'", "data.columns", True),
        ("data (folder, train): no column 'text'", "data.columns.text", True),
        ("data.train (my.csv): no column 'text'", "data.max_length", False),
        ("data.limit.train: too many", "data.limit", True),
        ("train.class_weights: no label 'a'", "data.label_names", True),
        ("search.objective: this data has no mrr", "data.columns", True),
        ("search.enqueue.0.train.epochs: outside the search space", "search.space", True),
        ("train.frozen_layers: tiny has 2 layers, got 9", "train.epochs", False),
        ("train.frozen_layers: tiny has 2 layers, got 9", "train", True),
        ("resources: 1 x 512 workers need 512 CPUs", "resources.slots", True),
        ("my.csv: no such file; paths are relative", "data.columns", False),
        ("/tmp/data: no such file; paths are relative", "data.columns", False),
    ],
)
def test_what_a_default_in_place_of_a_deleted_key_may_have_brought_is_known(
    line: str, deleted: str, may: bool
) -> None:
    assert may_come_of(line, [deleted]) is may


def test_applied_values_replace_fields_of_train() -> None:
    values = {"train.epochs": 2, "train.regularization": {"kind": "l1", "strength": 1e-6}}
    train = apply_values(Train(), values)
    assert (train.epochs, train.regularization.kind, train.batch_size) == (2, "l1", 32)


@pytest.mark.parametrize(
    ("domain", "others", "depths"),
    [
        ({"int": [0, 6]}, 20 / 7, [1, 2, 3, 4, 5, 6]),
        ({"choice": [0, 2, "all"]}, 20 / 3, [2, "all"]),
        (None, 20, []),
    ],
)
def test_trials_of_a_search_share_frozen_depths(
    domain: Any, others: float, depths: list[Any]
) -> None:
    space = {"train.learning_rate": {"log_uniform": [1e-5, 1e-3]}}
    space |= {} if domain is None else {"train.frozen_layers": domain}
    search = Search(space=space, trials=21)
    assert (search.others_per_depth, search.trunk_depths) == (others, depths)
