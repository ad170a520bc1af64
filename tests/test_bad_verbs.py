"""What can be wrong in what follows a search: exit code 2, one plain line, nothing written."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from sft_ray.cli import main
from sft_ray.config import Experiment
from sft_ray.run_store import RESULTS, delete_results, open_run
from sft_ray.single_trial import run_training
from sft_ray.yaml_text import dump_yaml

ABLATION = "name: depth\nbase: {run}\nvary: {{train.frozen_layers: every}}\nseeds: 2\n"


@pytest.fixture(scope="module")
def places(tiny_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A finished run, others that are not, and files to name."""
    folder = tmp_path_factory.mktemp("places")
    tree = tiny_experiment.to_tree()
    tree |= {"storage": str(folder / "runs"), "name": "done", "resources": {}}
    tree |= {"search": {}, "train": {"learning_rate": 5e-3, "epochs": 1}}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run = Path(run_training(Experiment.from_tree(tree), quiet=True).location)
    torch.set_num_threads(threads)
    found = {"run": run, "folder": folder, "nowhere": folder / "nowhere"}
    for name in ("unfinished", "begun", "damaged", "torn"):
        found[name] = folder / "runs" / name
        shutil.copytree(run, found[name])
    delete_results(open_run(str(found["unfinished"])))
    delete_results(open_run(str(found["begun"])))
    shutil.rmtree(found["begun"] / "trials")
    (found["damaged"] / RESULTS).write_text(json.dumps({"trials": 3}))
    (found["torn"] / RESULTS).write_text('{"trials": [')
    files = {
        "experiment": dump_yaml(Experiment.from_tree(tree).to_tree()),
        "depth": ABLATION.format(run=run),
        "deep": ABLATION.format(run=run).replace("every", "[3]"),
        "empty": f"name: empty\nbase: {run}\n",
    }
    for name, text in files.items():
        found[name] = folder / f"{name}.yaml"
        found[name].write_text(text)
    return {name: str(place) for name, place in found.items()}


CASES: dict[str, tuple[str, str]] = {
    "confirm without a run": ("confirm", "Missing argument"),
    "confirm nothing": ("confirm {nowhere}", "is no run folder"),
    "confirm a file": ("confirm {depth}", "is no run folder"),
    "confirm an unfinished run": ("confirm {unfinished}", "has not finished"),
    "confirm damaged results": ("confirm {damaged}", f"{RESULTS}: damaged"),
    "confirm torn results": ("confirm {torn}", f"{RESULTS}: damaged"),
    "confirm none": ("confirm {run} --top 0", "--top"),
    "confirm on one seed": ("confirm {run} --seeds 1", "--seeds"),
    "confirm on a word": ("confirm {run} --seeds many", "--seeds"),
    "ablate nothing": ("ablate", "Missing argument"),
    "ablate no file": ("ablate base={run}", "at least one ablation's YAML file"),
    "ablate a file that is not there": ("ablate {nowhere}.yaml", "no such file"),
    "ablate an experiment": ("ablate {nowhere} base={run}", "no such file"),
    "ablate around nothing": ("ablate {depth} base={nowhere}", "is no run folder"),
    "ablate around an unfinished run": ("ablate {depth} base={unfinished}", "has not finished"),
    "ablate around damaged results": ("ablate {depth} base={damaged}", f"{RESULTS}: damaged"),
    "ablate with an unknown key": ("ablate {depth} sedes=3", "did you mean 'seeds'"),
    "ablate on one seed": ("ablate {depth} seeds=1", "seeds"),
    "ablate without a change": ("ablate {empty}", "nothing is varied"),
    "ablate twice": ("ablate {depth} {depth}", "two ablations are called depth"),
    "ablate too deep": ("ablate {deep}", "2 layers, got 3"),
    "ablate with half an override": ("ablate {depth} =3", "dotted.path=value"),
    "verify nothing": ("verify {nowhere}", "is no run folder"),
    "verify an unfinished run": ("verify {unfinished}", "has not finished"),
    "replay nothing": ("replay {nowhere} --trial 0", "is no run folder"),
    "replay no trial": ("replay {run}", "--trial"),
    "replay trial -1": ("replay {run} --trial -1", "--trial"),
    "replay trial 7": ("replay {run} --trial 7", "no ended trial 7; its trials: 0 to 0"),
    "replay before the first": ("replay {begun} --trial 0", "its trials: none yet"),
    "replay damaged results": ("replay {damaged} --trial 0", f"{RESULTS}: damaged"),
    "results of nothing": ("results {nowhere}", "is no run folder"),
    "results, the best 0": ("results {run} --top 0", "--top"),
    "results that are torn": ("results {torn}", f"{RESULTS}: damaged"),
    "report on nothing": ("report {nowhere}", "is no run folder"),
    "report on damaged results": ("report {damaged}", f"{RESULTS}: damaged"),
    "report on torn results": ("report {torn}", f"{RESULTS}: damaged"),
    "report at a price below 0": ("report {run} --price -1", "--price"),
    "report into a pdf": (
        "report {run} --out {folder}/t.pdf",
        "t.pdf: a report is written as .html or .htm, got '.pdf'",
    ),
    "report into no name": ("report {run} --out ''", "--out: a report is written as .html or"),
    "results into no name": ("results {run} --out ''", "--out: a table is written as .csv or"),
    "status of no name": ("status ''", "the name of the run folder is empty; name one"),
    "status of a bucket": ("status s3://bucket", "a run is a folder inside of a bucket"),
    "report into no folder": ("report {run} --out {nowhere}/x.html", "cannot be written"),
    "plan nothing": ("plan {nowhere}", "no such file"),
    "plan with an unknown key": ("plan {experiment} train.epoch=2", "did you mean 'epochs'"),
    "plan at a price below 0": ("plan {experiment} --price -1", "--price"),
    "plan at a word": ("plan {experiment} --price cheap", "--price"),
}


def listing(folder: str) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in Path(folder).rglob("*")}


@pytest.mark.parametrize("name", CASES)
def test_mistakes_are_one_line_and_leave_nothing(
    name: str, places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    command, fragment = CASES[name]
    before = listing(places["folder"])
    with pytest.raises(SystemExit) as caught:
        main([word.format(**places) for word in shlex.split(command)])
    printed = capsys.readouterr()
    assert caught.value.code == 2, printed
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    assert fragment in line
    assert "Traceback" not in line
    assert listing(places["folder"]) == before


def test_a_table_that_cannot_be_written_is_one_line(
    places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = listing(places["folder"])
    for out, fragment in (("trials.txt", ".csv or .parquet"), ("no/such/trials.csv", "cannot be")):
        with pytest.raises(SystemExit) as caught:
            main(["results", places["run"], "--out", f"{places['folder']}/{out}"])
        assert caught.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert fragment in line
    assert listing(places["folder"]) == before


@pytest.mark.parametrize(
    "verb", ["confirm", "ablate", "verify", "replay", "results", "report", "plan"]
)
def test_every_verb_has_cases(verb: str) -> None:
    assert sum(command.split()[0] == verb for command, _ in CASES.values()) >= 2
