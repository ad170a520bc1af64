"""A run folder on a real S3 API: every method, faults of the network, leases, uploads."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch

from sft_ray import retries, run_lock
from sft_ray.config import Experiment
from sft_ray.errors import ConfigError, ResourceError
from sft_ray.run_lock import _process_table
from sft_ray.run_store import JOURNAL, RunStore, open_run, write_experiment
from sft_ray.search import worker
from sft_ray.search.study import open_storage
from sft_ray.training.progress import Progress
from sft_ray.training.resume_state import ResumeState
from sft_ray.training.tasks import find_task
from sft_ray.uploads import Uploads
from tests.s3 import BUCKET, CREDENTIALS, Proxy, names_below, options, s3_server

TREE = {"name": "x", "model": "m", "data": {"path": "d"}, "search": {"trials": 4}}


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        with s3_server() as port:
            yield port


@pytest.fixture
def proxy(port: int) -> Iterator[Proxy]:
    proxy = Proxy(port)
    yield proxy
    proxy.close()


@pytest.fixture
def store(port: int, request: pytest.FixtureRequest) -> RunStore:
    prefix = re.sub(r"\W+", "-", request.node.name)
    return RunStore(f"s3://{BUCKET}/{prefix}{options(port)}", "x")


def test_files_and_folders(store: RunStore, tmp_path: Path) -> None:
    assert not store.is_there()
    assert store.read_text("a") is None
    assert store.files_below("trials") == []
    store.write_json("a/b.json", {"old": True})
    store.write_json("a/b.json", {"new": 1})
    assert store.read_json("a/b.json") == {"new": 1}
    assert store.modified("a/b.json") is not None
    assert store.modified("none") is None
    for line in ("one", "two"):
        store.append_text("log", f"{line}\n")
    assert store.read_text("log") == "one\ntwo\n"
    for text in ("first", "second"):
        with store.replacing_folder("best") as folder:
            (folder / "weights.gz").write_text(text)
            (folder / "deep").mkdir()
            (folder / "deep" / text).write_text(text)
    names = ["best/checksums.json", "best/deep/second", "best/weights.gz"]
    assert store.files_below("best") == names
    assert store.is_intact("best")
    with store.fetched_folder("best") as folder:
        assert (folder / "deep" / "second").read_text() == "second"
    store.write_text("best/weights.gz", "secone")
    assert not store.is_intact("best")
    store.delete_folder("best")
    store.delete_folder("best")
    assert not store.exists("best")
    assert store.set_aside() == "x.old-1"
    assert not store.is_there()
    aside = RunStore(store.storage, "x.old-1")
    assert aside.read_text("log") == "one\ntwo\n"
    aside.delete()
    assert not aside.is_there()


def test_a_folder_is_the_old_or_the_new_one_wherever_its_writer_is_killed(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every write to storage in turn is the one that never comes."""

    class KilledError(BaseException):
        pass

    honest, left = RunStore._try, [0]

    def attempt(self: RunStore, operation):
        if left[0] == 0:
            raise KilledError
        left[0] -= 1
        return honest(self, operation)

    for steps in range(1000):
        left[0] = 10**9
        monkeypatch.setattr(RunStore, "_try", attempt)
        store.delete_folder("best")
        store.delete_folder("best.next")
        with store.replacing_folder("best") as folder:
            (folder / "a").write_text("old")
        left[0] = steps
        try:
            with store.replacing_folder("best") as folder:
                (folder / "b").write_text("new")
            done = True
        except KilledError:
            done = False
        left[0] = 10**9
        store.restore_folder("best")
        assert store.is_intact("best"), steps
        assert store.files_below("best") in (
            ["best/a", "best/checksums.json"],
            ["best/b", "best/checksums.json"],
        )
        assert store.files_below("best.next") == []
        if done:
            break
    assert steps > 8


def test_a_run_is_found_again_by_where_it_is_said_to_be(store: RunStore) -> None:
    write_experiment(store, Experiment.from_tree(TREE))
    again = open_run(store.location)
    assert again.location == store.location
    assert again.read_text("experiment.yaml") == store.read_text("experiment.yaml")
    assert store.path_of("best").partition("?")[0].endswith("/x/best")
    with pytest.raises(ConfigError, match="is no run folder"):
        open_run(store.path_of("elsewhere"))


