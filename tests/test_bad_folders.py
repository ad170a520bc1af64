"""Damaged run folders, studies, model folders and data: every verb that reads them says what.

A verb may do without a damaged file (a report that needs no tokenizer) and then ends well; what no
verb may do is end in a traceback, say more than a line, or change the folder.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sft_ray.cli import main
from sft_ray.config import Experiment
from sft_ray.errors import SftError
from sft_ray.run_store import open_run
from sft_ray.single_trial import run_training
from sft_ray.training.files import read_file
from sft_ray.training.model_facts import inspect_model
from sft_ray.yaml_text import dump_yaml, parse_yaml
from tests.bad import check_line, check_refused, listing
from tests.models import toy_rows, write_csv
from tests.test_results import search_run

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda content: content[: len(content) // 2],
    "zeroed": lambda content: bytes(len(content)),
    "emptied": lambda content: b"",
    "a list": lambda content: b"[1, 2]",
    "an empty object": lambda content: b"{}",
    "deep": lambda content: b"[" * 100_000,
    "5,000 digits": lambda content: b'{"trials": ' + b"9" * 5000 + b"}",
    "latin": lambda content: b'{"a": "\xe9"}',
}
RUN_FILES = (
    "results.json",
    "experiment.yaml",
    "environment.json",
    "checksums.json",
    "trials/0/trial.json",
    "trials/0/metrics.jsonl",
    "study.journal",
    "confirm.json",
)
READERS = {
    "status": "status {run}",
    "results": "results {run}",
    "report": "report {run} --out {out}",
}
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "sft_ray.json")
# A row of results.json -> what makes it false, and the verbs that must say so.
FALSE_RESULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], list[str]]] = {
    "no score of the winner": (
        lambda tree: tree["best"]["validation"].clear(),
        ["status {run}"],
    ),
    "metric that is a number": (lambda tree: tree.update(metric=3), ["status {run}"]),
    "no time": (lambda tree: tree.pop("wall_seconds"), ["status {run}"]),
    "percent as a text": (
        lambda tree: tree["trials"][0].update(schedule_percent="x", state="PRUNED"),
        ["results {run}"],
    ),
    "seconds as a list": (
        lambda tree: tree["trials"][0].update(train_seconds=[3]),
        ["results {run}"],
    ),
    "padding as a text": (
        lambda tree: tree["trials"][0].update(padding_share="x", epochs_run=1.0),
        ["results {run}", "report {run}"],
    ),
    "best that is a list": (lambda tree: tree.update(best=[]), ["status {run}", "results {run}"]),
    "trials that are texts": (
        lambda tree: tree.update(trials=["x"]),
        ["status {run}", "results {run}", "report {run}", "replay {run} --trial 0"],
    ),
    "settings that are none": (
        lambda tree: tree["trials"][0].update(train={"epochs": 0}),
        ["replay {run} --trial 0", "confirm {run}"],
    ),
    "settings that are missing": (
        lambda tree: tree["trials"][0].pop("train"),
        ["replay {run} --trial 0", "confirm {run}"],
    ),
    "curve that is a number": (
        lambda tree: tree["trials"][0].update(curve=3),
        ["replay {run} --trial 0"],
    ),
    "base without settings": (lambda tree: tree["best"].pop("train"), ["ablate {ablation}"]),
    "base of false settings": (
        lambda tree: tree["best"].update(train={"epochs": 0}),
        ["ablate {ablation}"],
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


@pytest.fixture(scope="module")
def trained(tiny_model: Path, folder: Path) -> Path:
    """A finished training."""
    write_csv(folder / "toy.csv", toy_rows(60, seed=0))
    tree = {
        "name": "done",
        "model": str(tiny_model),
        "storage": str(folder / "runs"),
        "data": {"train": str(folder / "toy.csv"), "max_length": 32},
        "train": {"epochs": 1, "learning_rate": 5e-3},
    }
    (folder / "experiment.yaml").write_text(dump_yaml(tree))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run = run_training(Experiment.from_tree(tree), quiet=True).location
    torch.set_num_threads(threads)
    return Path(run)


@pytest.fixture(scope="module")
def searched(folder: Path) -> Path:
    """The folder of a search over invented trials."""
    return Path(search_run(folder / "searches")[0].location)


def damaged(run: Path, name: str, how: str) -> Path:
    copy = run.parent / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    target = copy / name
    content = target.read_bytes() if target.exists() else b'{"top": 1, "seeds": [1]}'
    target.write_bytes(DAMAGES[how](content))
    if name == "experiment.yaml":
        (copy / "experiment.yaml.good").unlink()
    return copy


def run_command(command: str, capsys: pytest.CaptureFixture[str], folder: Path) -> int:
    """Its exit code; the bad ones are checked, and that nothing has changed."""
    before = listing(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.StringIO("the old cat\n"))
        with pytest.raises(SystemExit) as caught:
            main(command.split())
    printed = capsys.readouterr()
    code = caught.value.code or 0
    assert code in (0, 2), printed.err
    if code:
        for line in printed.err.splitlines():  # an empty experiment lacks three keys
            check_line(line, [])
    assert listing(folder) == before
    return int(code)


@pytest.mark.parametrize("kind", ["trained", "searched"])
@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", RUN_FILES)
def test_readers_of_a_damaged_run(
    name: str,
    how: str,
    kind: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run: Path = request.getfixturevalue(kind)
    copy = damaged(run, name, how)
    words = {"run": copy, "out": tmp_path / "report.html"}
    codes = [run_command(c.format(**words), capsys, copy) for c in READERS.values()]
    if name == "results.json" and how != "5,000 digits":
        assert codes == [2, 2, 2]


def test_readers_of_a_run_that_nothing_tells_what_it_was_made_for(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = damaged(trained, "experiment.yaml.good", "emptied")
    (copy / "experiment.yaml").unlink()
    for verb in ("confirm {run}", "replay {run} --trial 0", "report {run}"):
        code = run_command(verb.format(run=copy), capsys, copy)
        assert code == 2, verb


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_damaged_model(
    name: str, how: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = damaged(trained, f"best/{name}", how)
    code = run_command(f"predict {copy}", capsys, copy)
    assert code == 2 or (name, how) == ("sft_ray.json", "an empty object")
    assert run_command(f"predict {copy / 'best'}", capsys, copy) == code
    if name != "sft_ray.json":
        experiment = trained.parents[1] / "experiment.yaml"
        words = f"train {experiment} name=other model={copy / 'best'} storage={copy}"
        if (name, how) not in (("tokenizer.json", "an empty object"),):
            assert run_command(words, capsys, copy) == 2


@pytest.mark.parametrize("name", FALSE_RESULTS)
def test_false_results(name: str, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, commands = FALSE_RESULTS[name]
    copy = damaged(trained, "environment.json", "emptied")
    shutil.copy(trained / "environment.json", copy / "environment.json")
    tree = json.loads((copy / "results.json").read_text())
    change(tree)
    (copy / "results.json").write_text(json.dumps(tree))
    ablation = copy / "ablation.yaml"
    ablation.write_text(f"name: a\nbase: {copy}\nvary: {{train.epochs: [1, 2]}}\n")
    for command in commands:
        words = command.format(run=copy, ablation=ablation).split()
        check_refused(words, ["damaged"], copy, capsys)


# -- what chance finds -------------------------------------------------------------------------

CHANCE = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["auto", "all", "balanced", "l2", "${HOME}", "${NO_SUCH_NAME}", "0x1F", "~"])
)
ANYTHING = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=6) | st.sampled_from(["kind", "int"]), inner, max_size=3)
    ),
    max_leaves=8,
)
SECTIONS = {
    name: list(getattr(field.annotation, "model_fields", {}))
    for name, field in Experiment.model_fields.items()
}
PATHS = [
    *SECTIONS,
    *(f"{section}.{name}" for section, names in SECTIONS.items() for name in names),
    *(f"search.space.train.{name}" for name in SECTIONS["train"]),
]


def sound_tree() -> dict[str, Any]:
    return {"name": "x", "model": "m", "data": {"path": "d"}, "train": {}, "search": {"space": {}}}


def problems_of(call: Callable[[], object]) -> tuple[str, ...] | None:
    """Why it was refused; None if it was not.  Any other error comes through."""
    try:
        call()
    except SftError as error:
        return error.problems
    return None


@CHANCE
@given(st.dictionaries(st.sampled_from(PATHS), ANYTHING, min_size=1, max_size=4))
def test_any_tree_is_an_experiment_or_refused(changes: dict[str, Any]) -> None:
    tree: dict[str, Any] = sound_tree()
    for path, value in changes.items():
        *sections, name = path.replace("search.space.train.", "search.space.train~").split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                break
        else:
            node[name.replace("~", ".")] = value
    problems = problems_of(lambda: Experiment.from_tree(tree))
    if problems is not None:
        assert problems
        return
    experiment = Experiment.from_tree(tree)
    assert Experiment.from_tree(parse_yaml(dump_yaml(experiment.to_tree()), "x")) == experiment


@CHANCE
@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda b: b.decode("latin1")))
def test_any_text_is_yaml_or_refused(text: str) -> None:
    assert len(problems_of(lambda: parse_yaml(text, "x")) or "1") == 1


TAGS = ("int", "float", "bool", "null", "timestamp", "binary", "set", "omap", "seq", "map", "pairs")


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("value", ["x", "''", "[1]", "{a: 1}", "2020-13-01", "~"])
def test_any_tag_on_any_value(tag: str, value: str) -> None:
    assert len(problems_of(lambda: parse_yaml(f"a: !!{tag} {value}\n", "x")) or "1") == 1


def mutations(content: bytes, count: int, seed: int) -> Iterator[bytes]:
    """The same bytes with some of them changed, doubled, cut out or replaced by others."""
    draw = random.Random(seed)
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(draw.choice((1, 1, 3, 10))):
            at = draw.randrange(len(changed) + 1)
            length = draw.choice((1, 1, 4, 64))
            piece = draw.choice((b"", draw.randbytes(length), content[at : at + length] * 2, b"\0"))
            changed[at : at + length] = piece
        yield bytes(changed)


def check_never_crashes(content: bytes, path: Path, read: Callable[[], object]) -> int:
    """How many of the damaged files were refused; no other error may come out."""
    refused = 0
    for changed in mutations(content, 60, seed=1):
        path.write_bytes(changed)
        if problems := problems_of(read):
            refused += 1
            assert len(problems) == 1
    return refused


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_damaged_data_files(suffix: str, tmp_path: Path) -> None:
    rows = [{"text": f"the cat {i}", "label": "ab"[i % 2], "n": i} for i in range(40)]
    table, path = pa.Table.from_pylist(rows), tmp_path / f"data.{suffix}"
    frame = table.to_pandas()
    write = {
        "csv": lambda: frame.to_csv(path, index=False),
        "tsv": lambda: frame.to_csv(path, index=False, sep="\t"),
        "json": lambda: path.write_text(json.dumps(rows)),
        "jsonl": lambda: path.write_text("".join(json.dumps(row) + "\n" for row in rows)),
        "parquet": lambda: frame.to_parquet(path),
    }
    write[suffix]()
    assert check_never_crashes(path.read_bytes(), path, lambda: read_file(str(path))) >= 3


@pytest.mark.parametrize(
    "name", ["results.json", "experiment.yaml", "environment.json", "study.journal"]
)
def test_damaged_files_of_a_run(
    name: str, searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "x"
    shutil.copytree(searched, run)
    (run / "experiment.yaml.good").unlink()
    good = run / "study.journal.good"
    good.unlink(missing_ok=True)
    for changed in mutations((run / name).read_bytes(), 12, seed=2):
        (run / name).write_bytes(changed)
        for verb in ("status", "results"):
            run_command(f"{verb} {run}", capsys, run)
    assert open_run(str(run)).location == str(run)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_damaged_model_folders(name: str, tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    path = model / name
    content = path.read_bytes()
    head, rest = content[:2000], content[2000:]  # the header of the weights
    refused = 0
    for changed in mutations(head, 40, seed=3):
        path.write_bytes(changed + rest)
        if problems := problems_of(lambda: inspect_model(str(model)).num_parameters):
            refused += 1
            assert len(problems) == 1
    assert refused >= 5


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        write_csv(tmp_path / "toy.csv", toy_rows(60, seed=0))
        tree = {"name": "x", "model": str(tiny_model), "storage": str(disk)}
        tree |= {"data": {"train": str(tmp_path / "toy.csv"), "max_length": 32}}
        file = tmp_path / "x.yaml"
        file.write_text(dump_yaml({**tree, "train": {"epochs": 1}}))
        (disk / "ballast").write_bytes(bytes(1_000_000))
        for ballast in (True, False):
            if not ballast:
                (disk / "ballast").unlink()
                subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
            with pytest.raises(SystemExit) as caught:
                main(["train", str(file)])
            said = capsys.readouterr().err
            assert (caught.value.code or 0) == (2 if ballast else 0), said
            if ballast:
                check_line(said, ["No space left", "make room", "goes on"])
    finally:
        subprocess.run(["umount", str(disk)], check=True)
