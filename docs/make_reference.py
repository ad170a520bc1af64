"""Writes docs/reference.md from the command line and the configuration: `make reference`.

The meaning of a key is its comment in sft_ray/config.py, or the docstring of its section.
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import typer

from sft_ray import config
from sft_ray.ablation_file import Ablation
from sft_ray.cli import app
from sft_ray.training.tasks import TASKS, Task

HEAD = """# Reference

Made from the code by `make reference`; do not edit.

"""
# Name -> what it does.
VARIABLES = {
    "SFT_RAY_STORAGE": "where run folders are kept, of experiments that name no `storage`; "
    "default: `runs`",
    "SFT_RAY_CACHE": "folder of encoded data and of the output of frozen layers; default: "
    "`~/.cache/sft_ray`",
    "SFT_RAY_VENV": "the environment that `clusters/slurm.sh` activates; default: `.venv`",
    "RAY_ADDRESS": "the Ray cluster to use where no `--address` is given; `local` starts one of "
    "its own",
    "HF_TOKEN": "token of the hub, for `push` and for what is private or gated; else that of "
    "`hf auth login`",
    "HF_HUB_OFFLINE": "`1` asks the hub for nothing: models and data sets are those that it has "
    "given before",
    "MLFLOW_TRACKING_URI": "the server of `tracking: mlflow`; default: `mlflow.db` in the working "
    "folder",
    "MLFLOW_TRACKING_TOKEN": "its key",
    "WANDB_API_KEY": "the key of `tracking: wandb`",
    "WANDB_PROJECT": "its project; default: `sft_ray`",
    "WANDB_MODE": "`offline` keeps what would be sent in `<run folder>/tracking/`",
    "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY": "keys of `s3://…` as storage, on every machine; "
    "none where machines have a role",
}


def reference() -> str:
    """Markdown of all verbs, all keys of an experiment and all metrics."""
    verbs = "\n".join(_verb(name, command) for name, command in _commands().items())
    sections = "\n".join(_section(path, model) for path, model in _sections())
    tasks = "\n".join(
        f"| `{task.name}` | {_read_by(task)} | "
        f"`{task.fields.target_name}` | {_codes(task.metrics)} |"
        for task in TASKS.values()
    )
    variables = "\n".join(
        f"| {_codes(names.split(', '))} | {meaning} |" for names, meaning in VARIABLES.items()
    )
    return (
        f"{HEAD}## Verbs\n\n{verbs}\n## Keys of an experiment\n\n"
        "On the command line `train.epochs=2` behind the file's name; unknown keys are refused.\n\n"
        f"{sections}\n## Keys of an ablation\n\n{_ablation()}\n## Tasks\n\n"
        "| task | reads | learns | metrics, the default objective first |\n|---|---|---|---|\n"
        f"{tasks}\n\n## Environment variables\n\n"
        "`${NAME}` and `${NAME:-default}` in a path, a model or a storage take any variable.\n\n"
        "| variable | what it does |\n|---|---|\n"
        f"{variables}\n"
    )


def _read_by(task: Task) -> str:
    """Fields as `data.columns` names them: the two ends of a span have one name."""
    fields = [*task.fields.inputs, *task.fields.optional]
    spans = [name.removesuffix("_start") for name in fields if name.endswith("_start")]
    ends = {span: [f"{span}_start", f"{span}_end"] for span in spans}
    whole = {end: span for span, both in ends.items() for end in both}
    return ", ".join(
        f"`{name}` (columns {_codes(ends[name])})" if name in ends else f"`{name}`"
        for name in dict.fromkeys(whole.get(name, name) for name in fields)
    )


def _ablation() -> str:
    """The keys of an ablation's file; its first line says what it is."""
    about = "A file for `sft-ray ablate`; `key=value` behind it replaces a key, as `seeds=10`."
    return f"{about}\n\n{_table(Ablation)}\n"


