"""Real faults in real workers: a training step that raises, or a process that dies.

Planted in every process of the test cluster that imports the training loop.  A fault is a JSON
file in the folder that FAULT_FOLDER names; it strikes once, on the given rank, at the given step of
a trial with the given learning rate.  While NO_LOADING exists no worker can load its model.
"""

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

# One for each process of tests, whose environment the workers of its Ray have.
OF_PROCESS = os.environ.get("PYTEST_XDIST_WORKER", "")
FAULT_FOLDER = Path("/tmp") / f"sft_ray_faults_{os.getuid()}{OF_PROCESS}"
LINGER_SECONDS = 12
NO_LOADING = FAULT_FOLDER / "no_loading"
# What a process runs that imports the training loop, see `benchmarks.planting`.
PLANT = """
def plant(module):
    from tests.faults import install
    install(module)
"""


def order(name: str, *, learning_rate: float, step: int, rank: int, action: str) -> Path:
    """Leave a fault for the workers to find; returns the file, gone once it has struck."""
    FAULT_FOLDER.mkdir(exist_ok=True)
    path = FAULT_FOLDER / f"{name}.json"
    fault = {"learning_rate": learning_rate, "step": step, "rank": rank, "action": action}
    path.write_text(json.dumps(fault))
    return path


def install(fit_module: Any) -> None:
    """Wrap loading and the training step of this process."""
    import importlib

    setup_module = importlib.import_module("sft_ray.training.setup")
    honest_load = setup_module.load_pretrained

    def load_pretrained(*arguments: Any, **options: Any) -> Any:
        if NO_LOADING.exists():
            raise OSError("injected: the weights are gone")
        return honest_load(*arguments, **options)

    setup_module.load_pretrained = load_pretrained
    honest_step = fit_module.Trial.take_step

    def take_step(trial: Any, indices: Any) -> Any:
        strike(trial.train.learning_rate, trial.step + 1, trial.world.rank)
        return honest_step(trial, indices)

    fit_module.Trial.take_step = take_step


def strike(learning_rate: float, step: int, rank: int) -> None:
    if not FAULT_FOLDER.exists():
        return
    for path in FAULT_FOLDER.glob("*.json"):
        try:
            fault = json.loads(path.read_text())
        except FileNotFoundError:  # it has just struck another rank
            continue
        if (learning_rate, step, rank) != (fault["learning_rate"], fault["step"], fault["rank"]):
            continue
        path.unlink()
        if fault["action"] == "linger":
            time.sleep(LINGER_SECONDS)
            return
        if fault["action"] == "raise":
            raise ValueError("injected: the loss function has a bug")
        if fault["action"] == "run out of memory":
            raise MemoryError("injected")
        if fault["action"] == "run out of disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "injected")
        os._exit(1)


def break_bad_machines() -> None:
    """Where BAD is set in a machine's environment, no process can load a model."""
    if "BAD" in os.environ:
        import importlib

        setup = importlib.import_module("sft_ray.training.setup")

        def load_pretrained(*_: Any, **__: Any) -> Any:
            raise OSError("injected: this machine is broken")

        setup.load_pretrained = load_pretrained
