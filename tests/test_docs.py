"""What the pages of docs/ show is what works."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import optuna
import pytest
import typer

from sft_ray import space as spaces
from sft_ray.ablation_file import Ablation
from sft_ray.cli import app
from sft_ray.config import COSTS, Checkpoint, Confirm, Experiment, Search, Train, Watchdog
from sft_ray.recipes import RECIPES, default_recipe
from sft_ray.search.preflight import prepare_experiment
from sft_ray.search.study import SearchStudy
from sft_ray.single_trial import run_training
from sft_ray.space import FROZEN_LAYERS
from sft_ray.training.files import read_file
from sft_ray.training.preparation import prepare_training
from sft_ray.training.tasks import TASKS
from sft_ray.yaml_text import parse_yaml

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "tasks.md").read_text(encoding="utf-8")
SEARCH_PAGE = (DOCS / "search.md").read_text(encoding="utf-8")
README = (DOCS.parent / "README.md").read_text(encoding="utf-8")
REPORT_PAGE = (DOCS / "report.md").read_text(encoding="utf-8")
CLUSTERS_PAGE = (DOCS / "clusters.md").read_text(encoding="utf-8")
RESEARCH_PAGE = (DOCS / "research.md").read_text(encoding="utf-8")


def blocks_of(page: str) -> list[tuple[str, str]]:
    """Language and body of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


BLOCKS = blocks_of(PAGE)
SEARCHES = [
    parse_yaml(body, "docs/search.md")
    for language, body in blocks_of(SEARCH_PAGE)
    if language == "yaml"
]


def examples() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every data snippet with the experiment that follows it."""
    lines = ""
    for language, body in BLOCKS:
        if language == "jsonl":
            lines = body
        elif language == "yaml":
            yield lines, parse_yaml(body, "docs/tasks.md")


EXAMPLES = list(examples())


def prepared(folder: Path, model: Path, lines: str, tree: dict[str, Any]) -> Experiment:
    """The documented experiment over its documented rows, with a tiny model."""
    data = folder / tree["data"]["train"]
    many = (lines.replace('"query": 1', f'"query": {i}') for i in range(15))
    data.write_text("".join(many), encoding="utf-8")
    tree["data"] |= {"train": str(data), "max_length": 64}
    storage = str(folder / "runs")
    return Experiment.from_tree({**tree, "model": str(model), "storage": storage})


@pytest.mark.parametrize("example", EXAMPLES, ids=[tree["name"] for _, tree in EXAMPLES])
def test_every_documented_experiment_can_be_prepared(example, tmp_path, tiny_model) -> None:
    lines, tree = example
    experiment = prepared(tmp_path, tiny_model, lines, tree)
    assert len(prepare_training(experiment).dataset.train) > 10


def test_every_task_is_documented_with_its_metrics() -> None:
    assert {tree["task"] for _, tree in EXAMPLES} == set(TASKS)
    for name, task in TASKS.items():
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{name}`"))
        assert row.split("|")[4].strip() == ", ".join(task.metrics)


def test_every_setting_of_train_is_documented() -> None:
    table = PAGE[PAGE.index("## Settings of `train`") :]
    missing = [name for name in Train.model_fields if f"`{name}`" not in table]
    assert missing == ["learning_rate", "epochs"]


def test_the_python_of_the_page_runs(tmp_path: Path, tiny_model: Path, monkeypatch, capsys) -> None:
    lines, tree = EXAMPLES[0]
    experiment = prepared(tmp_path, tiny_model, lines, tree)
    (tmp_path / "reviews.yaml").write_text(experiment.model_dump_json(), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    Path("wide.csv").write_text("text,bug,design\nships,1,1\nthank you,0,0\n", encoding="utf-8")
    scripts = [body for language, body in BLOCKS if language == "python"]
    assert len(scripts) == 3
    for script in scripts:
        exec(script, {})
    assert "'probability'" in capsys.readouterr().out
    found = read_file("issues.jsonl").to_pylist()
    assert found == [
        {"text": "ships", "labels": ["bug", "design"]},
        {"text": "thank you", "labels": []},
    ]


@pytest.mark.parametrize("tree", SEARCHES, ids=[tree["name"] for tree in SEARCHES])
def test_every_documented_search_resolves(tree, tmp_path, tiny_model) -> None:
    storage = str(tmp_path / "runs")
    if "space" in tree["search"]:
        of_two_layers = {"train.reinit_layers": {"int": [0, 1]}, FROZEN_LAYERS: {"int": [0, 1]}}
        tree = {**tree, "search": {"space": tree["search"]["space"] | of_two_layers}}
    data = {**tree["data"], "max_length": 64, "limit": {"train": 60, "validation": 30}}
    tree = {**tree, "model": str(tiny_model), "data": data, "storage": storage}
    prepared = prepare_experiment(Experiment.from_tree(tree))
    study = SearchStudy(
        prepared.experiment,
        optuna.storages.InMemoryStorage(),
        recipe=default_recipe(prepared.model.layer_parameters),
        num_layers=6,
        direction=prepared.direction,
    )
    first, second = study.next_trial(), study.next_trial()
    assert first is not None
    assert second is not None
    assert first.train.learning_rate == 1e-4


def test_the_documented_default_space_is_that_of_the_code() -> None:
    (tree,) = [tree for tree in SEARCHES if tree["name"] == "default-space"]
    default = spaces.default_space(12, RECIPES["bert"])
    assert spaces.parse_space(tree["search"]["space"]) == spaces.parse_space(default)


def test_the_documented_recipes_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| (\S+) to (\S+) \| ([\d to]+) \|", SEARCH_PAGE, re.M)
    found = {
        name: ((float(low), float(high)), [int(n) for n in epochs.split(" to ")])
        for name, low, high, epochs in rows
    }
    assert found == {
        name: (recipe.learning_rates, sorted(set(recipe.epochs)))
        for name, recipe in RECIPES.items()
    }


def test_every_sampler_pruner_and_cost_is_documented() -> None:
    named = [*COSTS, *get_args(Search.model_fields["sampler"].annotation)]
    named += get_args(Search.model_fields["pruner"].annotation)
    assert [name for name in named if f"`{name}`" not in SEARCH_PAGE] == []


def test_the_python_of_the_search_page_runs(capsys) -> None:
    (script,) = [body for language, body in blocks_of(SEARCH_PAGE) if language == "python"]
    exec(script, {})
    assert "He et al. 2021" in capsys.readouterr().out


def test_the_yaml_of_the_research_page_is_accepted() -> None:
    trees = [
        parse_yaml(body, "docs/research.md")
        for language, body in blocks_of(RESEARCH_PAGE)
        if language == "yaml"
    ]
    ablations = [Ablation.model_validate(tree) for tree in trees if "base" in tree]
    experiments = [Experiment.from_tree(tree) for tree in trees if "base" not in tree]
    assert [a.name for a in ablations] == ["depth-and-rate"]
    assert len(ablations[0].changes(Train(), num_layers=12)) == 13 * 2 + 1
    assert [e.confirm for e in experiments] == [Confirm(top=3, seeds=5)]


def test_the_commands_of_the_pages_exist_and_take_what_is_shown() -> None:
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    shown = [
        shlex.split(line.split(" < ")[0], comments=True)[1:]
        for page in (RESEARCH_PAGE, REPORT_PAGE, CLUSTERS_PAGE, README)
        for language, body in blocks_of(page)
        for line in body.splitlines()
        if not language and line.startswith("sft-ray ")
    ]
    assert {words[0] for words in shown} >= {
        "plan",
        "confirm",
        "ablate",
        "verify",
        "replay",
        "results",
        "report",
        "doctor",
    }
    for verb, *arguments in shown:
        with verbs[verb].make_context(verb, list(arguments)) as context:
            assert not context.args, (verb, arguments)


def test_the_python_of_the_research_page_runs(
    tmp_path: Path, tiny_experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a run without Ray, whose study is not there, all but the line about the study."""
    run_training(
        tiny_experiment.model_copy(update={"name": "my", "storage": str(tmp_path / "runs")}),
        quiet=True,
    )
    monkeypatch.chdir(tmp_path)
    [python] = [body for language, body in blocks_of(RESEARCH_PAGE) if language == "python"]
    lines = [line for line in python.splitlines() if "result.study" not in line]
    assert len(lines) == len(python.splitlines()) - 1
    exec("\n".join(lines), {})


