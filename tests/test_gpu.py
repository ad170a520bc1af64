"""What only a GPU can show; skipped where there is none (`make test-gpu`)."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sft_ray.config import Experiment, Train
from sft_ray.errors import ResourceError
from sft_ray.search import gpu_probe, sharing
from sft_ray.search.layout import plan_layout
from sft_ray.search.preflight import prepare_experiment
from sft_ray.training import gpu_attention
from sft_ray.training.divergence import STEPS_PER_LOOK
from sft_ray.training.examples import Dataset
from sft_ray.training.families import FAMILIES
from sft_ray.training.fitting import Trial as Fitting
from sft_ray.training.fitting import fit
from sft_ray.training.model import load_pretrained
from sft_ray.training.progress import Progress
from sft_ray.training.resume_state import ResumeState
from sft_ray.training.setup import Setup
from sft_ray.training.trunk_cache import TrunkCache, trunks_root
from sft_ray.training.world import World, resolve_precision
from tests.models import PAD, TASK, tiny_model_folder, toy_dataset

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device, or not `-m gpu`"
)


Marks = list[Progress]
Trial = Callable[..., Marks]
HALF = 2e-3  # how far a loss may move in half precision; on a CPU it is up to 3e-4


def setup_on(device: torch.device, model: Path, dataset: Dataset) -> Setup:
    """The tiny model on a device."""
    pretrained = load_pretrained(
        str(model),
        TASK,
        dataset.label_set,
        seed=17,
        device=device,
        used_tokens=dataset.used_tokens,
    )
    tokenizer = SimpleNamespace(pad_token_id=PAD)
    return Setup(TASK, dataset, pretrained, tokenizer, World(device=device))


def train_losses(device: str, model: Path, dataset: Dataset, **train: object) -> list[float]:
    """Mean loss up to every mark of a tiny training without dropout."""
    setup = setup_on(torch.device(device), model, dataset)
    found: list[float] = []

    def report(progress: Progress) -> bool:
        assert progress.fault is None
        found.append(progress.train_loss)
        return True

    settings = {"epochs": 3, "batch_size": 16, "learning_rate": 1e-3, "dropout": 0.0, **train}
    fit(
        Train.model_validate(settings),
        setup,
        objective="accuracy",
        rungs=[10, 33],
        seed=17,
        report=report,
    )
    assert setup.pretrained.compiled.works  # else its layers ran as they are
    assert bool(setup.pretrained.recorded._graphs) == bool(train.get("cuda_graphs"))
    return found


@needs_gpu
@pytest.mark.gpu
def test_a_gpu_computes_the_same_losses_as_a_cpu_in_fp32(tiny_model: Path, tmp_path: Path) -> None:
    dataset = toy_dataset(tmp_path, tiny_model)
    on_gpu, on_cpu = (
        train_losses(device, tiny_model, dataset, precision="fp32") for device in ("cuda", "cpu")
    )
    assert on_gpu == pytest.approx(on_cpu, abs=1e-4)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("micro_batch", ["auto", 1])  # with padding, and without any
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_the_same_on_a_gpu(
    tmp_path: Path, family: str, micro_batch: int | str
) -> None:
    model = tiny_model_folder(tmp_path / "model", family)
    dataset = toy_dataset(tmp_path, model, train=32, validation=16)
    settings = {"precision": "fp32", "epochs": 1, "micro_batch": micro_batch}
    on_gpu, on_cpu = (
        train_losses(device, model, dataset, **settings) for device in ("cuda", "cpu")
    )
    assert on_gpu == pytest.approx(on_cpu, abs=1e-4)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "drops", "reach"),
    [
        (torch.bfloat16, True, None),
        (torch.bfloat16, True, 64),
        (torch.float16, True, None),
        (torch.float32, False, None),
    ],
)
def test_attention_on_a_gpu_needs_no_padding(
    dtype: torch.dtype, drops: bool, reach: int | None
) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    for width in (16, 32, 64):  # the first is the tiny model's
        kind = gpu_attention._Kind(device, dtype, width, drops, reach, False)
        assert gpu_attention._works(kind)
        assert reach or gpu_attention._works(kind._replace(first_tokens=True))


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_in_bf16_a_gpu_trains_alike_with_and_without_padding_in_attention(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    dataset = toy_dataset(tmp_path, tiny_model)
    settings = {"precision": "bf16", "dropout": dropout}
    unpadded = train_losses("cuda", tiny_model, dataset, **settings)
    monkeypatch.setattr(gpu_attention, "is_ours", lambda *_: False)
    padded = train_losses("cuda", tiny_model, dataset, **settings)
    # With dropout other random numbers fall on other tokens.
    assert unpadded == pytest.approx(padded, abs=0.02 if dropout else HALF)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_close_to_fp32(
    tiny_model: Path, tmp_path: Path, precision: str
) -> None:
    dataset = toy_dataset(tmp_path, tiny_model)
    half, whole = (
        train_losses("cuda", tiny_model, dataset, precision=name) for name in (precision, "fp32")
    )
    assert half == pytest.approx(whole, abs=HALF)
    assert half[-1] < half[0]


@needs_gpu
@pytest.mark.gpu
def test_the_losses_do_not_depend_on_the_micro_batch(tiny_model: Path, tmp_path: Path) -> None:
    dataset = toy_dataset(tmp_path, tiny_model)
    whole = train_losses("cuda", tiny_model, dataset, precision="fp32", micro_batch=4)
    assert whole == pytest.approx(
        train_losses("cuda", tiny_model, dataset, precision="fp32"), abs=1e-4
    )


@needs_gpu
@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("micro_batch", ["auto", 4])
def test_compiled_layers_train_as_uncompiled_ones_in_fp32(
    tiny_model: Path, tmp_path: Path, micro_batch: int | str
) -> None:
    dataset = toy_dataset(tmp_path, tiny_model, train=64, validation=16)
    settings = {"precision": "fp32", "epochs": 2, "micro_batch": micro_batch}
    compiled, plain = (
        train_losses("cuda", tiny_model, dataset, compile=chosen, **settings)
        for chosen in (True, False)
    )
    assert compiled == pytest.approx(plain, abs=1e-4)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("micro_batch", ["auto", 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_recorded_passes_train_as_others(
    tiny_model: Path, tmp_path: Path, precision: str, micro_batch: int | str
) -> None:
    dataset = toy_dataset(tmp_path, tiny_model)
    settings = {"precision": precision, "micro_batch": micro_batch}
    recorded, plain = (
        train_losses("cuda", tiny_model, dataset, cuda_graphs=chosen, **settings)
        for chosen in (True, False)
    )
    assert recorded == pytest.approx(plain, abs=1e-4 if precision == "fp32" else HALF)


def trial_on(device: torch.device, model: Path, dataset: Dataset, *, cached: bool) -> Trial:
    """Trains the tiny model, on kept outputs of frozen layers or not."""
    setup = setup_on(device, model, dataset)
    if cached:
        cache = TrunkCache(setup.pretrained, dataset, setup.world, PAD)
        setup = replace(setup, trunk_cache=cache)

    def trial(*, resume: ResumeState | None = None, marks: int = 99, **train: object) -> Marks:
        found: Marks = []
        settings = {"epochs": 3, "batch_size": 16, "learning_rate": 1e-3, **train}
        fit(
            Train.model_validate(settings),
            setup,
            objective="accuracy",
            rungs=[10, 33],
            seed=17,
            report=lambda progress: found.append(progress) or len(found) < marks,
            resume=resume,
        )
        return found

    return trial


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("train", [{}, {"frozen_layers": 1}, {"precision": "fp16"}])
def test_a_trial_taken_up_on_a_gpu_has_the_losses_of_one_that_never_stopped(
    tiny_model: Path, tmp_path: Path, train: dict[str, object]
) -> None:
    check_taken_up("cuda", tiny_model, tmp_path, {"precision": "fp32", **train})


def check_taken_up(device: str, model: Path, folder: Path, train: dict[str, object]) -> None:
    dataset = toy_dataset(folder, model)
    trial = trial_on(torch.device(device), model, dataset, cached=False)
    whole, first = trial(**train), trial(marks=2, **train)
    state = first[-1].resume_state()
    trial(marks=1, epochs=1)  # another one between them
    rest = trial(resume=state, **train)
    assert whole[-1].step - whole[1].step >= 20
    close = 1e-4 if train["precision"] == "fp32" else HALF
    losses, before = ([mark.train_loss for mark in marks] for marks in (rest, whole[2:]))
    assert losses == pytest.approx(before, abs=close)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("frozen_layers", [1, 2])
def test_on_a_gpu_kept_outputs_of_frozen_layers_train_as_those_made_each_time(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frozen_layers: int
) -> None:
    monkeypatch.setenv("SFT_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        TrunkCache, "pays", lambda *_, **__: True
    )  # a model so small is as soon computed
    check_kept_outputs("cuda", tiny_model, tmp_path, frozen_layers)


def check_kept_outputs(device: str, model: Path, folder: Path, frozen_layers: int) -> None:
    dataset = toy_dataset(folder, model)
    train = {"precision": "fp32", "dropout": 0.0, "frozen_layers": frozen_layers}
    cached, plain = (
        trial_on(torch.device(device), model, dataset, cached=cached)(**train)
        for cached in (True, False)
    )
    assert list(trunks_root().glob(f"*/train-{frozen_layers}"))
    for mine, theirs in zip(cached, plain, strict=True):
        assert mine.train_loss == pytest.approx(theirs.train_loss, abs=1e-4)
        assert mine.metrics["loss"] == pytest.approx(theirs.metrics["loss"], abs=1e-4)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("settings", [{}, {"micro_batch": 3}, {"frozen_layers": 1}])
def test_steps_do_not_wait_for_the_gpu(
    tiny_model: Path, tmp_path: Path, precision: str, settings: dict[str, object]
) -> None:
    setup = setup_on(torch.device("cuda"), tiny_model, toy_dataset(tmp_path, tiny_model))
    trial = Fitting(
        Train.model_validate({"precision": precision, "batch_size": 8, "epochs": 3, **settings}),
        setup,
        "accuracy",
        17,
    )
    batches = trial.batches_from(0)
    for _ in range(STEPS_PER_LOOK):  # which sets up what the first ones need
        assert trial.take_step(next(batches)) is None
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(STEPS_PER_LOOK - 1):
            trial.take_step(next(batches))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("frozen_layers", [0, 1, "all"])
def test_recorded_passes_repeat_and_draw_new_numbers_at_every_step(
    tiny_model: Path, tmp_path: Path, frozen_layers: int | str
) -> None:
    dataset = toy_dataset(tmp_path, tiny_model)
    settings = {"precision": "fp32", "frozen_layers": frozen_layers, "cuda_graphs": True}
    first, again = (
        train_losses("cuda", tiny_model, dataset, dropout=0.5, **settings) for _ in range(2)
    )
    assert first == pytest.approx(again, abs=1e-4)
    without = train_losses("cuda", tiny_model, dataset, **settings)
    assert first != pytest.approx(without, abs=1e-4)


@needs_gpu
@pytest.mark.gpu
def test_a_search_runs_on_the_gpu_in_bf16(experiment: Experiment) -> None:
    from sft_ray.search.tuner import run_search

    assert resolve_precision("auto", torch.device("cuda"))[0] == torch.bfloat16
    tree = experiment.to_tree()
    tree["resources"] = {"workers_per_trial": 1}
    result = run_search(Experiment.from_tree(tree), quiet=True)
    assert result.tree["environment"]["gpus_per_worker"] == 1
    assert result.best["complete"]


def shares_its_gpu(experiment: Experiment) -> Experiment:
    tree = experiment.to_tree()
    tree["resources"] = {"workers_per_trial": 1, "trials_per_gpu": "auto"}
    return Experiment.from_tree(tree)


@needs_gpu
@pytest.mark.gpu
def test_the_probe_sees_how_little_of_a_gpu_a_tiny_model_takes(experiment: Experiment) -> None:
    prepared = prepare_experiment(shares_its_gpu(experiment))
    trains = sharing.trains_of_search(prepared)
    threads = torch.get_num_threads()
    found = gpu_probe.probe(*sharing._question(prepared, trains))
    torch.set_num_threads(threads)
    assert 0.001 < found.busy_share < 0.9
    assert 1e6 < found.trial_bytes < 2e9
    assert 5e7 < found.context_bytes < found.gpu_bytes
    total = torch.cuda.get_device_properties(0).total_memory
    assert found.gpu_bytes == pytest.approx(total, rel=0.01)
    has = {"CPU": 64.0, "GPU": 1.0}
    decided = sharing.ask_this_machine(prepared, trains, has)
    assert decided.trials_per_gpu > 1
    assert "per GPU" in decided.reason


@needs_gpu
@pytest.mark.gpu
def test_a_larger_batch_reserves_more(experiment: Experiment) -> None:
    prepared = prepare_experiment(shares_its_gpu(experiment))
    threads, found = torch.get_num_threads(), []
    for batch_size in (2, 256):
        trains = [Train(batch_size=batch_size, precision="fp32")]
        found.append(gpu_probe.probe(*sharing._question(prepared, trains)))
        torch.cuda.empty_cache()
    torch.set_num_threads(threads)
    assert found[0].trial_bytes < found[1].trial_bytes


@needs_gpu
@pytest.mark.gpu
def test_a_search_says_how_many_trials_share_the_gpu(
    experiment: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    from sft_ray.search.tuner import run_search

    result = run_search(shares_its_gpu(experiment))
    lines = [line for line in capsys.readouterr().out.splitlines() if " per GPU" in line]
    assert len(lines) == 1
    number = int(lines[0].split()[1])
    environment = result.tree["environment"]
    assert environment["gpus_per_worker"] == pytest.approx(1 / number)
    assert environment["slots"] <= number * torch.cuda.device_count()
    assert result.best["complete"]


def with_resources(experiment: Experiment, resources: object, trials: int) -> Experiment:
    tree = experiment.to_tree()
    tree["resources"], tree["search"]["trials"] = resources, trials
    return Experiment.from_tree(tree)


@pytest.mark.parametrize(
    ("resources", "has", "expected"),
    [
        ({}, {"CPU": 8}, (8, 0)),
        ({"workers_per_trial": 2}, {"CPU": 8}, (4, 0)),
        ({"workers_per_trial": 2}, {"CPU": 32, "GPU": 4}, (2, 1)),
        ({"trials_per_gpu": 3}, {"CPU": 32, "GPU": 2}, (6, pytest.approx(1 / 3))),
        ({"trials_per_gpu": "auto"}, {"CPU": 32, "GPU": 2}, (2, 1)),
        ({"trials_per_gpu": "auto", "workers_per_trial": 2}, {"CPU": 32, "GPU": 4}, (2, 1)),
        ({"gpus_per_worker": 0, "cpus_per_worker": 4}, {"CPU": 32, "GPU": 2}, (8, 0)),
        ({"slots": 1}, {"CPU": 8}, (1, 0)),
        ({"trials_per_gpu": 64}, {"CPU": 999, "GPU": 2}, (100, pytest.approx(1 / 50))),
    ],
)
def test_slots_follow_from_what_the_cluster_has(
    experiment: Experiment,
    resources: dict[str, object],
    has: dict[str, float],
    expected: tuple[int, float],
) -> None:
    layout = plan_layout(with_resources(experiment, resources, trials=100), has)
    assert (layout.slots, layout.gpus_per_worker) == expected


@pytest.mark.parametrize(
    ("resources", "has", "expected"),
    [
        ({}, {"CPU": 2}, (2, 1)),
        ({}, {"CPU": 16}, (4, 4)),
        ({"slots": 1}, {"CPU": 16}, (1, 16)),
        ({"slots": 3, "workers_per_trial": 2}, {"CPU": 16}, (3, 2)),
        ({"slots": 1}, {"CPU": 16, "GPU": 1}, (1, 1)),
        ({"slots": 1, "gpus_per_worker": 0}, {"CPU": 16, "GPU": 1}, (1, 16)),
        ({"slots": 1, "cpus_per_worker": 1}, {"CPU": 16}, (1, 1)),
    ],
)
def test_workers_without_a_gpu_share_all_cores(
    experiment: Experiment,
    resources: dict[str, object],
    has: dict[str, float],
    expected: tuple[int, float],
) -> None:
    found = with_resources(experiment, resources, trials=4)
    layout = plan_layout(found, has)
    assert (layout.slots, layout.cpus_per_worker) == expected
    assert layout.written_into(found).resources.cpus_per_worker == expected[1]


def test_few_trials_spread_over_all_gpus(experiment: Experiment) -> None:
    tree = experiment.to_tree()
    tree["resources"], tree["search"]["trials"] = {"trials_per_gpu": 4}, 4
    layout = plan_layout(Experiment.from_tree(tree), {"CPU": 16, "GPU": 2})
    assert (layout.slots, layout.gpus_per_worker) == (4, 0.5)


def test_workers_without_a_gpu_each_are_told_both_ways_out(experiment: Experiment) -> None:
    tree = experiment.to_tree()
    tree["resources"] = {"workers_per_trial": 2}
    with pytest.raises(ResourceError) as caught:
        plan_layout(Experiment.from_tree(tree), {"CPU": 16, "GPU": 1})
    (said,) = caught.value.problems
    for part in ("need 2 CPUs and 2 GPUs", "lower workers_per_trial", "gpus_per_worker=0"):
        assert part in said
