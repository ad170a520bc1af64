"""The shipped experiments resolve: model, data, splits, space and layout, without a search."""

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import optuna
import pytest

from sft_ray.config import Confirm, Experiment
from sft_ray.errors import ConfigError, ResourceError, SftError
from sft_ray.run_store import RunStore, write_experiment, write_results
from sft_ray.search.cluster import connected
from sft_ray.search.confirm import run_confirm
from sft_ray.search.layout import plan_layout
from sft_ray.search.narration import space_lines
from sft_ray.search.planning import run_plan
from sft_ray.search.preflight import check_default_recipe, check_experiment, prepare_experiment
from sft_ray.search.tuner import _open_study, run_search
from tests.models import toy_rows

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SEARCHED_BY_DEFAULT = {
    "train.learning_rate",
    "train.batch_size",
    "train.epochs",
    "train.regularization",
    "train.frozen_layers",
}


def test_the_quickstart_resolves_as_it_is() -> None:
    prepared = prepare_experiment(Experiment.load(EXPERIMENTS / "quickstart.yaml"))
    assert (prepared.model.num_layers, prepared.model.model_type) == (6, "bert")
    assert (len(prepared.dataset.train), len(prepared.dataset.validation)) == (800, 300)
    assert prepared.dataset.label_names[0] == "numpy"
    assert set(prepared.experiment.search.domains) == SEARCHED_BY_DEFAULT
    assert prepared.objective == "accuracy"


def test_local_files_resolve_with_a_default_space_for_the_models_depth(
    tiny_model: Path, toy_csv: Path
) -> None:
    experiment = Experiment.load(
        EXPERIMENTS / "local_files.yaml",
        [f"model={tiny_model}", f"data.train={toy_csv}", "data.columns={}", "data.max_length=32"],
    )
    prepared = prepare_experiment(experiment)
    assert (len(prepared.dataset.train), len(prepared.dataset.validation)) == (280, 60)
    assert prepared.experiment.search.space is not None
    assert prepared.experiment.search.space["train.frozen_layers"] == {"int": [0, 2]}


@pytest.mark.parametrize(
    ("text", "overrides", "fixed"),
    [
        ("{}", [], set()),
        ("{warmup: 0.1}", [], set()),  # is not searched in any case
        ("{epochs: 2}", [], {"epochs"}),
        ("{}", ["train.epochs=3"], {"epochs"}),  # its default, but named
        ("{epochs: 2}", ["train.regularization={kind: none}"], {"epochs", "regularization"}),
        (
            "{learning_rate: 1.0e-4, epochs: 2, frozen_layers: 0}",
            ["train.batch_size=16", "train.regularization={kind: none}"],
            {"learning_rate", "epochs", "frozen_layers", "batch_size", "regularization"},
        ),
    ],
)
def test_what_train_names_is_not_searched_by_default(
    tiny_model: Path, toy_csv: Path, tmp_path: Path, text: str, overrides: list[str], fixed: set
) -> None:
    file = tmp_path / "my.yaml"
    data = f"{{train: {toy_csv}, max_length: 32}}"
    file.write_text(f"name: my\nmodel: {tiny_model}\ndata: {data}\ntrain: {text}\n")
    experiment = Experiment.load(file, overrides)
    resolved = prepare_experiment(experiment).experiment
    assert set(resolved.search.domains) == SEARCHED_BY_DEFAULT - {f"train.{n}" for n in fixed}
    assert resolved.train == experiment.train
    lines = space_lines(resolved)
    assert set(lines) == {"space"}
    names = {part.split()[0] for part in lines["space"].split("; ")}
    if len(fixed) == len(SEARCHED_BY_DEFAULT):
        assert lines["space"] == "nothing"
        for refuses in (run_search, run_plan):
            with pytest.raises(ConfigError, match="`train` names all that is searched by default"):
                refuses(experiment, quiet=True)
        assert not (tmp_path / "runs").exists()
    else:
        assert names == {path.removeprefix("train.") for path in resolved.search.domains}
    # What a run folder keeps names every key of `train`, and the space.
    again = prepare_experiment(Experiment.from_tree(resolved.to_tree())).experiment
    assert again == resolved


