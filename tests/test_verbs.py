"""`train`, `evaluate` and `predict` as a user calls them, on tiny models."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from sft_ray import cli, single_trial
from sft_ray.analysis.results import SearchResult
from sft_ray.config import Experiment
from sft_ray.errors import ConfigError, DataError, ResourceError, TrialError
from sft_ray.run_store import RunStore, damaged_files, open_run
from sft_ray.screen import Screen
from sft_ray.search.mending import winner_back
from sft_ray.search.tuner import run_search
from sft_ray.serving.evaluate import record_test, run_evaluation, score_split
from sft_ray.serving.predict import Predictor, load_predictor, read_rows
from sft_ray.serving.samples import sample_rows
from sft_ray.serving.verify import run_verification
from sft_ray.single_trial import run_training
from sft_ray.training import fitting as fit_module
from sft_ray.training.preparation import prepare_training
from sft_ray.training.resume_state import ResumeState
from sft_ray.training.tasks import TASKS, find_task
from tests.models import (
    WIDE_VOCABULARY,
    dataset_of,
    load_tiny,
    save_tiny,
    task_rows,
    tiny_model_folder,
    toy_dataset,
    toy_rows,
    write_csv,
)

ARGUMENTS = {"learning_rate": 5e-3, "epochs": 2, "dropout": 0.1, "precision": "fp32"}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make(tmp_path: Path, tiny_model: Path, toy_csv: Path) -> Any:
    """A small experiment; keywords replace sections of its tree."""

    def make(**tree: Any) -> Experiment:
        return Experiment.from_tree(
            {
                "name": "single",
                "model": str(tiny_model),
                "data": {
                    "train": str(toy_csv),
                    "split": {"validation": 0.2, "test": 0.1},
                    "max_length": 32,
                },
                "train": ARGUMENTS,
                "search": {"rungs": [10, 33]},
                "storage": str(tmp_path / "runs"),
                **tree,
            }
        )

    return make


def test_training_leaves_a_run_like_a_search_and_the_same_command_shows_it(make, capsys) -> None:
    result = run_training(make())
    run = Path(result.location)
    assert {f.name for f in run.iterdir()} - {".lock"} == {
        "best",
        "checksums.json",
        "environment.json",
        "experiment.yaml",
        "experiment.yaml.good",
        "predictions.parquet",
        "results.json",
        "trials",
    }
    (trial,) = result.trials
    assert (trial["number"], trial["state"], trial["role"]) == (0, "COMPLETE", "single")
    assert trial["params"]["train.learning_rate"] == 5e-3
    assert trial["params"]["train.dropout"] == 0.1
    assert [percent for percent, _ in trial["curve"]] == [10, 33, 50, 100]
    assert result.best["validation"]["accuracy"] == max(v for _, v in trial["curve"])
    assert result.best["gain_over_default"] is None
    seconds = trial["train_seconds"] + trial["eval_seconds"] + trial["overhead_seconds"]
    assert result.tree["wall_seconds"] == pytest.approx(seconds)
    first = capsys.readouterr().out
    assert "always the same answer scores accuracy" in first
    assert "% of what training computed" in first
    again = run_training(make())
    assert again.tree == result.tree
    assert "is finished" in capsys.readouterr().out


def test_a_budget_that_has_grown_trains_nothing_anew(make, capsys, monkeypatch) -> None:
    result = run_training(make())
    run = Path(result.location)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    monkeypatch.setattr(single_trial, "fit", lambda *_, **__: pytest.fail("trained anew"))
    capsys.readouterr()
    assert run_training(make(search={"rungs": [10, 33], "trials": 64})).tree == result.tree
    assert "is finished; its outcome" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_the_run_folder_keeps_its_rules(make) -> None:
    run_training(make(), quiet=True)
    with pytest.raises(ConfigError, match=r"train\.epochs is 2 there and 1 here"):
        run_training(make(train={**ARGUMENTS, "epochs": 1}), quiet=True)
    other = run_training(make(train={**ARGUMENTS, "epochs": 1}), fresh=True, quiet=True)
    assert Path(f"{other.location}.old-1/results.json").is_file()


def test_an_interrupted_training_goes_on_as_if_it_had_not_stopped(make, monkeypatch) -> None:
    straight = run_training(make(name="straight"), quiet=True)
    often = make(name="interrupted", checkpoint={"every_minutes": 1e-6})
    honest = fit_module.Trial.take_step

    def interrupt(trial: Any, indices: Any) -> Any:
        if trial.step == 8:
            raise KeyboardInterrupt
        return honest(trial, indices)

    monkeypatch.setattr(fit_module.Trial, "take_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_training(often, quiet=True)
    steps: list[int] = []
    monkeypatch.setattr(
        fit_module.Trial,
        "take_step",
        lambda trial, indices: steps.append(trial.step) or honest(trial, indices),
    )
    result = run_training(often, quiet=True)
    assert steps[0] > 0
    assert result.trials[0]["curve"] == straight.trials[0]["curve"]
    assert result.best["validation"] == straight.best["validation"]
    weights = [Path(r.location, "best/model.safetensors").read_bytes() for r in (straight, result)]
    assert weights[0] == weights[1]
    lines = Path(result.location, "trials/0/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [0, 1, 2, 3]
    assert not Path(result.location, "trials/0/last").exists()


def test_a_training_does_not_go_on_with_other_data(
    make, monkeypatch, toy_csv: Path, tmp_path: Path
) -> None:
    data = tmp_path / "mine.csv"
    shutil.copy(toy_csv, data)
    sections = {"data": {"train": str(data), "split": {"validation": 0.2}, "max_length": 32}}
    often = make(**sections, checkpoint={"every_minutes": 1e-6})
    honest = fit_module.Trial.take_step

    def interrupt(trial: Any, indices: Any) -> Any:
        if trial.step == 8:
            raise KeyboardInterrupt
        return honest(trial, indices)

    with monkeypatch.context() as patched:
        patched.setattr(fit_module.Trial, "take_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_training(often, quiet=True)
    write_csv(data, toy_rows(300, seed=8))
    environment = tmp_path / "runs/single/environment.json"
    before = environment.read_text()
    with pytest.raises(ConfigError, match=r"was made from other data .* another name=…"):
        run_training(often, quiet=True)
    assert environment.read_text() == before
    environment.write_text("{")  # says nothing; what it said is written anew
    shutil.copy(toy_csv, data)
    assert run_training(often, quiet=True).best["complete"]
    write_csv(data, toy_rows(300, seed=8))
    with pytest.raises(ConfigError, match="was made from other data"):
        run_training(often, quiet=True)
    assert run_training(often, fresh=True, quiet=True).best["complete"]


def test_a_training_does_not_go_on_from_another_model(make, tiny_model: Path, tmp_path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    file = base / "model.safetensors"
    experiment = make(model=str(base))
    assert run_training(experiment, quiet=True).best["complete"]
    whole, weights = file.read_bytes(), load_file(file)
    save_file({name: tensor + 0.01 for name, tensor in weights.items()}, file)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}
    with pytest.raises(ConfigError, match=r"model: .* was made from another model .* name=…"):
        run_training(experiment, quiet=True)
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}
    file.write_bytes(whole)
    assert run_training(experiment, quiet=True).best["complete"]


def test_a_run_that_goes_on_elsewhere_keeps_what_it_was_made_with(make, tmp_path: Path) -> None:
    experiment = make()
    run_training(experiment, quiet=True)
    folder = tmp_path / "runs/single"
    (folder / "results.json").unlink()  # so that it is made anew
    told = json.loads((folder / "environment.json").read_text())
    assert "earlier" not in told
    then = {**told, "python": "2.7", "packages": {**told["packages"], "torch": "0.4"}}
    (folder / "environment.json").write_text(json.dumps(then))
    tree = run_training(experiment, quiet=True).tree
    earlier = {"python": "2.7", "packages": then["packages"]}
    assert tree["environment"] == {**told, "earlier": [earlier]}
    (found,) = [check for check in run_verification(str(folder)).checks if check.name == "versions"]
    assert found.ok is None
    assert "torch 0.4 in an earlier session" in found.found


def test_a_training_whose_run_was_taken_over_writes_no_more(make, monkeypatch) -> None:
    def taken(store: RunStore) -> bool:
        return (Path(store.location) / "trials/0/metrics.jsonl").exists()

    monkeypatch.setattr(RunStore, "is_taken_over", property(taken))
    with pytest.raises(ResourceError, match="another driver has taken the run over"):
        run_training(make(), quiet=True)
    run = Path(make().storage) / "single"
    assert len((run / "trials/0/metrics.jsonl").read_text().splitlines()) == 1
    assert not (run / "results.json").exists()


def test_a_run_that_was_moved_says_where_its_model_is(run: Path, tmp_path: Path) -> None:
    run.rename(tmp_path / "elsewhere")
    result = SearchResult.load(str(tmp_path / "elsewhere"))
    assert result.checkpoint == str(tmp_path / "elsewhere/best")
    assert load_predictor(result.checkpoint).predict([{"text": "one cat"}])


def test_a_winner_that_only_best_has_comes_back_to_its_trial(run: Path) -> None:
    store = open_run(str(run))
    [line] = winner_back(store, damaged_files(store))
    assert line == "trials/0/best was gone; it comes back from best/"
    assert store.is_intact("trials/0/best")
    for name in ("model.safetensors", "predictions.parquet"):
        before = run / ("best" if name.startswith("model") else ".") / name
        assert (run / "trials/0/best" / name).read_bytes() == before.read_bytes()
    assert winner_back(store, damaged_files(store)) == []
    shutil.rmtree(run / "trials/0/best")
    model = run / "best/model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    assert winner_back(store, damaged_files(store)) == []


def test_a_search_and_a_training_do_not_take_each_other_for_their_own(make, run: Path) -> None:
    experiment = make()
    with pytest.raises(ConfigError, match=r"was made by `sft-ray train`; choose another name=…"):
        run_search(experiment, quiet=True)
    environment = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps({**environment, "slots": 2}))
    with pytest.raises(ConfigError, match="was made by `sft-ray search`"):
        run_training(experiment, quiet=True)


def test_a_model_without_all_its_weights_leaves_no_run(make, tiny_model: Path, tmp_path) -> None:
    folder = tmp_path / "shards"
    AutoModelForSequenceClassification.from_pretrained(tiny_model).save_pretrained(
        folder, max_shard_size="10KB"
    )
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    experiment = make(model=str(folder))
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    content = shards[1].read_bytes()
    shards[1].unlink()
    with pytest.raises(ConfigError, match=f"has no {shards[1].name}; a model folder holds all"):
        run_training(experiment, quiet=True)
    assert not Path(experiment.storage).exists()
    shards[1].write_bytes(content)
    assert run_training(experiment, quiet=True).best["complete"]


def test_a_model_without_a_vocabulary_is_refused(make, tiny_model: Path, tmp_path) -> None:
    folder = tmp_path / "bare"
    AutoModelForSequenceClassification.from_pretrained(tiny_model).save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"has no vocabulary .*; save the tokenizer beside"):
        run_training(make(model=str(folder)), quiet=True)


def test_test_is_proposed_only_where_there_is_one(make, tmp_path: Path, capsys) -> None:
    run_training(make())
    assert "--split test" in capsys.readouterr().out
    data = {**make().to_tree()["data"], "split": {"validation": 0.2}}
    rows = [{"text": text, "label": int(label == "plant")} for text, label in toy_rows(60)]
    hidden = [{**row, "label": -1} for row in rows]
    parts = {"train": rows, "validation": rows[:20], "test": hidden}
    for name, splits in (("alone", ["train", "validation"]), ("hidden", list(parts))):
        found = {split: datasets.Dataset.from_list(parts[split]) for split in splits}
        datasets.DatasetDict(found).save_to_disk(tmp_path / name)
        run_training(make(name=name, data={"path": str(tmp_path / name), "max_length": 64}))
        assert "--split test" not in capsys.readouterr().out
    run_training(make(name="without", data=data))
    assert "--split test" not in capsys.readouterr().out


def test_a_step_without_memory_is_tried_with_half(make, monkeypatch, capsys) -> None:
    honest = fit_module.Trial.take_step

    def refuse(trial: Any, indices: Any) -> Any:
        if trial.backward.most > 8:
            raise MemoryError
        return honest(trial, indices)

    monkeypatch.setattr(fit_module.Trial, "take_step", refuse)
    result = run_training(make(train={**ARGUMENTS, "micro_batch": 32}))
    assert result.trials[0]["micro_batch"] == 8
    assert capsys.readouterr().out.count("out of memory; going on with") == 2


def test_a_configuration_that_diverges_keeps_what_it_had(make) -> None:
    wild = {
        "precision": "fp32",
        "learning_rate": 1.0,
        "epochs": 3,
        "warmup": 0.9,
        "optimizer": "sgd",
    }
    wild |= {"max_grad_norm": 1e30, "regularization": {"kind": "l2", "strength": 999.0}}
    result = run_training(make(train=wild), quiet=True)
    assert "not finite" in result.trials[0]["reason"]
    assert result.best["complete"] is False
    assert result.trials[0]["schedule_percent"] < 100
    none = make(name="none", train={**wild, "warmup": 0.0}, search={"rungs": []})
    with pytest.raises(TrialError, match="nothing was evaluated before"):
        run_training(none, quiet=True)


@pytest.fixture
def run(make) -> Path:
    return Path(run_training(make(), quiet=True).location)


def test_the_winner_scores_again_what_was_reported(run: Path) -> None:
    reported = json.loads((run / "results.json").read_text())["best"]["validation"]
    for place in (run, run / "best"):
        found = run_evaluation(str(place), "validation")
        assert found.metrics == pytest.approx(reported, abs=1e-6)
    assert not (run / "test_access.jsonl").exists()


def test_every_scoring_of_the_test_split_is_recorded(run: Path, capsys) -> None:
    for _ in range(2):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["evaluate", str(run), "--split", "test"])
        assert not exit_.value.code
    assert "test_access.jsonl" in capsys.readouterr().out
    first, second = map(json.loads, (run / "test_access.jsonl").read_text().splitlines())
    assert first["metrics"] == second["metrics"]
    assert first["num_examples"] > 10
    assert 0 < first["metrics"]["accuracy"] < 1


def test_a_card_that_is_written_anew_says_how_often_the_test_split_was_scored(
    run: Path, make
) -> None:
    def card() -> str:
        return " ".join((run / "best" / "README.md").read_text().split())

    assert "the test split had not been scored when this card was written" in card()
    for _ in range(2):
        record_test(RunStore(str(run.parent), run.name), str(run), {"accuracy": 0.5}, 40)
    (run / "environment.json").write_text("{}")  # damaged, and the trial is there
    run_training(make(), quiet=True)
    assert "the test split was scored 2 times in this run" in card()


def test_a_scoring_is_recorded_in_its_run_wherever_it_is_called(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = run / "test_access.jsonl"
    for count, (folder, place) in enumerate(
        [(run / "best", "."), (run, "best"), (run, "."), (run / "trials", "..")], start=1
    ):
        monkeypatch.chdir(folder)
        assert run_evaluation(place, "test").recorded_in == str(record)
        assert len(record.read_text().splitlines()) == count
    (run / "best").rename(run.parent / "moved")
    (run / "best").symlink_to(run.parent / "moved")
    assert run_evaluation("../best", "test").recorded_in == str(record)
    assert not [path for path in run.parent.rglob("test_access.jsonl") if path != record]


def test_a_model_from_elsewhere_is_scored_on_a_named_experiment(run: Path, tmp_path, make) -> None:
    elsewhere = tmp_path / "elsewhere"
    (run / "best").rename(elsewhere)
    with pytest.raises(ConfigError, match="--experiment FILE"):
        run_evaluation(str(elsewhere), "test")
    file = str(run / "experiment.yaml")
    found = run_evaluation(str(elsewhere), "test", file)
    assert found.recorded_in == str(run / "test_access.jsonl")
    (elsewhere / "sft_ray.json").unlink()  # the head says what task it is
    assert run_evaluation(str(elsewhere), "test", file).metrics == found.metrics


def test_what_cannot_be_scored_is_refused(run: Path, make, tmp_path: Path, tiny_model) -> None:
    with pytest.raises(ConfigError, match="validation or test, got 'train'"):
        run_evaluation(str(run), "train")
    rows = [(text, -1) for text, _ in toy_rows(12)]
    tree = make().to_tree()
    tree["data"] |= {"test": str(write_csv(tmp_path / "hidden.csv", rows)), "split": None}
    tree["data"]["validation"] = tree["data"]["train"]
    hidden = Experiment.from_tree({**tree, "name": "hidden"})
    (tmp_path / "hidden.yaml").write_text(json.dumps(hidden.to_tree()))
    with pytest.raises(DataError, match="test split is unlabelled"):
        run_evaluation(str(run / "best"), "test", str(tmp_path / "hidden.yaml"))
    assert not list(tmp_path.rglob("test_access.jsonl"))
    with pytest.raises(ConfigError, match="no head for a task"):
        load_predictor(str(tiny_model))


@pytest.fixture
def unlearned(tmp_path: Path, tiny_model: Path) -> Predictor:
    """The tiny model with a head, as it was begun."""
    dataset = toy_dataset(tmp_path, tiny_model, train=30, validation=20)
    (tmp_path / "mine").mkdir()
    save_tiny(tmp_path / "mine", tiny_model, load_tiny(tiny_model, dataset), dataset, {})
    return load_predictor(str(tmp_path / "mine"))


def test_a_test_split_that_the_data_set_has_is_scored(make, tmp_path, unlearned) -> None:
    rows = [{"text": text, "label": label} for text, label in toy_rows(40)]
    parts = {
        "train": datasets.Dataset.from_list(rows),
        "test": datasets.Dataset.from_list(rows[:15]),
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    experiment = make(
        data={"path": str(tmp_path / "saved"), "split": {"validation": 0.2}, "max_length": 64}
    )
    assert prepare_training(experiment).dataset.test_split == "labelled"
    assert score_split(unlearned, experiment, "test")[1] == 15
    assert score_split(unlearned, experiment, "validation")[1] == 8


def test_a_test_split_that_the_experiment_does_not_name_is_scored_if_asked_for(
    make, tmp_path: Path, unlearned: Predictor, monkeypatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "files").mkdir()
    write_csv(tmp_path / "files" / "train.csv", toy_rows(40))
    write_csv(tmp_path / "files" / "test.csv", toy_rows(15))
    splits = {"train": "train[:80%]", "validation": "train[80%:]"}
    experiment = make(data={"path": str(tmp_path / "files"), "splits": splits, "max_length": 64})
    assert prepare_training(experiment).dataset.test_split == "none"
    assert score_split(unlearned, experiment, "test")[1] == 15


def test_what_is_taken_up_counts_its_seconds_once_and_writes_its_own_best_weights(
    make, tmp_path: Path
) -> None:
    store = RunStore(str(tmp_path), "single")
    run = single_trial._Run(prepare_training(make()), None, store, Screen(quiet=True))
    facts = {"messages": [], "best": {"percent": 10}, "seconds_before": 100.0, "step": 3}
    run.last = SimpleNamespace(load=lambda: ResumeState({}, facts))
    run._saved_percent, run._began = 10, run._began - 100
    run._take_up()
    assert 100 <= run._seconds() < 150
    assert run._saved_percent is None


def predictions(model: Path, lines: list[str]) -> list[dict[str, Any]]:
    predictor = load_predictor(str(model))
    return list(predictor.predict(read_rows(lines, predictor.task)))


def test_answers_come_in_order_and_agree_with_transformers(run: Path, monkeypatch) -> None:
    monkeypatch.setattr("sft_ray.serving.predict.ROWS_AT_ONCE", 7)
    texts = [text for text, _ in toy_rows(40, seed=6)]
    found = predictions(run, [f"{text}\n" for text in texts])
    classify = pipeline("text-classification", str(run / "best"))
    for mine, theirs in zip(found, classify(texts, truncation=True, max_length=32), strict=True):
        assert mine["label"] == theirs["label"]
        assert mine["probability"] == pytest.approx(theirs["score"], abs=1e-5)
    as_json = predictions(run, [json.dumps({"text": text}) for text in texts])
    assert as_json == found


def test_the_command_reads_lines_and_writes_json_lines(run: Path, monkeypatch, capsys) -> None:
    lines = io.BytesIO("\ufeffthe old cat\nan oak\n".encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(lines, encoding="latin1"))
    with pytest.raises(SystemExit) as exit_:
        cli.main(["predict", str(run)])
    assert not exit_.value.code
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines] == predictions(run, ["the old cat", "an oak"])


@pytest.mark.parametrize(
    ("lines", "fragment"),
    [
        (["a cat", ""], "line 2: is empty"),
        (['{"text": "a cat"}', '{"text": '], "line 2: is no JSON"),
        (['{"text": "a cat"}', "[1]"], "line 2: must be a JSON object"),
        (["a cat", '{"text": "a cat"}'], "line 2: is JSON behind plain text"),
        (['{"body": "a cat"}'], "input 1: text-classification needs 'text'"),
        (['{"text": 3}'], "input 1: column 'text' must hold texts, got int64"),
        (['{"text": "a"}', '{"text": 3}'], "input 2: column 'text' must hold texts, got int64"),
        (['{"text": "a"}', '{"text": [1, "b"]}'], "input 2: column 'text' holds values of no one"),
        (['{"text": "a"}', '{"text": null}'], "input 2: column 'text' is empty; fill it"),
        (['{"text": "a"}', '{"text": " "}'], "input 2: column 'text' is empty; fill or remove it"),
    ],
)
def test_bad_inputs_are_named(run: Path, lines: list[str], fragment: str) -> None:
    with pytest.raises(DataError) as refusal:
        predictions(run, lines)
    assert fragment in str(refusal.value)


def test_plain_texts_may_have_braces() -> None:
    texts = ["a cat", "{an oak", '{"tree": "an oak"}', "{}"]
    rows = read_rows(texts, find_task("text-classification"))
    assert [row["text"] for row in rows] == texts


def test_a_name_beside_other_runs_is_no_model_of_the_hub(run: Path) -> None:
    """Asking there takes half a minute where it cannot be reached."""
    with pytest.raises(ConfigError, match=r"nope: no such folder; name a run, a model folder or"):
        load_predictor(str(run.parent / "nope"))


@pytest.mark.parametrize(
    ("task", "optional", "row"),
    [
        ("text-classification", "text_pair", {"text": "one cat", "text_pair": "an oak"}),
        ("token-classification", "predicate", {"tokens": ["one", "cat"], "predicate": 1}),
    ],
)
def test_inputs_have_the_fields_of_training(
    task: str, optional: str, row: dict[str, Any], tmp_path: Path
) -> None:
    base = tiny_model_folder(tmp_path / "base", vocabulary=WIDE_VOCABULARY)
    rows = task_rows(task, 20)
    whole = [{**r, optional: row[optional]} for r in rows]
    plain = {name: value for name, value in row.items() if name != optional}

    def model_of(name: str, rows: list[dict[str, Any]]) -> Predictor:
        dataset = dataset_of(tmp_path / f"{name}-data", task, base, rows)
        pretrained = load_tiny(base, dataset, task=TASKS[task])
        save_tiny(tmp_path / name, base, pretrained, dataset, {}, TASKS[task])
        return load_predictor(str(tmp_path / name))

    with_it, without = model_of("with", whole), model_of("without", rows)
    for predictor, fitting in ((with_it, row), (without, plain)):
        assert len(list(predictor.predict([dict(fitting)]))) == 1
        assert predictor.checked(sample_rows(TASKS[task], 3, predictor.optional)).num_rows == 3
    wanted = f"input 1: the model was trained with {', '.join(row)}, got no '{optional}'"
    with pytest.raises(DataError, match=wanted):
        next(with_it.predict([dict(plain)]))
    with pytest.raises(DataError, match=f"trained without '{optional}'; leave it out"):
        next(without.predict([dict(row)]))
    facts = tmp_path / "with/sft_ray.json"
    tree = json.loads(facts.read_text())
    assert tree.pop("inputs") == [optional]
    facts.write_text(json.dumps(tree))  # as it was written before
    assert len(list(load_predictor(str(tmp_path / "with")).predict([plain]))) == 1


def test_the_predictions_of_the_winner_are_kept(run: Path) -> None:
    table = pq.read_table(run / "predictions.parquet")
    reported = json.loads((run / "results.json").read_text())["best"]["validation"]["accuracy"]
    labels, answers = (table.column(c).to_pylist() for c in ("label", "predicted_label"))
    right = sum(a == b for a, b in zip(labels, answers, strict=True))
    assert right / len(labels) == pytest.approx(reported)
    assert table.column("text")[0].as_py()


@pytest.mark.parametrize(
    "change", [{"train": {**ARGUMENTS, "precision": "bf16"}}, {"data": {"max_length": 80}}]
)
def test_a_model_is_scored_the_way_it_was_trained(make, toy_csv: Path, change: Any) -> None:
    tree = make().to_tree()
    for section, values in change.items():
        tree[section] |= values
    result = run_training(Experiment.from_tree(tree), quiet=True)
    found = run_evaluation(result.location, "validation").metrics
    assert found == pytest.approx(result.best["validation"], abs=1e-6)


def test_marks_of_an_attempt_that_ran_out_of_memory_are_not_kept(make, monkeypatch) -> None:
    honest = fit_module.Trial.take_step

    def refuse(trial: Any, indices: Any) -> Any:
        if trial.step == 8 and trial.backward.most > 8:
            raise MemoryError
        return honest(trial, indices)

    monkeypatch.setattr(fit_module.Trial, "take_step", refuse)
    result = run_training(make(), quiet=True)
    lines = Path(result.location, "trials/0/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["percent"] for line in lines] == [10, 33, 50, 100]
    found = run_evaluation(result.location, "validation").metrics
    assert found == pytest.approx(result.best["validation"], abs=1e-6)


@pytest.mark.parametrize("value", ['"a \\ud83d"', str(2**70), "[" * 100_000])
def test_odd_inputs_are_refused_in_a_line(run: Path, value: str) -> None:
    line = '{"text": ' + value + "}"
    with pytest.raises(DataError):
        predictions(run, [line])


@pytest.mark.parametrize("name", ["results.json", "checksums.json", "environment.json"])
def test_a_damaged_outcome_of_a_training_is_written_anew(make, capsys, name: str) -> None:
    experiment = make()
    first = run_training(experiment, quiet=True)
    path = Path(first.location, name)
    path.write_bytes(path.read_bytes()[:20])
    weights = Path(first.location, "best/model.safetensors").stat().st_mtime_ns
    again = run_training(experiment)
    assert f"{name} was damaged; it is written anew" in capsys.readouterr().out
    assert again.best == first.best
    assert again.trials == first.trials
    assert Path(first.location, "best/model.safetensors").stat().st_mtime_ns == weights
    Path(first.location, "best/model.safetensors").write_bytes(b"")
    last = run_training(experiment)
    assert "best/model.safetensors was damaged; nothing else holds it" in capsys.readouterr().out
    assert last.best["validation"] == first.best["validation"]


@pytest.mark.parametrize(
    "facts", [{"max_length": "128"}, {"max_length": -5}, {"max_length": True}, {"doc_stride": 1.5}]
)
def test_facts_beside_a_model_that_cannot_be_are_one_line(
    run: Path, tmp_path: Path, facts: dict[str, Any]
) -> None:
    folder = shutil.copytree(run / "best", tmp_path / "model")
    (folder / "sft_ray.json").write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match=f"{next(iter(facts))} must be a whole number from"):
        load_predictor(str(folder))


def test_a_model_from_elsewhere_with_one_output_answers_a_number(tmp_path: Path) -> None:
    base = tiny_model_folder(tmp_path / "base", "roberta", max_position_embeddings=20)
    folder = tmp_path / "reranker"
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    predictor = load_predictor(str(folder))
    assert predictor.task.name == "regression"
    assert predictor.encoder.max_length == 18  # two positions are the padding token's
    (answer,) = predictor.predict([{"text": "cat " * 50}])
    assert isinstance(answer["value"], float)
