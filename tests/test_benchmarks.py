"""The policy bench replays the committed curves through the search's own code; the GPU bench
refuses to run where it cannot."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers

from benchmarks import gpu, search_policies, trunk_cache
from benchmarks.record_curves import configuration
from benchmarks.rows import once
from benchmarks.search_policies import (
    POLICIES,
    Policy,
    Pool,
    marks_of,
    read_pool,
    replay,
    space_of,
)
from sft_ray.config import Train
from sft_ray.recipes import RECIPES, default_recipe
from sft_ray.training.beat import no_beat
from sft_ray.training.progress import Progress
from sft_ray.training.setup import Setup
from sft_ray.training.trunk_cache import TrunkCache, trunks_root
from sft_ray.training.world import World
from tests.models import PAD, TASK, load_tiny, toy_dataset

ROOT = Path(__file__).parents[1]
CURVES = ROOT / "benchmarks" / "curves" / "minilm-docstrings.jsonl"


def test_the_committed_pool_covers_all_five_dimensions() -> None:
    pool = read_pool(CURVES)
    assert len(pool.final) >= 200
    assert set(pool.searched) == {
        "train.learning_rate",
        "train.batch_size",
        "train.epochs",
        "train.frozen_layers",
        "train.regularization",
    }
    assert set(pool.kinds) == {"none", "weight_decay", "l1", "l2", "l2_sp"}
    assert pool.num_layers == 6
    for curve in pool.curves:
        shares = [share for share, _ in curve]
        assert shares == sorted(set(shares))
        assert shares[-1] == 1


def test_it_prints_what_it_promises() -> None:
    command = [sys.executable, "-m", "benchmarks.search_policies", "--curves", str(CURVES)]
    options = ["--repeats", "2", "--slots", "1", "4", "--policies", "default", "--json"]
    done = subprocess.run(
        [*command, *options, "--processes", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {"default", "random_hf"}
    for by_slots in found.values():
        assert set(by_slots) == {"1", "4"}
        for figures in by_slots.values():
            for goal in ("top1", "top5"):
                assert {"epochs", "success", "ratio"} <= set(figures[goal])
    assert found["random_hf"]["1"]["top1"]["ratio"] == 1


def test_a_repeat_is_the_same_again_and_another_with_another_seed() -> None:
    pool = read_pool(CURVES)
    first, again, other = (replay(POLICIES["default"], pool, 1, seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_a_policy_is_paired_with_the_default_by_seed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--repeats", "2", "--slots", "1", "--processes", "1", "--paired", "reduction_3"]
    monkeypatch.setattr(sys, "argv", ["search_policies", "--curves", str(CURVES), *options])
    search_policies.main()
    default, other = (
        np.array([replay(POLICIES[name], read_pool(CURVES), 1, seed).top1 for seed in (0, 1)])
        for name in ("default", "reduction_3")
    )
    apart = other - default
    half = 12.706 * abs(apart[1] - apart[0]) / 2  # Student's t with one degree of freedom
    assert capsys.readouterr().out == (
        f"reduction_3       1 slots  top 1 %: {apart.mean():+.1f} ± {half:.1f} "
        f"of {default.mean():.1f} epochs\n"
    )


def pool_of(path: Path, runs: list[dict[str, Any]]) -> Pool:
    path.write_text("\n".join(map(json.dumps, runs)))
    return read_pool(path)


def test_any_curve_of_the_runs_can_be_the_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the first the second run is the best, by the other the first."""
    curves = [{"first": [[10, low]], "other": [[10, 1 - low]]} for low in (0.2, 0.7)]
    path = tmp_path / "base.jsonl"
    pool_of(path, [{"learning_rate": 1e-5, "learning_curves": named} for named in curves])
    assert [read_pool(path, name).top(0.5) for name in (None, "other")] == [{1}, {0}]
    options = ["--curves", str(path), "--curve", "last"]
    monkeypatch.setattr(sys, "argv", ["search_policies", *options])
    with pytest.raises(SystemExit, match="2"):
        search_policies.main()
    assert "line 1: no curve last, choose first or other" in capsys.readouterr().err