def test_what_a_written_space_decides_is_not_taken_from_train(
    experiment: Experiment,
) -> None:
    assert set(space_lines(experiment)) == {"space"}
    tree = experiment.to_tree() | {"train": {"epochs": 2, "batch_size": 8, "warmup": 0.1}}
    tree["search"]["space"] = {"train.epochs": {"int": [1, 4]}, "train.batch_size": 16}
    prepared = prepare_experiment(Experiment.from_tree(tree))
    assert set(prepared.experiment.search.domains) == {"train.epochs", "train.batch_size"}
    assert space_lines(prepared.experiment) == {
        "space": "epochs 1 .. 4 int; batch_size 16",
        "not used": "train.epochs, train.batch_size as written: search.space decides",
    }


def test_sst2_resolves_on_a_local_copy_of_the_same_shape(tiny_model: Path, tmp_path: Path) -> None:
    features = datasets.Features(
        sentence=datasets.Value("string"), label=datasets.ClassLabel(names=["negative", "positive"])
    )
    sizes = {"train": 200, "validation": 40}
    splits = {
        name: datasets.Dataset.from_dict(
            {
                "sentence": [text for text, _ in toy_rows(size, seed=size)],
                "label": [i % 2 for i in range(size)],
            },
            features=features,
        )
        for name, size in sizes.items()
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "glue")
    experiment = Experiment.load(
        EXPERIMENTS / "sst2.yaml",
        [
            f"model={tiny_model}",
            f"data.path={tmp_path / 'glue'}",
            "data.max_length=64",
            "search.space.train.frozen_layers={int: [0, 2]}",
        ],
    )
    prepared = prepare_experiment(experiment)
    assert (len(prepared.dataset.train), len(prepared.dataset.validation)) == (190, 10)
    assert prepared.dataset.label_names == ("negative", "positive")
    layout = plan_layout(experiment, {"CPU": 16, "GPU": 4})
    assert (layout.slots, layout.workers_per_trial, layout.gpus_per_worker) == (4, 1, 1)


@pytest.mark.parametrize("has", [{"CPU": 2}, {"CPU": 16, "GPU": 1}, {"CPU": 64, "GPU": 8}])
@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_experiments_fit_any_machine(path: Path, has: dict[str, float]) -> None:
    layout = plan_layout(Experiment.load(path), has)
    assert layout.slots >= 1
    if path.stem == "sst2":
        assert layout.gpus_per_worker == min(1, has.get("GPU", 0))


@pytest.mark.parametrize("size", [22_000_000, 110_000_000])
def test_the_default_recipe_depends_on_the_size_of_the_encoder(size: int) -> None:
    from sft_ray.recipes import default_recipe

    recipe = default_recipe(size)
    assert recipe["train.learning_rate"] == (1e-4 if size < 50_000_000 else 2e-5)
    assert (recipe["train.epochs"], recipe["train.batch_size"]) == (3, 32)


@pytest.mark.parametrize(
    ("space", "train", "got"),
    [
        (
            {"train.warmup": {"uniform": [0.0, 0.6]}, "train.cooldown": {"uniform": [0.1, 0.5]}},
            {"schedule": "constant_with_cooldown"},
            "0.6 + 0.5",
        ),
        (
            {
                "train.schedule": {"choice": ["linear", "constant_with_cooldown"]},
                "train.warmup": {"uniform": [0.0, 0.7]},
            },
            {"cooldown": 0.4},
            "0.7 + 0.4",
        ),
    ],
)
def test_a_combination_that_cannot_be_trained_is_refused(
    tiny_experiment: Experiment, space: dict[str, Any], train: dict[str, Any], got: str
) -> None:
    tree = tiny_experiment.to_tree()
    tree["search"]["space"] = {"train.learning_rate": {"log_uniform": [1e-4, 1e-2]}, **space}
    with pytest.raises(ConfigError) as caught:
        prepare_experiment(Experiment.from_tree({**tree, "train": train}))
    assert [p for p in caught.value.problems if "not all combinations work" in p and got in p]
    tree["search"]["space"]["train.warmup"] = {"uniform": [0.0, 0.5]}
    prepare_experiment(Experiment.from_tree({**tree, "train": {**train, "schedule": "linear"}}))


