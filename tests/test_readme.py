"""What the README tells a user to type is what works."""

import re
from pathlib import Path
from typing import Any

import pytest

from sft_ray.config import Experiment
from sft_ray.recipes import default_recipe
from sft_ray.yaml_text import parse_yaml

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", README, re.MULTILINE | re.DOTALL)
    return [body for tag, body in fenced if tag == language]


def test_the_experiment_of_the_readme_parses() -> None:
    trees = [parse_yaml(block, "README.md") for block in blocks("yaml")]
    assert [Experiment.from_tree(tree).name for tree in trees] == ["my-reviews"]


def test_the_commands_of_the_readme_parse_and_name_what_exists(tmp_path: Path) -> None:
    for name in ("my.yaml", "reviews.yaml"):  # the second is what `sft-ray init` would write
        (tmp_path / name).write_text(blocks("yaml")[0])
    lines = [line.split("#")[0].split() for block in blocks("") for line in block.splitlines()]
    searches = [words[2:] for words in lines if words[:2] == ["sft-ray", "search"]]
    submits = [words[2:] for words in lines if words[:2] == ["python", "tune.py"]]
    submits += [words[words.index("--") + 1 :] for words in lines if words[:2] == ["ray", "submit"]]
    assert len(searches) + len(submits) == 6
    for file, *overrides in searches + submits:
        path = tmp_path / file if (tmp_path / file).exists() else ROOT / file
        options = [word for word in overrides if "=" in word]
        assert Experiment.load(path, options)
        assert set(overrides) - set(options) <= {"--address", "auto"}
    makes = {words[1] for words in lines if words[:1] == ["make"]}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"search", "test"} <= makes <= targets


def test_the_files_the_readme_points_to_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) >= 5
    assert all((ROOT / link).exists() for link in links)


def test_the_python_of_the_readme_compiles_and_the_study_snippet_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sft_ray.search.study import SearchStudy, open_storage

    python = [re.sub(r"^ {2}", "", block, flags=re.MULTILINE) for block in blocks("python")]
    for block in python:
        compile(block, "README.md", "exec")
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    storage = open_storage(tmp_path / "runs" / "quickstart" / "study.journal")
    experiment = Experiment.load(ROOT / "experiments" / "quickstart.yaml")
    recipe = default_recipe(22_000_000)
    SearchStudy(experiment, storage, recipe=recipe, num_layers=6, direction="maximize").next_trial()
    snippet = next(block for block in python if "load_study" in block)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(snippet, names)
    assert len(names["study"].trials) == 1