def test_a_trial_that_ends_at_a_rung_is_charged_up_to_the_point_recorded_behind_it(
    tmp_path: Path,
) -> None:
    """Runs of ten epochs, scored at 20, 40 and 100 %; the rung is at 33."""
    rates, scores = (1e-5, 5e-5, 2e-4), ([60, 70, 80], [60, 50, 70], [60, 80, 90])
    runs = [
        {
            "learning_rate": rate,
            "num_train_epochs": 10,
            "learning_curves": {"accuracy": list(zip((20, 40, 100), curve, strict=True))},
        }
        for rate, curve in zip(rates, scores, strict=True)
    ]
    pool = pool_of(tmp_path / "base.jsonl", runs)
    enqueue = [{"train.learning_rate": rate} for rate in rates]
    search = {"rungs": [33], "reduction_factor": 2, "default_recipe": False, "enqueue": enqueue}
    found = replay(Policy(search=search), pool, 1, seed=1)
    # The second, the worse of two at the rung, has trained four of its epochs by then.
    assert found.top1 == found.top5 == pytest.approx(10 + 4 + 10)
    assert found.regret[25] == 0
    unpruned = replay(Policy(search={**search, "pruner": "none"}), pool, 1, seed=1)
    assert unpruned.top1 == pytest.approx(10 + 10 + 10)
    assert unpruned.regret[25] == 10  # the best of 90 comes later


def test_what_other_slots_have_trained_by_the_hit_is_charged() -> None:
    """Runs of one epoch without marks, all started at once: the hit costs what all have trained."""
    pool = read_pool(CURVES)
    curves = [[(1.0, float(number))] for number in range(len(pool.final))]
    final = np.arange(len(pool.final), dtype=float)
    alike = dataclasses.replace(pool, curves=curves, final=final, epochs=np.ones(len(final)))
    whole = replay(POLICIES["random_hf"], alike, 4, 1)
    assert whole.top1 is not None
    assert whole.top1 % 4 == 0
    longer = dataclasses.replace(alike, epochs=np.full(len(final), 3.0))
    again = replay(POLICIES["random_hf"], longer, 4, 1)
    assert again.top1 == pytest.approx(3 * whole.top1)


def test_a_repeat_without_a_hit_is_told_and_counts_as_all_epochs() -> None:
    repeats = [search_policies.Repeat(10.0, 5.0, dict.fromkeys(search_policies.REGRET_AT, 0.0))]
    repeats += [search_policies.Repeat(None, 200.0, repeats[0].regret)]
    found = search_policies.summarize(repeats, 500.0)
    assert found["top1"]["epochs"] == 255
    assert (found["top1"]["missed"], found["top5"]["missed"]) == (1, 0)
    assert (found["top1"]["success"], found["top5"]["success"]) == (0.5, 0.5)


def test_of_runs_as_good_as_the_last_of_the_best_all_count() -> None:
    pool = read_pool(CURVES)
    least = min(pool.final[run] for run in pool.top(0.01))
    assert pool.top(0.01) == set(np.flatnonzero(pool.final >= least).tolist())


def test_a_suggestion_takes_the_nearest_run_that_is_left() -> None:
    pool = read_pool(CURVES)
    unused = np.ones(len(pool.final), dtype=bool)
    runs = [json.loads(line) for line in CURVES.read_text().splitlines()]
    for number in (0, 17, 101):
        run = runs[number]
        wanted = {
            "learning_rate": run["learning_rate"] * 1.0001,
            "batch_size": run["train_batch_size"],
            "epochs": run["num_train_epochs"],
            "frozen_layers": run["frozen_layers"],
            "regularization": run["regularization"],
        }
        assert pool.nearest(wanted, unused) == number
        unused[number] = False
        assert pool.nearest(wanted, unused) != number


def test_near_is_measured_in_shares_of_what_was_recorded_in_each_dimension(
    tmp_path: Path,
) -> None:
    recorded = [(1e-6, 8), (1e-3, 128), (1e-4, 48), (1e-6, 32)]
    runs = [{**bare_run(rate), "train_batch_size": size} for rate, size in recorded]
    pool = pool_of(tmp_path / "base.jsonl", runs)
    wanted = {"learning_rate": 1e-4, "batch_size": 32}
    unused = np.ones(4, dtype=bool)
    # 16 of 120 examples away; the last one is two of three powers of ten away.
    assert pool.nearest(wanted, unused) == 2
    unused[2] = False
    assert pool.nearest(wanted, unused) == 3


