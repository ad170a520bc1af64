"""Nothing that is read is executed, nothing secret is written, nobody else is let in."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import pytest
import torch

from sft_ray.analysis.report.page import write_report
from sft_ray.cli import main
from sft_ray.config import Experiment
from sft_ray.run_store import RunStore
from sft_ray.search import cluster
from sft_ray.single_trial import run_training
from sft_ray.yaml_text import dump_yaml
from tests.bad import check_refused
from tests.models import toy_rows, write_csv

ROOT = Path(__file__).parents[1]
SOURCES = [*(ROOT / "sft_ray").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
CANARIES = {
    "AWS_ACCESS_KEY_ID": "AKIACANARYCANARY1234",
    "AWS_SECRET_ACCESS_KEY": "canary/aws/secret/0001",
    "AWS_SESSION_TOKEN": "canary-aws-session-0002",
    "HF_TOKEN": "hf_canary0003",
    "WANDB_API_KEY": "canarywandb0004",
    "MLFLOW_TRACKING_PASSWORD": "canary-mlflow-0005",
    "GOOGLE_API_KEY": "canary-google-0006",
}


class Payload:
    """Runs a command where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training whose labels are HTML."""
    folder = tmp_path_factory.mktemp("trained")
    names = {"animal": "<script>alert(1)</script>", "plant": '"><img src=x onerror=y>'}
    rows = [(text, names.get(label, label)) for text, label in toy_rows(60, seed=0)]
    write_csv(folder / "<b>toy.csv", rows)
    tree = {
        "name": "done",
        "model": str(tiny_model),
        "storage": str(folder / "runs"),
        "data": {"train": str(folder / "<b>toy.csv"), "max_length": 32},
        "train": {"epochs": 1, "learning_rate": 5e-3},
    }
    (folder / "experiment.yaml").write_text(dump_yaml(tree))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CANARIES.items():
            patch.setenv(name, value)
        return Path(run_training(Experiment.from_tree(tree), quiet=True).location)


def leaks_below(folder: Path) -> list[str]:
    """Files that hold a canary, and which."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            found += [f"{path}: {n}" for n, v in CANARIES.items() if v.encode() in content]
    return found


# -- nothing is unpickled ---------------------------------------------------------------------


def test_the_payload_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "struck")))
    assert (tmp_path / "struck").exists()


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_no_pickle_that_lies_in_a_folder_runs(kind: str, trained: Path, tmp_path: Path) -> None:
    """Each file of a run in turn, and what other libraries would look for beside them."""
    mark, evil = tmp_path / "struck", tmp_path / "evil"
    if kind == "pickle":
        evil.write_bytes(pickle.dumps(Payload(mark)))
    else:
        torch.save(Payload(mark), evil)
    storage = tmp_path / "runs"
    own = sorted(str(p.relative_to(trained)) for p in trained.rglob("*") if p.is_file())
    others = [
        f"{folder}{name}"
        for folder in ("best/", "trials/0/last/", "trials/0/best/", "")
        for name in (
            "pytorch_model.bin",
            "model.bin",
            "optimizer.pt",
            "optimizer.bin",
            "scheduler.pt",
            "training_args.bin",
            "rng_state.pth",
            "state.pkl",
            "model.joblib",
            "tokenizer.pkl",
            "spiece.model",
            "state.safetensors",
            "state.json",
        )
    ]
    commands = (
        "status {run}",
        "results {run}",
        "report {run} --out {out}",
        "predict {run}",
        "evaluate {run}",
    )
    for number, planted in enumerate([*own, None]):  # None: all the others at once
        run = storage / "done"
        shutil.rmtree(storage, ignore_errors=True)
        shutil.copytree(trained, run)
        for name in others if planted is None else [planted]:
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(evil, run / name)
        if planted is None:
            (run / "best" / "model.safetensors").unlink()
            (run / "results.json").unlink()
        words = {"run": run, "out": tmp_path / "report.html"}
        # Every command on the files that matter, one each on the rest.
        chosen = commands if planted is None or "best/" in planted else commands[number % 3 :][:1]
        for command in chosen:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("sys.stdin", [])
                with pytest.raises(SystemExit):
                    main(command.format(**words).split())
            assert not mark.exists(), (planted, command)
    experiment = trained.parents[1] / "experiment.yaml"
    with pytest.raises(SystemExit) as caught:  # takes up last/, or makes the run anew
        main(["train", str(experiment), f"storage={storage}"])
    assert caught.value.code in (0, None)
    assert not mark.exists()