def test_the_study_goes_on_on_another_machine(
    store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFT_RAY_CACHE", str(tmp_path / "one"))
    assert store.pull_journal() == []
    study = optuna.create_study(storage=open_storage(store.journal), study_name="s")
    study.tell(study.ask(), 0.5)
    store.push_journal()
    monkeypatch.setenv("SFT_RAY_CACHE", str(tmp_path / "two"))
    other = RunStore(store.storage, "x")
    assert not other.journal.exists()
    assert other.pull_journal() == []
    [trial] = optuna.load_study(storage=open_storage(other.journal), study_name="s").trials
    assert trial.value == 0.5
    content = store.read_bytes(JOURNAL)
    assert content is not None
    store.write_bytes(JOURNAL, content[:40] + bytes(40) + content[80:])
    [note] = other.pull_journal()
    assert "was damaged" in note
    assert other.journal.read_bytes() == content


def test_credentials_in_a_uri_are_refused_and_not_shown() -> None:
    for uri in (
        "s3://AKIA1:hidden@bucket/runs",
        "s3://AKIA1:hid/den@bucket/runs",
        "s3://bucket/runs?secret_key=hidden",
        "gs://hidden@bucket/runs",
    ):
        with pytest.raises(ResourceError, match="must not hold credentials") as store_said:
            RunStore(uri, "x")
        with pytest.raises(ConfigError, match="storage: a URI must not hold") as config_said:
            Experiment.from_tree({**TREE, "storage": uri})
        for said in (str(store_said.value), str(config_said.value)):
            assert "hid" not in said.replace("hold", "")
            assert "AKIA1" not in said


def test_what_passes_is_tried_again(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "PAUSES", (0.05, 0.1))
    store = RunStore(f"s3://{BUCKET}/again{options(proxy.port)}", "x")
    proxy.fail(40)  # pyarrow itself gives up after about 31
    store.write_text("note", "kept")
    assert proxy.failed == 40
    assert store.read_text("note") == "kept"


def test_what_does_not_pass_is_one_line(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "PAUSES", (0.05,))
    store = RunStore(f"s3://{BUCKET}/never{options(proxy.port)}", "x")
    proxy.fail(10**6, status=403)
    with pytest.raises(ResourceError, match=rf"storage: s3://{BUCKET}/never/x: .*ACCESS_DENIED"):
        store.write_text("note", "lost")
    assert proxy.failed == 1  # it will not pass, so it is not tried again
    proxy.fail(10**6)
    monkeypatch.setattr(retries, "PAUSES", ())
    with pytest.raises(ResourceError, match="503"):
        store.exists("note")
    proxy.fail(0)
    with pytest.raises(ResourceError, match="NO_SUCH_BUCKET"):
        RunStore(f"s3://nobody{options(proxy.port)}", "x").write_text("note", "lost")


def test_about_a_minute_is_waited() -> None:
    assert 50 <= sum(retries.PAUSES) + 6 * (1 + len(retries.PAUSES)) <= 90


def test_a_second_driver_is_refused_and_the_lease_is_given_back(
    store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "SETTLE_SECONDS", 0.1)
    with store.locked() as notes:
        assert notes == []
        assert store.is_locked()
        lease = store.read_json("lease.json")
        assert (lease["host"], lease["pid"]) == (socket.gethostname(), os.getpid())
        monkeypatch.setenv("SFT_RAY_CACHE", str(tmp_path))  # as on another machine
        with (
            pytest.raises(ResourceError, match=f"is running on {lease['host']}, process"),
            RunStore(store.storage, "x").locked(),
        ):
            pass
        with pytest.raises(
            ResourceError, match="is running in this folder; wait for it or stop it"
        ):
            store.set_aside()
    assert not store.is_locked()
    assert not store.exists("lease.json")


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        ({"renewed": -89.0}, "running on elsewhere"),
        ({"renewed": -91.0}, "is gone; taking over"),
        ({"renewed": 0.0, "processes": _process_table(), "pid": 2**22 + 1}, "is gone; taking over"),
        ({"renewed": 0.0, "processes": _process_table()}, "running on elsewhere"),
        # A container that shares the name of its host numbers its processes itself.
        ({"renewed": 0.0, "host": socket.gethostname(), "pid": 2**22 + 1}, "running on"),
        ({"renewed": 0.0, "processes": "another", "pid": 2**22 + 1}, "running on elsewhere"),
        ({"renewed": "yesterday"}, "is gone; taking over"),
    ],
)
def test_a_dead_drivers_lease_is_taken_over(
    store: RunStore, change: dict[str, object], outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "SETTLE_SECONDS", 0.0)
    lease = {"host": "elsewhere", "pid": 1, "id": "other", **change}
    if isinstance(lease["renewed"], float):
        lease["renewed"] = time.time() + lease["renewed"]
    store.write_json("lease.json", lease)
    if "running" in outcome:
        assert store.is_locked()
        with pytest.raises(ResourceError, match=outcome), store.locked():
            pass
        assert store.read_json("lease.json") == lease
    else:
        assert not store.is_locked()
        with store.locked() as notes:
            assert outcome in notes[0]