def test_marks_are_charged_at_the_first_recorded_point_behind_them() -> None:
    curve = [(0.2, 0.5), (0.4, 0.6), (1.0, 0.7)]
    assert marks_of(POLICIES["default"], [10, 33], 2, curve) == [(10, 0.2), (33, 0.4), (100, 1.0)]
    # A quarter of an epoch and one epoch of a schedule of two.
    absolute = POLICIES["asha_hf"]
    assert marks_of(absolute, [10, 33], 2, curve) == [(10, 0.2), (100, 1.0)]
    assert marks_of(absolute, [10, 33], 4, curve) == [(10, 0.2), (33, 0.4), (100, 1.0)]


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_an_experiment_over_the_recorded_dimensions(name: str) -> None:
    pool = read_pool(CURVES)
    experiment = search_policies.experiment_of(POLICIES[name], pool, 1)
    assert set(space_of(POLICIES[name], pool)) == set(pool.searched)
    assert experiment.search.trials == 100_000


def test_recorded_configurations_depend_on_seed_and_number_only() -> None:
    drawn = [configuration(Train(), 6, 17, number) for number in range(60)]
    assert drawn == [configuration(Train(), 6, 17, number) for number in range(60)]
    assert {train.frozen_layers for train in drawn} == set(range(7))
    assert {train.regularization.kind for train in drawn} == {
        "none",
        "weight_decay",
        "l1",
        "l2",
        "l2_sp",
    }
    assert min(train.learning_rate for train in drawn) < 5e-6
    assert max(train.learning_rate for train in drawn) > 1e-3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_gpu_bench_refuses_in_one_line_without_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--data", str(tmp_path)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "rows.jsonl")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert done.stderr == f"{gpu.NO_GPU}\n"
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_row_is_measured_once_and_again_where_a_kill_has_torn_it(tmp_path: Path) -> None:
    out, measured = tmp_path / "rows.jsonl", []

    def row(k: int) -> Any:
        return once(out, {"k": k}, lambda: measured.append(k) or {"n": len(measured)})

    assert [row(1), row(2), row(1)] == [{"k": 1, "n": 1}, {"k": 2, "n": 2}, {"k": 1, "n": 1}]
    out.write_text(out.read_text()[:-4])
    assert [row(1), row(2), row(2)] == [{"k": 1, "n": 1}, {"k": 2, "n": 3}, {"k": 2, "n": 3}]


def test_every_unit_of_the_gpu_bench_is_measured_once_per_repeat() -> None:
    units = gpu.all_units(["steps", "search", "trunk"], ["bert-base", "minilm"], repeats=2)
    assert len({json.dumps(unit) for unit in units}) == len(units) == 2 * (8 + 16 + 8)
    assert [unit[-1] for unit in units] == sorted(unit[-1] for unit in units)
    assert json.loads(json.dumps(units)) == units  # as rows that resume have them
    trunks = gpu.all_units(["trunk"], ["minilm"], repeats=1)
    assert sorted(unit[2] for unit in trunks) == [2, 4, 5, 6]


def test_grouped_batches_hold_the_same_rows_by_length() -> None:
    lengths = np.array([9, 3, 7, 3, 8, 1, 5, 2])
    chosen = [np.array([0, 1, 2]), np.array([5, 4, 7])]
    grouped = gpu.by_length(chosen, lengths)
    assert [sorted(lengths[rows]) for rows in grouped] == [[1, 2, 3], [7, 8, 9]]


