"""Frozen layers that are computed once give what they give when they are computed each time."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sft_ray.config import Train
from sft_ray.training import trunk_cache
from sft_ray.training.batches import Trunk
from sft_ray.training.beat import Beat, no_beat
from sft_ray.training.compiled import CompiledLayers
from sft_ray.training.encoding import IntArray
from sft_ray.training.examples import Dataset
from sft_ray.training.families import FAMILIES
from sft_ray.training.fitting import Trial, fit
from sft_ray.training.forward import evaluate
from sft_ray.training.progress import Progress
from sft_ray.training.resume_state import ResumeState
from sft_ray.training.setup import Setup
from sft_ray.training.tasks import TASKS
from sft_ray.training.trunk_cache import Costs, Rates, TrunkCache, make_room, trunks_root
from sft_ray.training.world import World
from tests.models import (
    PAD,
    TASK,
    load_tiny,
    task_dataset,
    tiny_model_folder,
    tiny_tokenizer,
    toy_dataset,
)

LAYERS = 3
FP32 = torch.float32
PER_TOKEN = ("token-classification", "question-answering")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFT_RAY_CACHE", str(tmp_path / "cache"))
    return trunks_root()


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Dataset:
    return toy_dataset(tmp_path_factory.mktemp("toy"), tiny_bert, train=96, validation=48)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("bert"), "bert", LAYERS)


@pytest.fixture(scope="module", params=list(FAMILIES))
def family_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp(request.param), request.param, LAYERS)


@pytest.fixture(scope="module")
def of_task(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> dict[str, Dataset]:
    folder = tmp_path_factory.mktemp("tasks")
    return {
        name: task_dataset(folder / name, name, tiny_bert, train=24, validation=24)
        for name in ("text-classification", *PER_TOKEN)
    }


def setup_of(
    folder: Path,
    dataset: Dataset,
    *,
    others: float = 0.0,
    depths: tuple[int, ...] = (),
    budget: int | None = None,
) -> Setup:
    pretrained = load_tiny(folder, dataset)
    tokenizer = tiny_tokenizer(folder)
    cache = TrunkCache(pretrained, dataset, World(), PAD, budget, others, depths)
    return Setup(TASK, dataset, pretrained, tokenizer, World(), trunk_cache=cache)


def run(
    setup: Setup,
    *,
    told: str | None = None,
    resume: ResumeState | None = None,
    most: int = 99,
    beat: Beat = no_beat,
    paused: list[ResumeState | None] | None = None,
    **settings: object,
) -> list[Progress]:
    marks: list[Progress] = []
    fixed = {"learning_rate": 1e-3, "epochs": 3, "batch_size": 16, "dropout": 0.0}
    train = Train.model_validate({**fixed, "precision": "fp32", **settings})
    state = fit(
        train,
        setup,
        objective="accuracy",
        rungs=[10, 33],
        seed=3,
        beat=beat,
        report=lambda progress: marks.append(progress) or len(marks) < most,
        resume=resume,
        trunks_read=told,
    )
    if paused is not None:
        paused.append(state)
    return marks


def kept(root: Path) -> set[str]:
    """Complete trunks by split and depth."""
    return {path.parent.name for path in root.glob(f"*/*/{trunk_cache.COMPLETE}")}


@pytest.mark.parametrize(("family", "k"), [*((family, 2) for family in FAMILIES), ("bert", LAYERS)])
def test_a_trial_on_cached_outputs_is_the_trial_without(
    family: str, k: int, toy: Dataset, tmp_path: Path, root: Path
) -> None:
    setup = setup_of(tiny_model_folder(tmp_path / "model", family, LAYERS), toy)
    cached = run(setup, frozen_layers=k)
    assert kept(root) == {f"train-{k}", f"validation-{k}"}
    plain = run(replace(setup, trunk_cache=None), frozen_layers=k)
    assert [mark.step for mark in cached] == [mark.step for mark in plain]
    for mine, theirs in zip(cached, plain, strict=True):
        assert mine.train_loss == pytest.approx(theirs.train_loss, abs=1e-5)
        assert mine.metrics["loss"] == pytest.approx(theirs.metrics["loss"], abs=1e-5)
    np.testing.assert_allclose(cached[-1].best.outputs, plain[-1].best.outputs, atol=1e-4)


def test_bf16_is_kept_as_it_is(toy: Dataset, bert: Path, root: Path) -> None:
    setup = setup_of(bert, toy)
    settings = {"frozen_layers": 2, "precision": "bf16"}
    made, found = (run(setup, **settings) for _ in range(2))
    plain = run(replace(setup, trunk_cache=None), **settings)
    trunk = setup.trunk_cache.open(["train"], 2, torch.bfloat16, no_beat)["train"]
    assert sum(chunk.nbytes for chunk in trunk.maps) == 2 * 32 * len(toy.train.tokens)
    for one, again, without in zip(made, found, plain, strict=True):
        assert one.train_loss == again.train_loss
        assert one.train_loss == pytest.approx(without.train_loss, abs=1e-2)


@pytest.mark.parametrize("k", [2, 3])
def test_layers_above_cached_outputs_can_be_compiled(
    k: int, toy: Dataset, bert: Path, root: Path
) -> None:
    setup = setup_of(bert, toy)
    setup.pretrained.compiled = CompiledLayers("eager")
    settings = {"frozen_layers": k, "precision": "fp32"}
    plain, found = (run(setup, compile=chosen, **settings) for chosen in (False, True))
    assert f"train-{k}" in kept(root)
    assert [mark.train_loss for mark in found] == pytest.approx(
        [mark.train_loss for mark in plain], abs=1e-5
    )
    assert setup.pretrained.compiled.works
    # Where no layer runs there is nothing to fill up for.
    assert (found[-1].padding_share > 0) == (k < LAYERS)


@pytest.mark.parametrize("name", ["text-classification", *PER_TOKEN])
def test_validation_logits_are_equal_at_every_depth_of_every_family(
    family_folder: Path, name: str, of_task: dict[str, Dataset], root: Path
) -> None:
    """Made from nothing, and from fewer layers."""
    task, dataset = TASKS[name], of_task[name]
    pretrained = load_tiny(family_folder, dataset, task=task)
    cache = TrunkCache(pretrained, dataset, World(), PAD)
    arguments = (pretrained.model, task, dataset.validation, PAD, World(), FP32, no_beat)
    plain = evaluate(*arguments)
    for k in (LAYERS, *range(1, LAYERS)):
        pretrained.reset(k)
        trunk = cache.open(["validation"], k, FP32, no_beat)["validation"]
        assert trunk.depth == k
        assert (trunk.most_tokens == 1) == (k == LAYERS and name not in PER_TOKEN)
        np.testing.assert_allclose(evaluate(*arguments, trunk), plain, atol=1e-5)


def test_the_same_numbers_whether_found_or_made_and_from_whatever_depth(
    toy: Dataset, bert: Path, root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Bit by bit; a depth made from a shallower one, too."""
    setup = setup_of(bert, toy)
    alone = run(setup, frozen_layers=2)
    found = run(setup, frozen_layers=2)
    monkeypatch.setenv("SFT_RAY_CACHE", str(tmp_path / "other"))
    run(setup, frozen_layers=1)
    began = trunk_cache._Build(setup.trunk_cache, "train", 2, FP32).deepest_below()
    assert began is not None
    assert began.depth == 1
    chained = run(setup, frozen_layers=2)
    for other in (found, chained):
        assert [m.train_loss for m in other] == [m.train_loss for m in alone]
        assert [m.metrics for m in other] == [m.metrics for m in alone]


