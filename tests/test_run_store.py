import errno
import fcntl
import json
import multiprocessing
from pathlib import Path
from typing import Any

import optuna
import pytest

from sft_ray.config import Experiment
from sft_ray.errors import ConfigError, ResourceError
from sft_ray.folder_rule import check_folder_rule
from sft_ray.run_store import JOURNAL, RunStore, write_experiment
from sft_ray.search.study import open_storage

TREE = {"name": "x", "model": "m", "data": {"path": "d"}, "search": {"trials": 4}}


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(str(tmp_path / "runs"), "x")


def test_files_are_replaced_as_a_whole(store: RunStore) -> None:
    store.write_json("a/b.json", {"old": True})
    with pytest.raises(ValueError, match="JSON"):
        store.write_json("a/b.json", {"bad": float("nan")})
    assert store.read_json("a/b.json") == {"old": True}
    store.write_json("a/b.json", {"new": 1})
    assert store.read_json("a/b.json") == {"new": 1}
    assert [p.name for p in Path(store.location, "a").iterdir()] == ["b.json"]
    assert store.read_text("nothing") is None


def test_a_damaged_json_file_is_named(store: RunStore) -> None:
    store.write_text("a.json", '{"half": ')
    with pytest.raises(ConfigError, match=r"x/a\.json: damaged JSON"):
        store.read_json("a.json")


def test_a_folder_appears_whole_or_not_at_all(store: RunStore) -> None:
    with store.replacing_folder("best") as folder:
        (folder / "weights").write_text("first")
    with pytest.raises(ZeroDivisionError), store.replacing_folder("best") as folder:
        (folder / "weights").write_text(str(1 / 0))
    assert store.read_text("best/weights") == "first"
    with store.replacing_folder("best") as folder:
        (folder / "other").write_text("third")
    assert sorted(p.name for p in Path(store.location).iterdir()) == ["best"]
    assert store.read_text("best/weights") is None
    with store.replacing_folder("copy") as folder:
        store.fetch_folder("best", folder)
    assert store.read_text("copy/other") == "third"


def test_a_second_driver_is_kept_out_and_a_dead_one_holds_nothing(store: RunStore) -> None:
    with (
        store.locked(),
        pytest.raises(ResourceError, match="another search is running"),
        RunStore(store.storage, "x").locked(),
    ):
        pass
    process = multiprocessing.get_context("spawn").Process(target=_die_holding, args=(store,))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    with store.locked():
        assert True


def _die_holding(store: RunStore) -> None:
    import os

    with store.locked():
        os._exit(9)


def test_a_file_in_the_way_of_the_storage_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ResourceError, match="cannot be written"),
        RunStore(str(tmp_path / "file"), "x").locked(),
    ):
        pass


def test_where_no_folder_can_be_made_is_told_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for storage in (file, file / "below"):
        with pytest.raises(ResourceError, match=r"storage: .*file is no folder that can be writ"):
            RunStore(str(storage), "x").check_writable()
    RunStore(str(tmp_path / "new" / "newer"), "x").check_writable()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(ResourceError, match=r"storage: .*: File name too long; name another"):
        RunStore(str(tmp_path / ("n" * 300)), "x").check_writable()
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    with pytest.raises(ResourceError, match="is no folder that can be written to"):
        RunStore(str(tmp_path / "new"), "x").check_writable()
    away = "s3://bucket/x?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1"
    RunStore(away, "x").check_writable()  # is asked when a search starts


def test_an_old_folder_is_set_aside_never_deleted(store: RunStore) -> None:
    for expected in ("x.old-1", "x.old-2"):
        store.write_text("note", expected)
        assert store.set_aside() == expected
        assert RunStore(store.storage, expected).read_text("note") == expected
    assert not store.is_there()


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        ({}, "same"),
        ({"search": {"trials": 9}}, "extended"),
        ({"search": {"trials": 4, "budget": {"wall_minutes": None}}}, "same"),
        ({"storage": "elsewhere", "name": "renamed"}, "same"),
    ],
)
def test_the_same_experiment_goes_on(
    store: RunStore, change: dict[str, object], outcome: str
) -> None:
    assert check_folder_rule(store, Experiment.from_tree(TREE)) == "new"
    write_experiment(store, Experiment.from_tree(TREE))
    assert check_folder_rule(store, Experiment.from_tree({**TREE, **change})) == outcome


def test_what_is_enqueued_may_grow_at_its_end(store: RunStore) -> None:
    first, second = {"train.epochs": 2}, {"train.epochs": 3}
    trees = [
        {**TREE, "search": {"enqueue": e}} for e in ([first], [first, second], [second, first], [])
    ]
    write_experiment(store, Experiment.from_tree(trees[0]))
    assert check_folder_rule(store, Experiment.from_tree(trees[1])) == "extended"
    for tree in trees[2:]:
        with pytest.raises(ConfigError, match=r"search.enqueue is .* there"):
            check_folder_rule(store, Experiment.from_tree(tree))