def test_the_table_of_the_gpu_bench_has_wanted_values_beside_the_found_ones() -> None:
    def steps(seconds: float) -> dict[str, dict[str, float]]:
        slower = {system: seconds + i for i, system in enumerate(gpu.SYSTEMS)}
        return {
            "examples_per_second": {system: 1000 / s for system, s in slower.items()},
            "times_slower": slower,
            "of_peak": {system: 0.5 / s for system, s in slower.items()},
        }

    def search(per_hour: float, gpus: float) -> dict[str, float]:
        return {"trials_per_hour": per_hour, "gpus_per_worker": gpus, "slots": 1 / gpus}

    epochs = {"plain_epoch_seconds": 3.0, "full_epoch_seconds": 1.5}
    rows = [
        {"unit": ["search", "minilm", 4, 0], **search(400.0, 0.25)},
        {"unit": ["search", "minilm", 1, 0], **search(100.0, 1.0)},
        {"unit": ["search", "minilm", 4, 1], **search(600.0, 0.25)},
        {"unit": ["search", "bert-base", "auto", 0], **search(50.0, 0.5)},
        {"unit": ["search", "minilm", "Trainer", 0], **search(125.0, 1.0)},
        {"unit": ["search", "minilm", "Trainer compiled", 0], **search(80.0, 1.0)},
        {"unit": ["trunk", "minilm", 2, 0], **epochs},
        {"unit": ["steps", "bert-base", "full", 64, 0], **steps(1.0)},
        {"unit": ["steps", "bert-base", "full", 16, 0], **steps(1.0)},
    ]
    lines = gpu.table(rows).splitlines()
    assert "| bert-base | full | 64 | ours | 1,000 | 1.00 | 0.50 (0.45) |" in lines
    assert "| bert-base | full | 16 | ours | 1,000 | 1.00 | 0.50 |" in lines
    assert "| bert-base | full | 64 | dynamic | 250 | 4.00 | 0.12 |" in lines
    assert "| minilm | 1 | 1 | 100 | 1.00 | 0.80 (5.0) |" in lines
    assert "| minilm | 4 | 4 | 500 | 5.00 | 4.00 (5.0) |" in lines
    assert "| minilm | Trainer | 1 | 125 | 1.25 | 1.00 |" in lines
    assert "| bert-base | auto: 2 | 2 | 50 | – | – (2.0) |" in lines
    assert "| minilm | 2 | 3.00 | 1.50 | 2.00 |" in lines
    assert lines.index("| minilm | 1 | 1 | 100 | 1.00 | 0.80 (5.0) |") < lines.index(
        "| minilm | 4 | 4 | 500 | 5.00 | 4.00 (5.0) |"
    )


def test_trainer_takes_the_same_trials_in_the_gpu_bench(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "validation"):
        rows = {"text": ["the cat sat", "a dog"] * 16, "label": [0, 1] * 16}
        pq.write_table(pa.table(rows), tmp_path / f"sst2-{split}.parquet")
    steps: list[int] = []
    honest = transformers.Trainer.training_step

    def counted(trainer: Any, model: Any, inputs: Any, *args: Any) -> Any:
        steps.append(len(inputs["labels"]))
        return honest(trainer, model, inputs, *args)

    monkeypatch.setattr(transformers.Trainer, "training_step", counted)
    monkeypatch.setattr(gpu, "TRIAL_BATCH_SIZE", 8)
    found = gpu.measure_trainer(tmp_path, str(tiny_model), compiled=False, device="cpu", trials=2)
    assert steps == [8] * 4 * 3  # the first trial is not on the clock
    assert found["trials_per_hour"] > 0


def test_recorded_runs_may_be_of_other_shapes(tmp_path: Path) -> None:
    """Without epochs or batch size, stopped early, diverged, in percent, of other penalties."""
    runs: list[dict[str, Any]] = [
        {
            "learning_rate": 1e-5 * 1.2**i,
            "regularization": {"kind": "l1", "strength": 10.0 ** -(i % 5)},
            "total_model_steps": 100,
            "learning_curves": {"accuracy": [[30, 50 + i], [60, 60 + i], [90, 70 + i]]},
        }
        for i in range(20)
    ]
    runs[3]["learning_curves"]["accuracy"][1:] = [[60, math.nan], [100, None]]
    runs[4]["learning_curves"]["accuracy"] = []
    del runs[5]["total_model_steps"]
    file = tmp_path / "roberta-large.jsonl"
    file.write_text("\n".join(map(json.dumps, runs)) + "\n\n")
    pool = read_pool(file)
    assert pool.searched == ["train.learning_rate"]
    assert pool.recipe is RECIPES["roberta"]
    assert len(pool.curves) == 19
    assert pool.curves[0] == [(0.3, 50), (0.6, 60), (0.9, 70), (1.0, 70)]
    assert pool.curves[3] == [(0.3, 53), (0.6, 50), (1.0, 50)]
    assert pool.curves[4] == [(30 / 90, 55), (60 / 90, 65), (1.0, 75)]
    found = replay(POLICIES["default"], pool, 4, seed=1)
    assert found.top1 is not None
    assert 0 <= found.regret[25] <= 39  # points, as the scores are
    figures = search_policies.without_nan(search_policies.summarize([found], 19.0))
    assert figures["top1"]["interval"] is None
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


