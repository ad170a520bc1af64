"""Shared fixtures: private caches, one tiny experiment, one local Ray cluster."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's client is imported, just below
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes that share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from sft_ray.config import Experiment
from tests.models import tiny_model_folder, toy_rows, write_csv


@pytest.fixture(scope="session", autouse=True)
def _private_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing a test builds is shared with the user's own caches; the hub is never asked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFT_RAY_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.delenv("SFT_RAY_STORAGE", raising=False)
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer BERT with a tokenizer, as a local folder."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model_folder(folder)
    return folder


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs, before anything looks for them, unless `-m gpu` asks for tests on one.

    All others are written for CPUs: workers of one trial would each want a GPU of their own.
    """
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Last come those with a Ray of their own: a process is connected to one at a time."""
    items.sort(key=lambda item: item.get_closest_marker("own_cluster") is not None)


@pytest.fixture(scope="session")
def toy_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 rows of a task that the tiny model can learn."""
    path = tmp_path_factory.mktemp("data") / "toy.csv"
    write_csv(path, toy_rows(400, seed=0))
    return path


@pytest.fixture
def experiment(tiny_experiment: Experiment, tmp_path: Path) -> Experiment:
    """The tiny experiment in a folder of its own."""
    return tiny_experiment.model_copy(update={"storage": str(tmp_path / "runs")})


@pytest.fixture(scope="session")
def tiny_experiment(tiny_model: Path, toy_csv: Path) -> Experiment:
    """A search of seconds: four trials of the tiny model, two workers each."""
    return Experiment.from_tree(
        {
            "name": "tiny",
            "model": str(tiny_model),
            "data": {
                "train": str(toy_csv),
                "split": {"validation": 0.2, "test": 0.1},
                "max_length": 32,
            },
            "search": {
                "space": {
                    "train.learning_rate": {"log_uniform": [1.0e-4, 1.0e-2]},
                    "train.batch_size": {"choice": [16, 32]},
                    "train.epochs": {"int": [1, 3]},
                    "train.regularization": {
                        "one_of": [{"kind": "none"}, {"kind": "l2_sp"}, {"kind": "weight_decay"}]
                    },
                    "train.frozen_layers": {"int": [0, 2]},
                },
                "trials": 4,
                "rungs": [10, 33],
                "reduction_factor": 3,
            },
            "resources": {"workers_per_trial": 2, "cpus_per_worker": 1, "slots": 1},
        }
    )


@pytest.fixture
def hears_signals() -> Iterator[None]:
    """Signals as a terminal leaves them: in the background some are ignored, by children too."""
    from sft_ray.interrupt import SIGNALS

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One local Ray for all tests that need it; its workers carry the fault injector."""
    import ray

    from benchmarks.planting import plant_in
    from sft_ray.search.cluster import RAY_ENVIRONMENT
    from tests.faults import FAULT_FOLDER, PLANT

    shutil.rmtree(FAULT_FOLDER, ignore_errors=True)  # of tests that were killed
    planted = tmp_path_factory.mktemp("planted")
    plant_in(planted, PLANT)
    os.environ.update(RAY_ENVIRONMENT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(planted), str(Path(__file__).parents[1])]))
        ray.init(
            address="local",  # whatever else runs on this machine
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    yield
    ray.shutdown()