@pytest.mark.parametrize("target", [0.95, 0.85, None])
def test_a_target_that_was_reached_may_be_another(store: RunStore, target: float | None) -> None:
    """Which of two is more depends on the metric."""
    for there, here, outcome in ((0.9, target, "extended"), (0.9, 0.9, "same")):
        trees = [{**TREE, "search": {"budget": {"target": value}}} for value in (there, here)]
        write_experiment(store, Experiment.from_tree(trees[0]))
        assert check_folder_rule(store, Experiment.from_tree(trees[1])) == outcome
    write_experiment(store, Experiment.from_tree({**TREE, "search": {}}))
    with pytest.raises(ConfigError, match=r"search.budget.target is None there and 0.9 here"):
        check_folder_rule(store, Experiment.from_tree(trees[0]))


def test_a_confirmation_may_be_added_changed_and_left_out(store: RunStore) -> None:
    tree, plan = {**TREE, "seed": 3}, {"top": 2, "seeds": 4}
    for there, here in ((None, plan), (plan, {"top": 5, "seeds": 2}), (plan, None)):
        write_experiment(store, Experiment.from_tree({**tree, "confirm": there}))
        changed = Experiment.from_tree({**tree, "confirm": here})
        assert check_folder_rule(store, changed) == "same"
        with pytest.raises(ConfigError) as caught:
            check_folder_rule(store, changed.model_copy(update={"seed": 4}))
        assert len(caught.value.problems) == 2  # the seed, and the two ways out


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"seed": 1}, "seed is 17 there and 1 here"),
        ({"search": {"trials": 3}}, "search.trials is 4 there and 3 here"),
        ({"search": {"trials": 4, "budget": {"wall_minutes": 5}}}, "search.budget.wall_minutes"),
        ({"search": {"trials": 4, "space": {"train.epochs": 2}}}, "search.space"),
    ],
)
def test_another_experiment_is_refused_with_both_ways_out(
    store: RunStore, change: dict[str, object], difference: str
) -> None:
    write_experiment(store, Experiment.from_tree(TREE))
    with pytest.raises(ConfigError) as caught:
        check_folder_rule(store, Experiment.from_tree({**TREE, **change}))
    assert difference in str(caught.value)
    assert "name=" in caught.value.problems[-1]
    assert "--fresh" in caught.value.problems[-1]


def test_a_journal_torn_at_any_byte_opens_and_goes_on(store: RunStore, tmp_path: Path) -> None:
    store.pull_journal()
    study = optuna.create_study(storage=open_storage(store.journal), study_name="s")
    for _ in range(3):
        trial = study.ask()
        study.tell(trial, trial.suggest_float("x", 0, 1))
    whole = store.journal.read_bytes()
    last_two_records = len(b"".join(whole.splitlines(keepends=True)[-2:]))
    for cut in range(1, last_two_records + 1):
        torn = RunStore(str(tmp_path / "torn"), f"at-{cut}")
        torn.pull_journal()
        torn.journal.write_bytes(whole[:-cut])
        torn.pull_journal()
        kept = torn.journal.read_bytes()
        assert whole.startswith(kept)
        assert kept.endswith(b"\n")
        assert all(json.loads(line) for line in kept.splitlines())
    for _ in range(2):  # the shortest one: two more trials, then open again
        reopened = optuna.load_study(storage=open_storage(torn.journal), study_name="s")
        before = len(reopened.trials)
        trial = reopened.ask()
        reopened.tell(trial, trial.suggest_float("x", 0, 1))
        assert len(reopened.trials) == before + 1


def test_zeroed_and_doubled_ends_of_a_journal_are_set_aside(store: RunStore) -> None:
    store.write_text(JOURNAL, '{"a":1}\n{"b":2}\n\x00\x00\x00\n')
    store.pull_journal()
    assert store.journal.read_text() == '{"a":1}\n{"b":2}\n'
    assert len(list(Path(store.location).glob("*.torn-*"))) == 1


def test_a_lock_that_may_not_be_looked_at_says_nothing(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path), "x")
    assert store.is_locked() is False
    (tmp_path / "x" / ".lock").mkdir(parents=True)  # opening it fails, also for root
    assert store.is_locked() is None
    with pytest.raises(ResourceError, match="whether a search runs there cannot be seen"):
        store.set_aside()


def test_a_look_at_the_lock_does_not_ask_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS refuses an exclusive lock on a file that is open for reading."""
    store, flock = RunStore(str(tmp_path), "x"), fcntl.flock

    def of_nfs(file: Any, how: int) -> None:
        if how & fcntl.LOCK_EX and file.mode == "r":
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", of_nfs)
    with store.locked():
        assert RunStore(str(tmp_path), "x").is_locked() is True
    assert store.is_locked() is False