def test_a_driver_whose_lease_was_taken_stops(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(run_lock, "RENEW_SECONDS", 0.1)
    theirs = {"host": "elsewhere", "pid": 7, "id": "other", "renewed": time.time()}
    taken = pytest.raises(ResourceError, match="on elsewhere, process 7 has taken the run over")
    with taken, store.locked():
        first = store.read_json("lease.json")["renewed"]
        time.sleep(0.5)
        assert store.read_json("lease.json")["renewed"] > first
        until = time.monotonic() + 10
        while not store.is_taken_over and time.monotonic() < until:
            store.write_json("lease.json", theirs)  # a renewal may be on its way
            time.sleep(0.05)
        with pytest.raises(ResourceError, match="another driver has taken"):
            store.push_journal()
        raise KeyboardInterrupt  # however it stops
    assert store.read_json("lease.json") == theirs


def test_uploads_do_not_hold_up_who_writes(proxy: Proxy) -> None:
    store = RunStore(f"s3://{BUCKET}/uploads{options(proxy.port)}", "x")
    proxy.delay = 0.5
    arrived: list[str] = []
    with Uploads(store) as uploads:
        began = time.monotonic()
        with uploads.replacing_folder("best", lambda: arrived.append("best")) as folder:
            (folder / "weights").write_text("some")
        assert time.monotonic() - began < 0.4
        assert arrived == []
        uploads.join()
        assert time.monotonic() - began > 0.9  # two files, one after the other
        assert arrived == ["best"]
        assert store.is_intact("best")
        with uploads.replacing_folder("last") as folder:
            (folder / "state").write_text("some")
    assert store.is_intact("last")
    assert threading.active_count() < 50


def test_a_mark_that_may_be_the_last_one_knows_of_its_model(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RunStore(f"s3://{BUCKET}/unfinished{options(proxy.port)}", "x")
    monkeypatch.setattr(worker, "save_model", lambda folder, *_: (folder / "w").write_text("some"))
    monkeypatch.setattr(worker, "save_predictions", lambda path, *_: path.write_text("some"))
    loaded = SimpleNamespace(
        setup=SimpleNamespace(task=find_task("text-classification")),
        experiment=SimpleNamespace(data=None),
        objective="accuracy",
    )
    best = SimpleNamespace(percent=33, score=0.5, weights={}, outputs=None)
    assignment = {"folder": "trials/0", "train": {"precision": "auto"}, "save_unfinished": True}
    with Uploads(store) as uploads:
        keeper = worker.Keeper(assignment, loaded, uploads)
        proxy.delay = 0.2
        keeper.consider(SimpleNamespace(best=best, finished=False))
        assert keeper.saved_percent == 33
        assert store.is_intact("trials/0/best")


class OneTrial:
    """A trial of two marks, of which the second ends it, in place of a mailbox and of training.

    Args:
        ended: called with each mark that ends a trial, before its workers hear of that.
    """

    def __init__(self, store: RunStore, ended: Callable[[], None]) -> None:
        self.posted, self._ended = list[int](), ended
        tools = SimpleNamespace(hex=lambda: "slot")
        self.mailbox = SimpleNamespace(
            _actor_id=tools,
            post=SimpleNamespace(remote=self.post),
            may_continue=SimpleNamespace(remote=lambda _, index: index < 2),
        )
        setup = SimpleNamespace(
            world=SimpleNamespace(rank=0),
            dataset=SimpleNamespace(with_training_share=lambda *_: None),
            on=lambda _: None,
            task=find_task("text-classification"),
        )
        self.loaded = worker.Loaded(
            experiment=Experiment.from_tree({**TREE, "checkpoint": {"every_minutes": 1e-9}}),
            setup=setup,
            store=store,
            objective="accuracy",
            mailbox=self.mailbox,
            pulse=SimpleNamespace(enter=lambda _: False),
        )

    def post(self, generation: int, index: int, message: dict[str, Any]) -> None:
        self.posted.append(index)
        if index == 1:
            self._ended()

    def fit(self, *_: Any, report: Callable[[Progress], bool], **__: Any) -> None:
        state = ResumeState({"weight": torch.zeros(3)}, {})
        for index, percent in enumerate((33, 67)):
            progress = Progress(index=index, percent=percent, resume_state=lambda: state)
            assert report(progress) == (index == 0)

    def run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(worker, "fit", self.fit)
        monkeypatch.setattr(worker, "ray", SimpleNamespace(get=lambda answer: answer))
        train = {"learning_rate": 1e-4}
        told = {"folder": "trials/0", "train": train, "seed": 17, "training_share": 1.0}
        told |= {"restarts": 0, "resumes": False, "halvings": 0, "most_examples": None}
        told |= {"end_diverged": False, "save_unfinished": False, "trunks_read": None}
        worker.run_trial(told, 1, self.loaded)


def test_no_state_arrives_behind_the_end_of_its_trial(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RunStore(f"s3://{BUCKET}/ended{options(proxy.port)}", "x")
    found: list[bool] = []

    def ended() -> None:  # the driver
        found.append(store.is_intact("trials/0/last"))
        store.delete_folder("trials/0/last")

    proxy.delay = 0.3
    trial = OneTrial(store, ended)
    trial.run(monkeypatch)
    assert trial.posted == [0, 1]
    assert found == [True]
    assert store.files_below("trials") == []


def test_a_state_that_cannot_be_written_is_told_with_the_next_mark(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "PAUSES", ())
    store = RunStore(f"s3://{BUCKET}/lost{options(proxy.port)}", "x")
    trial = OneTrial(store, lambda: None)
    proxy.fail(10**6, status=403)
    with pytest.raises(ResourceError, match="ACCESS_DENIED"):
        trial.run(monkeypatch)
    assert trial.posted == [0]


def test_a_failed_upload_is_raised_where_it_is_waited_for(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "PAUSES", ())
    store = RunStore(f"s3://{BUCKET}/failed{options(proxy.port)}", "x")
    with Uploads(store) as uploads:
        proxy.fail(10**6, status=403)
        with uploads.replacing_folder("best") as folder:
            (folder / "weights").write_text("some")
        with pytest.raises(ResourceError, match="ACCESS_DENIED"):
            uploads.join()
        proxy.fail(0)
        with uploads.replacing_folder("best") as folder:
            (folder / "weights").write_text("other")
    assert store.is_intact("best")


def test_no_file_of_a_run_holds_credentials(store: RunStore, port: int) -> None:
    write_experiment(store, Experiment.from_tree({**TREE, "storage": store.storage}))
    with store.locked():
        store.push_journal()
        for path in store.files_below(""):
            assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"].encode() not in store.read_bytes(path)
    assert names_below(port, f"{store.storage.partition('?')[0].split('/')[-1]}/x")
    assert json.loads(json.dumps(store.anchored())) == [store.storage, "x"]