def test_a_share_of_the_training_rows_reads_its_own(toy: Dataset, bert: Path, root: Path) -> None:
    setup = setup_of(bert, toy)
    part = replace(setup, dataset=toy.with_training_share(0.8, 1))
    assert len(part.dataset.train) < len(toy.train)
    cached = run(part, frozen_layers=2)
    assert kept(root) == {"train-2", "validation-2"}
    plain = run(replace(part, trunk_cache=None), frozen_layers=2)
    for mine, theirs in zip(cached, plain, strict=True):
        assert mine.train_loss == pytest.approx(theirs.train_loss, abs=1e-5)


@pytest.mark.parametrize("told", ["none", "train", "validation", "train+validation"])
def test_a_trial_reads_what_it_is_told_whatever_pays(
    told: str, toy: Dataset, bert: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = setup_of(bert, toy)
    decided = run(setup, frozen_layers=2)
    assert {mark.trunks_read for mark in decided} == {"train+validation"}
    monkeypatch.setattr(TrunkCache, "pays", lambda *_, **__: told == "none")  # costs say otherwise
    marks = run(setup, told=told, frozen_layers=2)
    assert {mark.trunks_read for mark in marks} == {told}
    state = run(setup, told=told, most=1, frozen_layers=2)[0].resume_state()
    rest = run(setup, resume=state, frozen_layers=2)
    assert {mark.trunks_read for mark in rest} == {told}
    assert [mark.train_loss for mark in rest] == [mark.train_loss for mark in marks[1:]]
    assert run(setup, frozen_layers=0)[-1].trunks_read is None
    assert run(replace(setup, trunk_cache=None), frozen_layers=2)[-1].trunks_read == "none"


def test_what_a_pause_keeps_from_being_made_is_read_by_who_goes_on(
    toy: Dataset, bert: Path, root: Path
) -> None:
    whole = run(setup_of(bert, toy), frozen_layers=2)
    assert whole[0].trunks_read == "train+validation"
    shutil.rmtree(root)
    paused: list[ResumeState | None] = []
    assert run(setup_of(bert, toy), beat=lambda _: True, paused=paused, frozen_layers=2) == []
    assert not kept(root)  # the building gave way
    rest = run(setup_of(bert, toy), resume=paused[0], frozen_layers=2)
    assert [mark.trunks_read for mark in rest] == [mark.trunks_read for mark in whole]
    assert [mark.train_loss for mark in rest] == [mark.train_loss for mark in whole]


def test_nothing_is_kept_that_does_not_pay(toy: Dataset, bert: Path, root: Path) -> None:
    once = setup_of(bert, toy)
    run(once, frozen_layers=2, epochs=1)
    assert kept(root) == set()
    more = replace(once.trunk_cache, others_per_depth=4)
    run(replace(once, trunk_cache=more), frozen_layers=2, epochs=1)
    assert kept(root) == {"train-2", "validation-2"}
    run(once, frozen_layers=0)
    assert kept(root) == {"train-2", "validation-2"}


def test_costs_follow_from_what_is_computed_and_moved() -> None:
    rates = Rates(flops=100.0, written=10.0, read=50.0)
    costs = Costs.of(rates, flops=400.0, num_bytes=10)
    assert (costs.compute, costs.write, costs.read) == (4.0, 1.0, 0.2)
    assert [costs.pays(passes) for passes in (1, 1.3, 1.4)] == [False, False, True]
    on_the_way = [costs.pays(passes, is_on_the_way=True) for passes in (0.3, 0.32)]
    assert on_the_way == [False, True]
    dear = Costs.of(rates, flops=10.0, num_bytes=10)
    assert not dear.pays(1000)


def test_a_budget_of_nothing_keeps_nothing(toy: Dataset, bert: Path, root: Path) -> None:
    assert len(run(setup_of(bert, toy, budget=0), frozen_layers=2)) == 4
    assert not root.exists()


def test_a_depth_is_kept_with_both_splits_or_not_at_all(
    toy: Dataset, bert: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, wrote = trunk_cache._write, []

    def write(path: Path, hidden_TH: torch.Tensor) -> None:
        wrote.append(path)
        honest(path, hidden_TH)

    monkeypatch.setattr(trunk_cache, "_write", write)
    both = setup_of(bert, toy).trunk_cache.num_bytes(2, FP32)
    run(setup_of(bert, toy, budget=both - 1), frozen_layers=2)
    assert wrote == []
    assert not root.exists()
    for k in (1, 2, 2):
        run(setup_of(bert, toy, budget=both), frozen_layers=k)
        assert kept(root) == {f"train-{k}", f"validation-{k}"}
    assert len(wrote) == len({*wrote})  # the last has found both


def test_a_free_disk_without_room_for_a_depth_keeps_none(
    toy: Dataset, bert: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = setup_of(bert, toy).trunk_cache
    free = round(cache.num_bytes(2, FP32) / trunk_cache.FREE_SHARE)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    assert cache.pays("train", 2, FP32, 3)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free - 4))
    assert not cache.pays("train", 2, FP32, 3)
    assert not root.exists()


@pytest.mark.parametrize(("fit", "uses"), [(0.9, 0), (1, 4 / 3), (2.5, 2), (3, 4), (4, 5), (9, 5)])
def test_outputs_are_used_less_often_where_others_take_their_room(
    toy: Dataset, bert: Path, fit: float, uses: float
) -> None:
    one = setup_of(bert, toy).trunk_cache.num_bytes(2, FP32)
    cache = setup_of(bert, toy, others=4, depths=(1, 2, 3, 4), budget=int(fit * one)).trunk_cache
    assert cache.likely_uses(2, FP32) == pytest.approx(uses)
    assert cache.pays("train", 2, FP32, 0.9) == (uses > 1.5)
    assert replace(cache, others_per_depth=0.2).likely_uses(2, FP32) == min(uses, 1.2)


def test_a_deeper_trunk_is_made_from_the_one_whose_room_it_takes(
    toy: Dataset, bert: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, began = trunk_cache._Build._compute, []

    def compute(build: Any, items: IntArray, below: Trunk | None) -> torch.Tensor:
        began.append((build.depth, below and below.depth))
        return honest(build, items, below)

    monkeypatch.setattr(trunk_cache._Build, "_compute", compute)
    budget = setup_of(bert, toy).trunk_cache.num_bytes(2, FP32)
    for k in (1, 2):
        run(setup_of(bert, toy, budget=budget), frozen_layers=k)
    assert kept(root) == {"train-2", "validation-2"}
    assert {*began} == {(1, None), (2, 1)}


def test_outputs_that_others_will_ask_for_are_made_on_the_way(
    toy: Dataset, bert: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every layer computes its outputs once, and the numbers stay the same, bit by bit."""
    alone = run(setup_of(bert, toy), frozen_layers="all")
    shutil.rmtree(root)
    honest, made = trunk_cache._Build._compute, []

    def compute(build: Any, items: IntArray, below: Trunk | None) -> torch.Tensor:
        made.append((build.split, build.depth, below and below.depth))
        return honest(build, items, below)

    monkeypatch.setattr(trunk_cache._Build, "_compute", compute)
    setup = setup_of(bert, toy, others=3.0, depths=(1, 2, 3))
    found = run(setup, frozen_layers="all")
    assert [m.train_loss for m in found] == [m.train_loss for m in alone]
    assert [m.metrics for m in found] == [m.metrics for m in alone]
    steps = {(split, k, k - 1 or None) for split in ("train", "validation") for k in (1, 2, 3)}
    assert {*made} == steps
    count = len(made)
    for k in (1, 2):
        run(setup, frozen_layers=k)
    assert len(made) == count
    assert kept(root) == {f"{split}-{k}" for split in ("train", "validation") for k in (1, 2, 3)}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"depths": (1, 3)}, {1, 3}),  # which no trial asks for
        ({"others": 1.0}, {2, 3}),  # one layer takes less than a file of such a small model
        ({"others": 0.0}, {3}),  # of a single training
        ({"depths": ()}, {3}),
        ({"budget": 2.5}, {3}),  # no room for all
        ({"budget": 2.5, "others": 1.5}, {3}),  # nor if what there is lasts for so few trials
    ],
)
def test_only_what_pays_is_made_on_the_way(
    toy: Dataset, bert: Path, root: Path, changes: dict[str, Any], expected: set[int]
) -> None:
    settings = {"others": 3.0, "depths": (1, 2, 3), **changes}
    if "budget" in settings:
        one = setup_of(bert, toy).trunk_cache.num_bytes(2, FP32)
        settings["budget"] = int(settings["budget"] * one)
    run(setup_of(bert, toy, **settings), frozen_layers="all")
    assert kept(root) == {f"{split}-{k}" for split in ("train", "validation") for k in expected}


def test_machines_that_share_a_folder_take_nothing_from_each_other(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as there:
        there.setattr("socket.gethostname", lambda: "other")
        theirs = trunks_root() / "key" / "train-1"
        assert make_room({theirs: 100}, 100)
    assert make_room({root / "key" / "train-2": 100}, 100)
    assert theirs.exists()


def test_what_a_machine_that_is_gone_has_left_is_removed(root: Path) -> None:
    lately, long_ago = (time.time() - days * 86400 for days in (29, 31))
    gone, back, new = (root.parent / name for name in ("gone", "back", "new"))
    for host in (gone, back, new):
        (host / "key" / "train-1").mkdir(parents=True)
    for host, used in ((gone, long_ago), (back, lately)):
        (host / trunk_cache.USED).touch()
        os.utime(host / trunk_cache.USED, (used, used))
        os.utime(host, (long_ago, long_ago))
    assert make_room({root / "key" / "train-1": 100}, 100)
    assert [host.exists() for host in (gone, back, new)] == [False, True, True]


def test_what_was_used_longest_ago_makes_way(root: Path) -> None:
    folders = [root / "key" / f"train-{k}" for k in range(4)]
    for age, folder in enumerate(folders[:3]):
        assert make_room({folder: 100}, 300)
        os.utime(folder / trunk_cache.USED, (1000 + age, 1000 + age))
    os.utime(folders[0] / trunk_cache.USED, (2000, 2000))
    assert make_room({folders[3]: 150}, 300)
    assert [folder.exists() for folder in folders] == [True, False, False, True]
    assert not make_room({root / "key" / "train-9": 301}, 300)
    assert [folder.exists() for folder in folders] == [True, False, False, True]


def test_whether_outputs_are_read_does_not_depend_on_what_others_have_left(
    toy: Dataset, bert: Path, root: Path
) -> None:
    often, seldom = (setup_of(bert, toy) for _ in range(2))
    alone = run(seldom, frozen_layers=2, epochs=1)
    for k in (1, 2):
        run(often, frozen_layers=k)
    assert kept(root) == {"train-1", "validation-1", "train-2", "validation-2"}
    beside = run(seldom, frozen_layers=2, epochs=1)
    assert [mark.train_loss for mark in beside] == [mark.train_loss for mark in alone]


def test_who_loses_the_room_while_building_leaves_nothing(
    toy: Dataset, bert: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trunk_cache, "CHUNK_TOKENS", 64)
    setup, written = setup_of(bert, toy), []

    def beat(what: str) -> bool:
        written.append(what)
        if len(written) == 3:
            assert make_room({root / "other" / "train-1": 10**9}, 10**9)
        return False

    assert setup.trunk_cache.open(["train"], 2, FP32, beat) == {}
    assert len(written) == 3
    assert {path.name for path in root.glob("*/*/")} == {"train-1"}
    (root / "key" / "train-5").mkdir(parents=True)  # of who wrote on all the same
    assert make_room({root / "other" / "train-2": 100}, 10**9 + 100)
    assert {path.name for path in root.glob("*/*/")} == {"train-1", "train-2"}


def test_what_measuring_left_behind_goes_when_room_is_made(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for name, age in (("rates-old", 7200), ("rates-new", 0)):
        (root / name).write_bytes(b"x")
        os.utime(root / name, (time.time() - age,) * 2)
    assert make_room({root / "key" / "train-1": 1}, 10)
    assert {path.name for path in root.glob("rates-*")} == {"rates-new"}


def test_a_full_disk_where_rates_are_measured_stops_no_trial(
    toy: Dataset, bert: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trunk_cache, "RATES", {})
    monkeypatch.setattr(trunk_cache, "_write", full)
    assert len(run(setup_of(bert, toy), frozen_layers=2)) == 4
    assert kept(root) == set()


def test_a_torn_file_is_made_again(toy: Dataset, bert: Path, root: Path) -> None:
    setup = setup_of(bert, toy)
    whole = run(setup, frozen_layers=2)
    torn = next(root.glob("*/train-2/*.arrow"))
    torn.write_bytes(torn.read_bytes()[:-20])
    without = run(setup, frozen_layers=2)
    assert kept(root) == {"validation-2"}
    assert without[-1].train_loss == pytest.approx(whole[-1].train_loss, abs=1e-5)
    again = run(setup, frozen_layers=2)
    assert kept(root) == {"train-2", "validation-2"}
    assert [m.metrics for m in again] == [m.metrics for m in whole]


def test_making_a_trunk_is_no_training(
    toy: Dataset, bert: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, wrote = trunk_cache._write, []

    def slow(path: Path, hidden_TH: torch.Tensor) -> None:
        time.sleep(0.5)
        wrote.append(path)
        honest(path, hidden_TH)

    monkeypatch.setattr(trunk_cache, "_write", slow)
    first, second = (run(setup_of(bert, toy), frozen_layers=2)[-1] for _ in range(2))
    assert wrote
    assert first.trunk_seconds > 0.5 * len(wrote) > second.trunk_seconds
    assert first.train_seconds - second.train_seconds < 0.5 * len(wrote)


def test_a_trial_that_goes_on_adds_what_opening_trunks_takes(
    toy: Dataset, bert: Path, root: Path
) -> None:
    train, setup = Train(precision="fp32", frozen_layers=2, epochs=3), setup_of(bert, toy)
    first = Trial(train, setup, "accuracy", 3)
    before, state = first.clock.seconds["trunk"], first.state()
    assert kept(root) == {"train-2", "validation-2"}
    shutil.rmtree(root)
    again = Trial(train, setup, "accuracy", 3)
    anew = again.clock.seconds["trunk"]
    again.restore(state)
    assert again.clock.seconds["trunk"] == before + anew
    assert min(before, anew) > 0


def test_a_torn_trunk_keeps_no_deeper_one_from_being_kept(
    toy: Dataset, bert: Path, root: Path
) -> None:
    setup = setup_of(bert, toy)
    run(setup, frozen_layers=1)
    for torn in root.glob("*/train-1/*.arrow"):
        torn.write_bytes(torn.read_bytes()[:-20])
    run(setup, frozen_layers=2)
    assert kept(root) == {"validation-1", "train-2", "validation-2"}


def test_a_pause_that_is_asked_for_is_not_kept_waiting(
    toy: Dataset, bert: Path, root: Path
) -> None:
    setup = setup_of(bert, toy)
    said: list[str] = []
    opened = setup.trunk_cache.open(["train"], 2, FP32, lambda what: not said.append(what))
    assert opened == {}
    assert said == [trunk_cache.BUILDING]
    assert kept(root) == set()


def _build(folder: str, dataset: Dataset, cache: str, slow: bool, rank: int, out) -> None:
    os.environ["SFT_RAY_CACHE"] = cache
    torch.set_num_threads(1)
    trunk_cache.CHUNK_TOKENS = 64
    setup = setup_of(Path(folder), dataset)
    cached = replace(setup.trunk_cache, world=World(rank=rank, size=3))
    honest = trunk_cache._write

    def write(path: Path, hidden_TH: torch.Tensor) -> None:
        if slow:
            path.with_name(f"{path.name}.tmp-0").write_bytes(b"begun")
            time.sleep(1000)
        honest(path, hidden_TH)
        out.put((rank, path.name))

    trunk_cache._write = write
    setup.pretrained.reset(2)
    opened = cached.open(["train"], 2, FP32, no_beat)
    out.put((rank, "opened" if opened else "none"))


@pytest.mark.timeout(900)
def test_several_build_together_and_one_that_is_killed_leaves_its_part(
    toy: Dataset, bert: Path, root: Path
) -> None:
    context = multiprocessing.get_context("spawn")
    out = context.Queue()

    def start(rank: int, *, slow: bool = False) -> multiprocessing.Process:
        arguments = (str(bert), toy, os.environ["SFT_RAY_CACHE"], slow, rank, out)
        process = context.Process(target=_build, args=arguments, daemon=True)
        process.start()
        return process

    stuck = start(0, slow=True)
    while not list(root.glob("*/train-2/*.lock")):
        time.sleep(0.02)
    others = [start(1), start(2)]
    time.sleep(1.0)
    assert all(process.is_alive() for process in others)  # they wait for the one that is stuck
    os.kill(stuck.pid, signal.SIGKILL)
    stuck.join()
    for process in others:
        process.join(200)
        assert process.exitcode == 0
    said = [out.get(timeout=5) for _ in range(len(list(root.glob("*/train-2/*.arrow"))) + 2)]
    made = [name for _, name in said if name.endswith(".arrow")]
    assert len(made) == len(set(made)) > 10
    assert sorted(name for name in said if name[1] in ("opened", "none")) == [
        (1, "opened"),
        (2, "opened"),
    ]
    assert kept(root) == {"train-2"}
    assert not list(root.glob("*/*/*.tmp-*"))
