"""The documentation as a whole: it builds, is up to date, and holds in what can be checked."""

from __future__ import annotations

import json
import logging
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from sft_ray.ablation_file import Ablation
from sft_ray.cli import app
from sft_ray.config import Experiment
from sft_ray.errors import ConfigError
from sft_ray.serving.export import ROWS_COMPARED, TOLERANCE
from sft_ray.serving.requests import Limits
from sft_ray.serving.serve import REQUESTS_WAITING, ROWS_PER_BATCH
from sft_ray.training.tasks import TASKS
from sft_ray.yaml_text import parse_yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str, language: str) -> list[str]:
    return [body for tag, body in BLOCK.findall(PAGES[page]) if tag == language]


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    problems: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            problems.append(record.getMessage())

    handler = Collector(level=logging.WARNING)
    logging.getLogger("mkdocs").addHandler(handler)
    try:
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site")))
    finally:
        logging.getLogger("mkdocs").removeHandler(handler)
    assert problems == []
    built = {p.parent.name for p in (tmp_path / "site").rglob("index.html")}
    assert {"tutorial", "reference", "cookbook", "why", "serving"} <= built


def test_every_page_is_in_the_menu() -> None:
    menu = parse_yaml((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), "mkdocs.yml")["nav"]
    listed = {page for entry in menu for page in entry.values()}
    assert listed == {*PAGES, "examples/README.md"}


def test_the_reference_is_that_of_the_code() -> None:
    made = runpy.run_path(str(DOCS / "make_reference.py"))["reference"]()
    assert PAGES["reference.md"] == made, "run `make reference`"
    for verb in typer.main.get_command(app).commands:  # type: ignore[attr-defined]
        assert f"### sft-ray {verb}\n" in made
    assert "| `every_minutes` | number (above 0) | `10` |" in made
    ablation = made.split("## Keys of an ablation\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.+) \|$", ablation, re.MULTILINE)
    assert [name for name, _ in rows] == list(Ablation.model_fields)


def test_every_environment_variable_of_ours_is_listed() -> None:
    sources = [*(ROOT / "sft_ray").rglob("*.py"), *(ROOT / "clusters").iterdir()]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources if path.is_file())
    assert {*re.findall(r"\bSFT_RAY_[A-Z]+\b", text)} >= {"SFT_RAY_STORAGE", "SFT_RAY_CACHE"}
    for name in re.findall(r"\bSFT_RAY_[A-Z]+\b", text):
        assert f"| `{name}` |" in PAGES["reference.md"], name


@pytest.mark.parametrize("page", ["tutorial.md", "cookbook.md"])
def test_every_experiment_is_accepted(page: str) -> None:
    names = [Experiment.from_tree(parse_yaml(body, page)).name for body in blocks(page, "yaml")]
    expected = {
        "tutorial.md": ["reviews"],
        "cookbook.md": ["few", "long", "imbalanced", "many-gpus", "chinese"],
    }
    assert names == expected[page]


def test_every_command_exists_and_takes_what_is_shown() -> None:
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    seen = set()
    for page in PAGES:
        for line in (line for body in blocks(page, "") for line in body.splitlines()):
            if "sft-ray " not in line or "pip install" in line:
                continue
            command = line[line.index("sft-ray ") :].split("<")[0].split(" > ")[0]
            verb, *arguments = shlex.split(command, comments=True)[1:]
            with verbs[verb].make_context(verb, arguments) as context:
                assert not context.args, (page, line)
            seen.add(verb)
    assert seen == set(verbs)


def test_the_modules_and_extras_that_pages_name_exist() -> None:
    text = "\n".join(PAGES.values()) + (ROOT / "README.md").read_text(encoding="utf-8")
    for module in re.findall(r"python -m (benchmarks[.\w]+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
    extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in re.findall(r"sft-ray\[(\w+)\]", text):
        assert re.search(rf"^{extra} = \[", extras, re.MULTILINE), extra


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", PAGES[page]):
        assert "://" in link or (DOCS / link).exists(), link


def test_the_figures_of_the_ideas_are_measured_ones() -> None:
    measured = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    measured += (DOCS / "examples" / "README.md").read_text(encoding="utf-8")
    known = set(re.findall(r"\d+\.\d+", measured))
    shown = set(re.findall(r"\d+\.\d+", PAGES["ideas.md"])) - {"0.5"}
    assert len(shown) > 12
    assert shown <= known
    table = re.findall(r"^\| (.+?) \| (\d+ ± \d+) \| (\S+) \|$", PAGES["ideas.md"], re.MULTILINE)
    assert len(table) == 5
    for _, epochs, ratio in table:
        rows = [line for line in measured.splitlines() if f"| {epochs} |" in line]
        assert any(f" {ratio} |" in row.replace("*", "") for row in rows), (epochs, ratio)


def test_the_limits_of_the_server_are_those_of_the_code() -> None:
    page = PAGES["serving.md"]
    limits = Limits()
    for number in (limits.body_bytes, limits.characters, limits.rows, REQUESTS_WAITING):
        assert f"{number:,}" in page
    assert f"a batch of at most {ROWS_PER_BATCH}" in page
    assert f"answer {ROWS_COMPARED} real texts" in page
    assert TOLERANCE == 1e-4
    assert "agree to 1e-4" in " ".join(page.split())


def test_inputs_and_answers_of_the_serving_page_are_those_of_the_tasks() -> None:
    rows = re.findall(
        r"^\| (.+?) \| `(\{.+?\})` \| (?:`(\{.+\})`|the same) \|$", PAGES["serving.md"], re.M
    )
    assert len(rows) == len(TASKS) + 2
    seen = []
    for name, given, answer in rows:
        if name.startswith("`"):
            seen.append(name.strip("`"))
        fields = TASKS[seen[-1]].fields
        needs = {re.sub("_(start|end)$", "", field) for field in fields.inputs}
        assert needs <= set(json.loads(given)) <= needs | set(fields.optional)
        assert isinstance(json.loads(answer or "{}"), dict)
    assert seen == list(TASKS)


def test_the_messages_of_troubleshooting_are_those_of_the_code() -> None:
    """The fixed part of each quoted message stands in the source."""
    source = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "sft_ray").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    quoted: list[Any] = re.findall(r"^\| `([^|]+)` \|", PAGES["troubleshooting.md"], re.MULTILINE)
    assert len(quoted) >= 9
    for message in quoted:
        parts = [part.strip() for part in re.split(r"…|'[^']*'|127\S+", message) if part.strip()]
        assert any(part in source for part in parts), message


def test_the_python_of_the_serving_page_runs(
    tmp_path: Path, tiny_experiment: Experiment, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pytest.importorskip("onnxruntime")
    from sft_ray.serving.export import export_onnx
    from sft_ray.single_trial import run_training

    named = {"name": "my", "storage": str(tmp_path / "runs")}
    run_training(tiny_experiment.model_copy(update=named), quiet=True)
    monkeypatch.chdir(tmp_path)
    export_onnx("runs/my")
    with pytest.raises(ConfigError, match="not overwritten"):
        export_onnx("runs/my")
    (script,) = blocks("serving.md", "python")
    exec(script, {})
    assert capsys.readouterr().out.strip() in ("animal", "plant", "tool")