def test_no_pickle_in_data_or_a_model_runs(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "struck"
    evil = pickle.dumps(Payload(mark))

    def data(folder: Path) -> dict[str, object]:
        return {"path": str(folder), "max_length": 32}

    model, plain, saved = tmp_path / "model", tmp_path / "plain", tmp_path / "saved"
    shutil.copytree(tiny_model, model)
    (model / "model.safetensors").unlink()
    torch.save(Payload(mark), model / "pytorch_model.bin")
    plain.mkdir()
    for name in ("train.pkl", "train.pickle", "train.pt", "train.npy", "data.py", "plain.py"):
        (plain / name).write_bytes(evil if not name.endswith("py") else b"raise SystemExit(9)")
    datasets.disable_progress_bars()
    part = datasets.Dataset.from_list([{"text": t, "label": n} for t, n in toy_rows(40)])
    datasets.DatasetDict({"train": part, "validation": part}).save_to_disk(saved)
    for name in ("state.json", "dataset_info.json", "data-00000-of-00001.arrow"):
        whole = (saved / "train" / name).read_bytes()
        (saved / "train" / name).write_bytes(evil)
        experiment = {"name": "x", "model": str(tiny_model), "storage": str(tmp_path / "runs")}
        file = tmp_path / "x.yaml"
        file.write_text(dump_yaml({**experiment, "data": data(saved)}))
        check_refused(["train", str(file)], ["data.path", str(saved)], saved, capsys)
        (saved / "train" / name).write_bytes(whole)
    cases = [
        ({"model": str(model), "data": data(saved)}, "has no model.safetensors"),
        ({"model": str(tiny_model), "data": data(plain)}, "cannot be loaded"),
    ]
    for changes, fragment in cases:
        file.write_text(dump_yaml({**experiment, **changes}))
        check_refused(["train", str(file)], [fragment], plain, capsys)
    assert not mark.exists()


def test_code_that_a_model_brings_along_is_never_imported(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "config.json").read_text())
    config["model_type"] = "mine"
    config["auto_map"] = {"AutoConfig": "mine.C", "AutoModel": "mine.M", "AutoTokenizer": "mine.T"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "mine.py").write_text(f"open({str(tmp_path / 'struck')!r}, 'w')\n")
    check_refused(["predict", str(model)], ["custom code"], model, capsys)
    file = tmp_path / "x.yaml"
    tree = {"name": "x", "model": str(model), "data": {"path": "builtin:none"}}
    file.write_text(dump_yaml({**tree, "storage": str(tmp_path / "runs"), "task": "no-task"}))
    with pytest.raises(SystemExit):
        main(["train", str(file)])
    assert "custom code" in capsys.readouterr().err
    assert not (tmp_path / "struck").exists()


# A slot's handle goes from it to the watch as bytes: like all arguments of Ray's calls it never
# leaves the processes of one cluster, which ask for its token.
HANDLES = {ROOT / "sft_ray" / "search" / name for name in ("slot.py", "watch.py")}


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_source_unpickles(source: Path) -> None:
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
            unpickling = {"pickle", "cloudpickle", "joblib", "dill", "marshal", "shelve"}
            if source in HANDLES:
                unpickling -= {"cloudpickle"}
            assert not unpickling & set(names)
        if not isinstance(node, ast.Call):
            continue
        called, given = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
        if called == "torch.load":
            assert ast.unparse(given["weights_only"]) == "True"
        if called.endswith(("np.load", "numpy.load")):
            assert "allow_pickle" not in given
        if called.endswith(("from_pretrained", "from_config")) and "save" not in called:
            assert "trust_remote_code" in given, f"{source}:{node.lineno}"
        if "trust_remote_code" in given:
            assert ast.unparse(given["trust_remote_code"]) == "False"
        assert called not in ("eval", "exec", "yaml.load")