def _commands() -> dict[str, Any]:
    return dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def _verb(name: str, command: Any) -> str:
    rows = []
    for parameter in command.params:
        is_option = parameter.param_type_name == "option"
        shown = ", ".join(parameter.opts) if is_option else (parameter.name or "").upper()
        default = (
            ""
            if parameter.default is None or parameter.default is False
            else f"`{parameter.default}`"
        )
        need = "required" if parameter.required else default
        rows.append(f"| `{shown}` | {_cell(getattr(parameter, 'help', '') or '')} | {need} |")
    lines = command.epilog.splitlines()
    examples = "\n".join(line.strip() for line in lines if line.startswith("  "))
    table = "\n".join(["| | | default |", "|---|---|---|", *rows])
    return f"### sft-ray {name}\n\n{_cell(command.help)}\n\n{table}\n\n```\n{examples}\n```\n"


def _sections() -> list[tuple[str, type[config.Section]]]:
    """Dotted path -> section, in the order of the file's keys."""
    found: list[tuple[str, type[config.Section]]] = [("", config.Experiment)]
    for path, model in found:  # which grows meanwhile
        for name, field in model.model_fields.items():
            members = getattr(field.annotation, "__args__", (field.annotation,))
            found += [
                (f"{path}.{name}".lstrip("."), member)
                for member in members
                if isinstance(member, type) and issubclass(member, config.Section)
            ]
    return found


def _section(path: str, model: type[config.Section]) -> str:
    title = f"`{path}`" if path else "At the top"
    about = _cell((model.__doc__ or "").split("\n\n")[0])
    return f"### {title}\n\n{about}\n\n{_table(model)}\n"


def _table(model: type[config.Section]) -> str:
    rows = [
        f"| `{name}` | {_cell(kind)} | {_cell(default)} | {_cell(meaning)} |"
        for name, kind, default, meaning in _fields(model)
    ]
    return "\n".join(["| key | takes | default | |", "|---|---|---|---|", *rows])


def _fields(model: type[config.Section]) -> list[tuple[str, str, str, str]]:
    """Name, type, default and comment of every field, as the source has them."""
    source = inspect.getsource(model)
    lines = source.splitlines()
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    found = []
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            behind = lines[(node.end_lineno or node.lineno) - 1][node.end_col_offset or 0 :]
            above = lines[node.lineno - 2]
            comment = re.match(r"\s*#\s*(.*)", behind) or re.match(r"\s*#\s*(.*)", above)
            default = "required" if node.value is None else f"`{ast.unparse(node.value)}`"
            kind = _kind(node.annotation)
            found.append((node.target.id, kind, default, comment.group(1) if comment else ""))
    return found


def _kind(node: ast.expr) -> str:
    """An annotation in words: `Annotated[int, Field(ge=1)] | None` is `int (ge=1) or null`."""
    if isinstance(node, ast.BinOp):
        return f"{_kind(node.left)} or {_kind(node.right)}"
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if node.value.id == "Literal":
            return " or ".join(str(ast.literal_eval(part)) for part in parts)
        if node.value.id == "Annotated":
            limits = [
                f"{k.arg} {ast.unparse(k.value)}"
                for part in parts[1:]
                if isinstance(part, ast.Call)
                for k in part.keywords
                if k.arg != "validate_default"
            ]
            words = ", ".join(limits).replace("ge ", "at least ").replace("gt ", "above ")
            words = words.replace("le ", "at most ").replace("lt ", "below ")
            return f"{_kind(parts[0])}{f' ({words})' if words else ''}"
        if node.value.id == "list":
            return f"list of {_kind(parts[0])}"
        if node.value.id == "dict":
            return f"{_kind(parts[0])} to {_kind(parts[1])}"
    names = {
        "None": "null",
        "str": "text",
        "bool": "true or false",
        "int": "whole number",
        "float": "number",
        "Any": "value",
        "Fraction": "number from 0 to below 1",
        "Name": "text (letters, digits, _ . and -, max_length 100)",
        "Location": "text (may hold ${NAME})",
        "Column": "name, [start, end] or null",
        "TrackingTool": "tensorboard, mlflow or wandb",
    }
    text = ast.unparse(node)
    return names.get(text, text)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _codes(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    (Path(__file__).parent / "reference.md").write_text(reference(), encoding="utf-8")
