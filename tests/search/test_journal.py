"""The study's file cut, zeroed or changed anywhere: it opens, goes on, and opens again."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from sft_ray.analysis.outcome import Outcome
from sft_ray.config import Experiment
from sft_ray.journal import recovered
from sft_ray.recipes import default_recipe
from sft_ray.run_store import JOURNAL, RunStore
from sft_ray.search.study import STUDY_NAME, SearchStudy, open_storage


def opened(experiment: Experiment, store: RunStore) -> SearchStudy:
    return SearchStudy(
        experiment,
        open_storage(store.journal),
        recipe=default_recipe(22_000_000),
        num_layers=6,
        direction="maximize",
    )


def run_trials(study: SearchStudy, count: int) -> None:
    for _ in range(count):
        planned = study.next_trial()
        assert planned is not None
        study.mark(planned.number, 100, planned.number / 100, 1.0)
        outcome = Outcome(score=planned.number / 100, metrics={"accuracy": 0.5})
        study.finish(planned.number, TrialState.COMPLETE, outcome)


@pytest.fixture(scope="module")
def searched(
    tiny_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Experiment, bytes, list[dict[str, object]]]:
    """A study of three finished trials: its experiment, its file and its rows."""
    tree = tiny_experiment.to_tree()
    tree["search"] |= {"trials": 9, "sampler": "random"}
    experiment = Experiment.from_tree(tree)
    store = RunStore(str(tmp_path_factory.mktemp("journal")), "x")
    store.pull_journal()
    study = opened(experiment, store)
    run_trials(study, 3)
    return experiment, store.journal.read_bytes(), [study.row(n) for n in range(3)]


def test_cut_at_every_byte_of_the_last_two_records_it_goes_on(searched, tmp_path: Path) -> None:
    experiment, whole, rows = searched
    lines = whole.splitlines(keepends=True)
    ends = [len(whole) - len(b"".join(lines[-n:])) for n in (0, 1, 2)]
    ends[0] = len(whole)
    found: dict[bytes, RunStore] = {}
    for cut in range(len(b"".join(lines[-2:])) + 1):
        store = RunStore(str(tmp_path), f"at-{cut}")
        store.journal.parent.mkdir()
        store.journal.write_bytes(whole[: len(whole) - cut])
        notes = store.pull_journal()
        kept = store.journal.read_bytes()
        assert len(kept) == max(end for end in ends if end <= len(whole) - cut)
        assert whole.startswith(kept)
        torn = len(whole) - cut - len(kept)
        assert bool(notes) == bool(torn)
        if torn:
            [aside] = store.journal.parent.glob(f"{JOURNAL}.torn-*")
            assert aside.stat().st_size == torn
        found[kept] = store
    assert len(found) == 3  # whatever the byte, the file is one of these
    for store in found.values():
        study = opened(experiment, store)
        run_trials(study, 2)
        assert store.pull_journal() == []
        again = opened(experiment, store)
        assert len(again.trials) >= 4
        assert [again.row(n) for n in range(2)] == rows[:2]
        assert all(trial.state == TrialState.COMPLETE for trial in again.trials)


@pytest.mark.parametrize("known", ["all of it", "two thirds of it"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: bytes(len(content)),
        lambda content: b"",
        lambda content: content[:100] + bytes([content[100] ^ 1]) + content[101:],
        lambda content: content[:100] + bytes(200) + content[300:],
        lambda content: content[100:],
    ],
    ids=["half", "zeroed", "emptied", "changed", "zeroed middle", "beheaded"],
)
def test_the_last_good_copy_is_used_and_said(searched, tmp_path: Path, known, damage) -> None:
    experiment, whole, rows = searched
    lines = whole.splitlines(keepends=True)
    good = whole if known == "all of it" else b"".join(lines[: 2 * len(lines) // 3])
    store = RunStore(str(tmp_path), "x")
    store.write_good(JOURNAL, good)
    store.write_bytes(JOURNAL, damage(whole))
    records = store.read_journal()
    assert records is not None
    assert len(records) >= len(good.splitlines())
    [note] = store.pull_journal()
    assert note.startswith(f"{JOURNAL} was damaged")
    assert len(list(tmp_path.glob(f"x/{JOURNAL}.damaged-*"))) == 1
    assert store.journal.read_bytes().startswith(good)
    in_place = len(damage(whole)) == len(whole) and bytes(len(whole)) != damage(whole)
    if known == "all of it" or in_place:
        assert store.journal.read_bytes() == whole
    study = opened(experiment, store)
    run_trials(study, 2)
    again = opened(experiment, store)
    assert again.row(0) == rows[0]
    assert store.pull_journal() == []


def test_without_a_copy_what_lies_before_the_damage_is_used() -> None:
    assert recovered(b'{"a":1}\n\0\0\n{"b":2}\n', None) == b'{"a":1}\n'
    assert recovered(b"", b'{"a":1}\n') == b'{"a":1}\n'
    assert recovered(b'{"a":1}\n{"b":2}\n{"c', b'{"a":1}\n') == b'{"a":1}\n{"b":2}\n'


def test_a_copy_that_is_damaged_itself_is_not_used(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path), "x")
    store.write_bytes(JOURNAL, b'{"a":1}\n')
    for bad in (b"", b"\0\0\0", b'sha256 0\n{"b":2}\n'):
        store.write_bytes(f"{JOURNAL}.good", bad)
        assert store.read_good(JOURNAL) is None
        assert store.pull_journal() == []
    store.push_journal()
    assert store.read_good(JOURNAL) == b'{"a":1}\n'
    store.write_bytes(JOURNAL, b'{"a":1}\n{"b":2}\n')
    store.push_journal(now=False)  # just written
    store.push_journal()
    assert store.read_good(JOURNAL) == b'{"a":1}\n{"b":2}\n'


def test_an_object_store_is_asked_for_a_share_of_the_time_and_gets_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("sft_ray.journal.time.monotonic", lambda: clock[0])
    store = RunStore(f"file://{tmp_path}", "x")
    written: list[bytes] = []
    honest = store.write_bytes

    def slow(path: str, content: bytes) -> None:
        clock[0] += 1  # 2 s with the last-good copy
        written.append(content)
        honest(path, content)

    monkeypatch.setattr(store, "write_bytes", slow)
    store.journal.parent.mkdir(parents=True, exist_ok=True)
    store.journal.write_bytes(b'{"a":1}\n')
    store.push_journal()
    for _ in range(50):  # nothing is new
        clock[0] += 1
        store.push_journal(now=False)
    assert len(written) == 2
    pushed_at = []
    for second in range(60):
        with store.journal.open("ab") as file:
            file.write(b'{"b":2}\n')
        before = len(written)
        store.push_journal(now=False)
        if len(written) > before:
            pushed_at.append(second)
        clock[0] += 1
    assert 5 <= len(pushed_at) <= 8  # 2 s of every ten
    clock[0] += 30
    store.push_journal(now=False)
    assert store.read_bytes(JOURNAL) == store.journal.read_bytes()


def test_a_record_that_a_full_disk_tore_is_not_stored(searched, tmp_path: Path) -> None:
    experiment, whole, rows = searched
    store = RunStore(f"file://{tmp_path}", "x")
    torn = whole[: len(whole) - 7]
    store.journal.parent.mkdir(parents=True, exist_ok=True)
    store.journal.write_bytes(torn)
    store.push_journal()
    kept = store.read_bytes(JOURNAL)
    assert kept is not None
    assert kept == torn[: torn.rindex(b"\n") + 1]
    store.write_good(JOURNAL, torn)  # as earlier versions did
    store.pull_journal()
    study = opened(experiment, store)
    assert [study.row(n) for n in range(2)] == rows[:2]
    run_trials(study, 1)
    store.push_journal()
    again = RunStore(f"file://{tmp_path}", "x")
    assert again.pull_journal() == []
    assert len(opened(experiment, again).trials) >= 3


def test_optuna_alone_reads_the_study_while_its_search_goes_on(searched, tmp_path: Path) -> None:
    experiment, _, _ = searched
    store = RunStore(str(tmp_path), "x")
    store.pull_journal()
    study = opened(experiment, store)
    run_trials(study, 2)
    planned = study.next_trial()
    assert planned is not None
    study.mark(planned.number, 10, 0.25, 1.0)
    written = store.journal.read_bytes()
    beside = sorted(store.journal.parent.iterdir())
    backend = optuna.storages.journal.JournalFileBackend(str(store.journal))
    storage = optuna.storages.JournalStorage(backend)
    assert optuna.get_all_study_names(storage) == [STUDY_NAME]
    seen = optuna.load_study(study_name=STUDY_NAME, storage=storage)

    def told(trials: list[FrozenTrial]) -> list[tuple[object, ...]]:
        return [(t.state, t.values, t.params, t.intermediate_values, t.user_attrs) for t in trials]

    assert told(seen.trials) == told(study.trials)
    assert [t.state.name for t in seen.trials] == ["COMPLETE", "COMPLETE", "RUNNING"]
    assert [t.values for t in seen.trials] == [[0.0], [0.01], None]
    assert seen.trials[2].intermediate_values == {10: 0.25}
    assert store.journal.read_bytes() == written
    assert sorted(store.journal.parent.iterdir()) == beside
    study.finish(planned.number, TrialState.PRUNED, Outcome(reason="rung 10", score=0.25))
    run_trials(study, 1)
    assert told(seen.trials) == told(study.trials)
    assert [t.state.name for t in seen.trials] == ["COMPLETE", "COMPLETE", "PRUNED", "COMPLETE"]
    assert [t.value for t in seen.trials] == [0.0, 0.01, 0.25, 0.03]
    assert seen.best_trial.number == 3