# -- nothing secret is written ----------------------------------------------------------------


def test_a_run_holds_no_secret(trained: Path) -> None:
    assert leaks_below(trained.parents[1]) == []
    assert all(b"canary" not in p.read_bytes() for p in trained.rglob("*.json"))


@pytest.mark.parametrize("key", ["storage", "model", "data.train"])
@pytest.mark.parametrize(
    "place",
    [
        "s3://AKIACANARY:canary/secret@bucket/x",
        "https://user:canary@host/x.csv",
        "s3://bucket/x?secret_key=canary",
    ],
)
def test_no_place_holds_credentials(
    key: str, place: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder = trained.parents[1] / "experiment.yaml", trained.parents[1]
    override = f"{key}={place}"
    said = check_refused(["train", str(file), override], [key, "credentials"], folder, capsys)
    assert "canary" not in said.lower()


def test_an_error_line_shows_no_password(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = "s3://user:canary@bucket/run"
    for command in (f"status {place}", f"train {place}", f"train x.yaml storage={place}:["):
        with pytest.raises(SystemExit):
            main(command.split())
        assert "canary" not in capsys.readouterr().err


def test_a_report_escapes_what_data_and_files_say(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    write_report(str(trained), out=str(out))
    page = out.read_text()
    assert "&lt;script&gt;alert(1)" in page
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "<b>toy" not in page


# -- nobody else is let in --------------------------------------------------------------------


@pytest.mark.parametrize("there", [True, False])
def test_the_token_of_ray_is_for_its_owner_only(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    path = tmp_path / ".ray" / "auth_token"
    if there:
        path.parent.mkdir()
        path.write_text("mine")
        path.chmod(0o644)
    cluster._keep_token_private()
    assert path.stat().st_mode & 0o777 == 0o600
    assert (path.read_text() == "mine") == there
    assert len(path.read_text()) >= 4


SEARCH = """
import json, os, sys
from contextlib import suppress
from pathlib import Path
import psutil
from sft_ray.config import Experiment
from sft_ray.search.cluster import connected
from sft_ray.search.tuner import run_search
from tests.test_security import leaks_below
experiment = Experiment.load(sys.argv[1])
with connected("local"):
    run_search(experiment)
    me = psutil.Process()
    below = [me, *me.children(recursive=True)]
    listening, dashboards = set(), 0
    for process in below:
        with suppress(psutil.NoSuchProcess):  # workers of the slots are going home
            listening |= {c.laddr.ip.removeprefix("::ffff:")
                          for c in process.net_connections("inet") if c.status == "LISTEN"}
            dashboards += any(word.endswith("dashboard/dashboard.py") for word in process.cmdline())
    import ray
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    files = sum(p.is_file() for p in session.rglob("*"))
    found = {"listening": sorted(listening), "leaks": leaks_below(session), "files": files}
    found["dashboards"] = dashboards
print("FOUND " + json.dumps(found))
"""


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_a_searchs_services_are_on_loopback_and_no_log_holds_a_secret(
    tiny_experiment: Experiment, tmp_path: Path
) -> None:
    tree = tiny_experiment.to_tree()
    tree["search"] |= {"trials": 2}
    tree["resources"] |= {"workers_per_trial": 1}
    tree["storage"] = str(tmp_path / "runs")
    file = tmp_path / "experiment.yaml"
    file.write_text(dump_yaml(tree))
    short = tempfile.mkdtemp(prefix="ray-")  # of a socket's name at most 107 letters
    environment = {**os.environ, **CANARIES, "RAY_TMPDIR": short, "HOME": str(tmp_path)}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SEARCH, str(file)], capture_output=True, text=True, env=environment
    )
    shutil.rmtree(short, ignore_errors=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.rpartition("FOUND ")[2])
    assert found["files"] > 10
    assert found["leaks"] == []
    assert found["listening"] == ["127.0.0.1"]
    assert found["dashboards"] == 0
    assert leaks_below(tmp_path / "runs") == []
    assert not [v for v in CANARIES.values() if v in done.stdout + done.stderr]
    assert RunStore(str(tmp_path / "runs"), "tiny").exists("results.json")
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o077 == 0