def test_the_python_of_the_report_page_runs(
    tmp_path: Path, tiny_experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = str(tmp_path / "runs")
    named = tiny_experiment.model_copy(update={"name": "my", "storage": storage})
    run_training(named, quiet=True)
    monkeypatch.chdir(tmp_path)
    [python] = [body for language, body in blocks_of(REPORT_PAGE) if language == "python"]
    exec(python, {})
    assert (tmp_path / "my.html").is_file()


def test_the_pages_point_to_what_is_there() -> None:
    for page in (PAGE, SEARCH_PAGE, RESEARCH_PAGE, REPORT_PAGE, CLUSTERS_PAGE):
        for link in re.findall(r"\]\(([^)#]+)\)", page):
            assert "://" in link or (DOCS / link).exists(), link


def test_the_limits_of_the_watchdog_are_documented_as_they_are() -> None:
    page = (DOCS / "interruptions.md").read_text(encoding="utf-8")
    ((_, body),) = [block for block in blocks_of(page) if block[0] == "yaml"]
    tree = parse_yaml(body, "docs/interruptions.md")
    assert tree == {"watchdog": Watchdog().model_dump()}
    assert f"(`{Checkpoint().every_minutes:g}`)".replace("`", "") in page


def test_the_files_that_the_clusters_page_names_are_there() -> None:
    shown = [body for language, body in blocks_of(CLUSTERS_PAGE) if not language]
    named = set(re.findall(r"(?:clusters/)?[\w-]+\.(?:yaml|sh|py)\b", "\n".join(shown)))
    assert named >= {"cluster.yaml", "tune.py", "clusters/aws_setup.py", "clusters/slurm.sh"}
    for name in named - {"mine.yaml"}:
        assert (DOCS.parent / name).exists() or (DOCS.parent / "experiments" / name).exists(), name
