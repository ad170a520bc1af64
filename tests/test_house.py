"""The house keeps its rules: layers, imports, shipped files."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "sft_ray").rglob("*.py"))
# From the ground up: a module may import from its own layer and those before it.
LAYERS = [
    {"__version__", "errors", "recipes"},  # the first is the package's own
    {
        "cache",
        "config_problems",
        "environment",
        "interrupt",
        "location",
        "retries",
        "space",
        "squad",
        "tags",
        "yaml_text",
        "screen",
    },
    {"config"},
    {"ablation_file"},
    {"file_store"},
    {"journal", "run_lock"},
    {"run_store"},
    {"uploads", "folder_rule"},
    {"training", "analysis"},
    {"serving", "guess"},
    {"starter"},
    {"search", "single_trial"},
    {"cli"},
]
# Packages that only some layers may import.
RESERVED = {
    "ray": {"search", "serving"},
    "optuna": {"search", "analysis"},
    "torch": {"training", "search", "serving", "single_trial"},
}


def layer_of(module: Path) -> str:
    first = module.relative_to(ROOT / "sft_ray").parts[0]
    return first.removesuffix(".py")


def imports_of(module: Path) -> list[str]:
    """Dotted names; what comes from the package itself is named by its module."""
    found = []
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "sft_ray":
            found += [f"sft_ray.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return found


def test_imports_of_the_package_itself_are_seen(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(
        "import sft_ray.space\nfrom sft_ray import cli, single_trial as one\n"
        "from sft_ray.training import fitting\nfrom torch import nn\n"
    )
    names = ["space", "cli", "single_trial", "training"]
    assert imports_of(module) == [*(f"sft_ray.{name}" for name in names), "torch"]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: str(m.relative_to(ROOT)))
def test_imports_run_downward_only(module: Path) -> None:
    layer = layer_of(module)
    if layer == "__init__":
        return
    height = next(i for i, names in enumerate(LAYERS) if layer in names)
    allowed = set().union(*LAYERS[:height]) | {layer}
    for name in imports_of(module):
        top, *rest = name.split(".")
        if top == "sft_ray" and rest:
            assert rest[0] in allowed, f"{module.name} imports {name}"
        if top in RESERVED:
            assert layer in RESERVED[top], f"{module.name} imports {name}"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("sft_ray", {"torch", "ray", "optuna", "transformers", "pydantic"}),
        ("sft_ray.config", {"torch", "ray", "optuna", "transformers", "pyarrow"}),
        ("sft_ray.training.fitting", {"ray", "optuna"}),
        ("sft_ray.analysis.results", {"ray", "torch"}),
        ("sft_ray.search.study", {"ray"}),
        ("sft_ray.search.train_group", {"torch"}),
        ("sft_ray.search.worker", {"ray.train", "ray.tune", "ray.data", "pandas"}),
        ("sft_ray.serving.serve", {"ray", "starlette"}),
    ],
)
def test_importing_stays_light(module: str, absent: set[str]) -> None:
    script = f"import sys, {module}; print(' '.join({absent!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("first", ["", "import sft_ray.search.tuner\n", "import sft_ray.search\n"])
def test_search_is_a_function_whatever_was_imported_before(first: str) -> None:
    script = (
        f"{first}from sft_ray import Experiment, search\n"
        "try: search(Experiment.from_tree({'name': 'x', 'model': 'package:none/x', "
        "'data': {'path': 'builtin:none'}}))\n"
        "except Exception as error: print(type(error).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "ConfigError", done.stderr


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(line for extra in extras for line in extra)]
    names = {re.split(r"[\[<>=]", line)[0].lower() for line in wanted}
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower() for line in pins if "==" in line}
    assert names <= pinned
    assert "torch==2.13.0" in pins


def test_continuous_integration_calls_only_what_a_user_can() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert re.findall(r"^make .*$", script, re.MULTILINE) == ["make test"]