@pytest.mark.parametrize(
    ("name", "recipe", "rate"),
    [
        ("minilm-l12", "bert-small", 1e-4),
        ("electra-small-sst2", "electra-small", 1e-4),
        ("deberta-v3-large", "deberta-large", 2e-5),
        ("xlm-roberta-base", "roberta", 2e-5),
        ("distilbert", "bert", 2e-5),
        ("unheard-of", "encoder", 2e-5),
    ],
)
def test_family_and_size_are_read_from_a_files_name(
    tmp_path: Path, name: str, recipe: str, rate: float
) -> None:
    path = tmp_path / f"{name}.jsonl"
    recorded = [bare_run(1e-5), {**bare_run(2e-5), "frozen_layers": "all"}]
    recorded += [{**bare_run(2e-5), "frozen_layers": 4, "num_layers": 12, "regularization": None}]
    path.write_text("\n".join(map(json.dumps, recorded)))
    pool = read_pool(path)
    assert pool.recipe is RECIPES[recipe]
    assert default_recipe(pool.layer_parameters)["train.learning_rate"] == rate
    assert pool.searched == ["train.learning_rate", "train.frozen_layers"]
    assert pool.values[:, 1].tolist() == [0, 12, 4]


def bare_run(rate: float) -> dict[str, Any]:
    schedule = {"train_batch_size": 32, "num_train_epochs": 2}
    return {"learning_rate": rate, **schedule, "learning_curves": {"accuracy": [[1, 0.5]]}}


def bare_line(**changes: Any) -> str:
    return json.dumps({**bare_run(1e-5), **changes})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no file of recorded runs: "),
        ("{", "no file of recorded runs: "),
        ("", "no run with a score"),
        ('{"learning_rate": 1e-5}', "line 1: a run needs learning_curves"),
        ("5", "line 1: a run needs names and values, got 5"),
        ('{"learning_rate": 0, "learning_curves": {}}', "learning_rate, a number above 0, got 0"),
        (bare_line(learning_rate=None), "learning_rate, a number above 0, got None"),
        (bare_line(num_train_epochs="2"), "num_train_epochs, a number above 0, got '2'"),
        (bare_line(learning_curves=[[1, 0.5]]), "learning_curves {name: [[step, score], …]}"),
        (bare_line(learning_curves={"a": [[1, "high"]]}), "pairs of numbers in learning_curves.a"),
        (bare_line(learning_curves={"a": [[0, 0.5]]}), "total_model_steps, or a step above 0"),
        (bare_line(learning_curves={"a": [[1, None]]}), "no run with a score"),
    ],
)
def test_curves_that_are_none_are_refused_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str | None,
    said: str,
) -> None:
    path = tmp_path / "curves.jsonl"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(sys, "argv", ["search_policies", "--curves", str(path)])
    with pytest.raises(SystemExit) as ended:
        search_policies.main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_the_bench_of_trunks_measures_what_was_kept(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = toy_dataset(tmp_path, tiny_model, train=32, validation=16)
    pretrained = load_tiny(tiny_model, dataset)
    setups = []

    def trial(setup: Setup, k: int, batch_size: int) -> Progress:
        setups.append(setup)
        return Progress(metrics={"accuracy": 1.0}, train_seconds=1.0, eval_seconds=1.0)

    monkeypatch.setattr(trunk_cache, "whole_trial", trial)
    cache = TrunkCache(pretrained, dataset, World(), PAD, others_per_depth=0.5, depths=(1, 2))
    setup = Setup(
        TASK, dataset, pretrained, SimpleNamespace(pad_token_id=PAD), World(), trunk_cache=cache
    )
    trunk_cache.measure(setup, 2, 8)
    asked = (2, torch.float32)
    assert not cache.pays("train", *asked, 0.0)
    caches = [setup.trunk_cache for setup in setups if setup.trunk_cache is not None]
    assert len(caches) == 3
    assert all(kept.pays("train", *asked, 0.0) for kept in caches)
    assert all(kept.open(["train"], *asked, no_beat) for kept in caches)
    shutil.rmtree(trunks_root())
    no_room = dataclasses.replace(caches[0], budget_bytes=0)
    with pytest.raises(AssertionError, match="no room"):
        no_room.open(["train"], 2, torch.float32, no_beat)