@pytest.mark.parametrize(
    "changes", [{"num_attention_heads": 5}, {"num_hidden_layers": "two"}, {"vocab_size": -1}]
)
def test_a_configuration_that_describes_no_model_is_told_in_one_line(
    tiny_experiment: Experiment, tiny_model: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))
    experiment = tiny_experiment.model_copy(update={"model": str(model)})
    with pytest.raises(ConfigError) as caught:
        prepare_experiment(experiment)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith("model: ")


@pytest.mark.ray
def test_what_is_wrong_beside_the_start_of_ray_is_told(ray_cluster: None) -> None:
    def fails() -> None:
        raise ConfigError("model: impossible")

    with pytest.raises(ConfigError, match="impossible"), connected(None, beside=fails):
        pytest.fail("went on")


@pytest.mark.parametrize("fresh", [False, True])
def test_a_second_driver_is_turned_away_before_ray_starts(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, fresh: bool
) -> None:
    monkeypatch.setattr("sft_ray.search.tuner.connected", lambda *_, **__: pytest.fail("started"))
    with (
        RunStore(experiment.storage, experiment.name).locked(),
        pytest.raises(ResourceError, match="another search is running in this folder"),
    ):
        run_search(experiment, quiet=True, fresh=fresh)


@pytest.mark.parametrize("below", ["", "/runs"])
def test_a_storage_that_cannot_be_written_is_told_before_ray_starts(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    monkeypatch.setattr("sft_ray.search.tuner.connected", lambda *_, **__: pytest.fail("started"))
    monkeypatch.setattr("sft_ray.search.planning.measure", lambda *_: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    moved = experiment.model_copy(update={"storage": f"{tmp_path}/file{below}"})
    with pytest.raises(SftError, match="file is no folder that can be written to"):
        run_search(moved, quiet=True)
    with pytest.raises(SftError, match="file is no folder that can be written to"):
        run_plan(moved, quiet=True)


@pytest.mark.parametrize(("shared", "gpus"), [(2, 1), (4, 0.25), ("auto", 0.5)])
def test_a_share_of_a_gpu_is_written_once(experiment: Experiment, shared: Any, gpus: float) -> None:
    tree, has = experiment.to_tree(), {"CPU": 4.0, "GPU": 1.0}
    both = {"trials_per_gpu": shared, "gpus_per_worker": gpus}
    for resources in ({}, {"trials_per_gpu": shared}, {"gpus_per_worker": gpus}):
        check_experiment(Experiment.from_tree({**tree, "resources": resources}), has)
    with pytest.raises(ConfigError) as caught:
        check_experiment(Experiment.from_tree({**tree, "resources": both}), has)
    (line,) = caught.value.problems
    assert line.startswith(f"resources.trials_per_gpu: {shared} goes with gpus_per_worker auto")


@pytest.mark.parametrize(
    ("rungs", "epochs", "found"),
    [([33], 4, 2), ([33], 7, None), ([10, 20, 33], 1, None), ([], 9, 0)],
)
def test_patience_needs_something_to_be_patient_with(
    experiment: Experiment, rungs: list[int], epochs: int, found: int | None
) -> None:
    tree = experiment.to_tree()
    space = {"train.epochs": {"int": [1, epochs]}}
    tree["search"] |= {"pruner": "patient", "rungs": rungs, "space": space}
    if found is None:
        assert prepare_experiment(Experiment.from_tree(tree))
        return
    with pytest.raises(ConfigError, match=rf"three|3 evaluations up to a rung, but got {found} "):
        prepare_experiment(Experiment.from_tree(tree))


def test_the_order_of_a_choice_is_nothing_to_a_patient_pruner(experiment: Experiment) -> None:
    tree = experiment.to_tree()
    space = {"train.epochs": {"choice": [12, 2]}}
    tree["search"] |= {"pruner": "patient", "rungs": [33], "space": space}
    assert prepare_experiment(Experiment.from_tree(tree))


@pytest.mark.parametrize(
    ("search", "line"),
    [
        ({"pruner": "patient", "rungs": [33]}, "patient needs 3 evaluations"),
        ({"sampler": "grid"}, "a grid needs finitely many values"),
    ],
)
def test_what_does_not_go_with_the_default_space_is_told_before_ray_starts(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, search: dict[str, Any], line: str
) -> None:
    monkeypatch.setattr("sft_ray.search.tuner.connected", lambda *_, **__: pytest.fail("started"))
    tree = experiment.to_tree()
    del tree["search"]["space"], tree["train"]  # which would name all that is searched by default
    with pytest.raises(ConfigError, match=line):
        run_search(Experiment.from_tree({**tree, "search": tree["search"] | search}), quiet=True)


def test_a_constant_of_the_space_may_be_enqueued_with_its_value(experiment: Experiment) -> None:
    tree = experiment.to_tree()
    penalty = {"one_of": [{"kind": "l2", "strength": 1e-3}, {"kind": "none"}]}
    space = {"train.epochs": {"int": [1, 3]}, "train.warmup": 0.1, "train.regularization": penalty}
    wanted = {
        "train.epochs": 2,
        "train.warmup": 0.1,
        "train.regularization.kind": "l2",
        "train.regularization.l2.strength": 1e-3,
    }
    tree["search"] |= {"space": space, "enqueue": [wanted]}
    assert prepare_experiment(Experiment.from_tree(tree))
    tree["search"]["enqueue"] = [{**wanted, "train.warmup": 0.2}]
    with pytest.raises(ConfigError, match=r"enqueue.0.train.warmup: the space has 0.1, got 0.2"):
        prepare_experiment(Experiment.from_tree(tree))


def test_a_field_of_a_branch_is_enqueued_with_its_kind(experiment: Experiment) -> None:
    tree, name = experiment.to_tree(), "train.regularization.l2.strength"
    penalty = {"one_of": [{"kind": "l2"}, {"kind": "l2_sp"}]}
    tree["search"] |= {"space": {"train.regularization": penalty}, "enqueue": [{name: 1e-4}]}
    rule = f"enqueue.0.{name}: counts where train.regularization.kind is l2, got"
    with pytest.raises(ConfigError, match=rf"{rule} None; write it too: .*kind: l2, .*: 0.0001"):
        prepare_experiment(Experiment.from_tree(tree))
    tree["search"]["enqueue"][0]["train.regularization.kind"] = "l2_sp"
    with pytest.raises(ConfigError, match=f"{rule} l2_sp"):
        prepare_experiment(Experiment.from_tree(tree))
    tree["search"]["enqueue"][0]["train.regularization.kind"] = "l2"
    assert prepare_experiment(Experiment.from_tree(tree))


def test_a_grid_that_cannot_be_listed_is_refused(experiment: Experiment) -> None:
    tree = experiment.to_tree()
    space = {"train.batch_size": {"int": [1, 1000]}, "train.epochs": {"int": [1, 101]}}
    tree["search"] |= {"sampler": "grid", "space": space}
    with pytest.raises(ConfigError, match="at most 100,000 configurations, got 101,000; write"):
        prepare_experiment(Experiment.from_tree(tree))


def test_whole_numbers_are_enqueued_as_such(experiment: Experiment) -> None:
    tree = experiment.to_tree()
    tree["search"] |= {"space": {"train.epochs": {"int": [1, 3]}}}
    tree["search"]["enqueue"] = [{"train.epochs": 2.0}]
    with pytest.raises(ConfigError, match=r"enqueue.0.train.epochs: .*, got 2.0"):
        prepare_experiment(Experiment.from_tree(tree))


def test_layers_begin_anew_only_where_some_are_trained(experiment: Experiment) -> None:
    tree = experiment.to_tree()
    tree["train"] |= {"frozen_layers": "all"}
    tree["search"]["space"] = {"train.reinit_layers": {"int": [0, 2]}}
    with pytest.raises(ConfigError, match="got up to 2 frozen and 2 re-initialised"):
        prepare_experiment(Experiment.from_tree(tree))


def test_a_study_is_there_with_all_that_is_first_in_line_or_not_at_all(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = [1e-4 * (1 + i) for i in range(12)]
    tree = experiment.to_tree()
    first = [{"train.learning_rate": rate} for rate in rates if rate != 1e-4]
    tree["search"] |= {"enqueue": first, "space": {"train.learning_rate": {"choice": rates}}}
    prepared = prepare_experiment(Experiment.from_tree(tree))
    store, line_up = RunStore(experiment.storage, "grid"), optuna.Study.enqueue_trial
    store.pull_journal()

    def killed_at_the_fifth(study: optuna.Study, *what: Any, **more: Any) -> None:
        if len(study.get_trials()) == 5:
            raise KeyboardInterrupt
        line_up(study, *what, **more)

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "enqueue_trial", killed_at_the_fifth)
        with pytest.raises(KeyboardInterrupt):
            _open_study(prepared, store, 1, [])
    assert not store.journal.exists()
    for _ in range(2):
        study = _open_study(prepared, store, 1, []).study
        assert len(study.get_trials()) == 1 + len(rates) - (1e-4 in rates)
    assert [path.name for path in store.journal.parent.iterdir()] == [store.journal.name]


@pytest.mark.parametrize("changes", [{}, {"default_recipe": False, "confirm": {"top": 1}}])
def test_what_does_not_go_with_the_default_recipe_is_told_before_ray_starts(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.setattr("sft_ray.search.tuner.connected", lambda *_, **__: pytest.fail("started"))
    tree = experiment.to_tree()
    tree["train"] = {"schedule": "constant_with_cooldown", "warmup": 0.05, "cooldown": 0.95}
    tree["search"]["default_recipe"] = changes.get("default_recipe", True)
    refused = Experiment.from_tree({**tree, "confirm": changes.get("confirm")})
    said = (
        "train: does not go with the default recipe, which runs too: warmup and cooldown together "
        "must not exceed 1, got 0.06 + 0.95; lower train.cooldown to 0.94"
    )
    for begin in (run_search, run_plan):
        with pytest.raises(ConfigError) as caught:
            begin(refused, quiet=True)
        assert caught.value.problems == (said,)
    assert not Path(experiment.storage).exists()
    tree["train"]["cooldown"] = 0.94
    check_default_recipe(prepare_experiment(Experiment.from_tree(tree)))


def test_a_search_without_the_default_recipe_may_differ_from_it_until_it_is_confirmed(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = experiment.to_tree()
    tree["train"] = {"schedule": "constant_with_cooldown", "warmup": 0.05, "cooldown": 0.95}
    tree["search"]["default_recipe"] = False
    different = Experiment.from_tree(tree)

    def begins(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sft_ray.search.tuner.connected", begins)
    with pytest.raises(KeyboardInterrupt):
        run_search(different, quiet=True)
    store = RunStore(experiment.storage, experiment.name)
    write_experiment(store, different)
    best = {"trial": 0, "params": {}, "validation": {}}
    write_results(store, {"trials": [], "best": best})
    with pytest.raises(ConfigError, match=r"lower train\.cooldown to 0\.94"):
        run_confirm(store, Confirm(top=1, seeds=2), quiet=True)
