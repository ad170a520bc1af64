"""Real faults in real workers: a training step that raises, or a process that dies.

Installed in every Ray worker process of the test cluster.  A fault is a JSON file in the folder
that FAULT_FOLDER names; it strikes once, on the given rank, at the given step of a trial with the
given learning rate.  While NO_LOADING exists no worker can load its model.
"""

import json
import os
from pathlib import Path
from typing import Any

FAULT_FOLDER = Path("/tmp") / f"sft_ray_faults_{os.getuid()}"
NO_LOADING = FAULT_FOLDER / "no_loading"


def order(name: str, *, learning_rate: float, step: int, rank: int, action: str) -> Path:
    """Leave a fault for the workers to find; returns the file, gone once it has struck."""
    FAULT_FOLDER.mkdir(exist_ok=True)
    path = FAULT_FOLDER / f"{name}.json"
    fault = {"learning_rate": learning_rate, "step": step, "rank": rank, "action": action}
    path.write_text(json.dumps(fault))
    return path


def install() -> None:
    """Wrap the training step of this process."""
    from sft_ray.training import fit as fit_module
    from sft_ray.training import model as model_module

    honest_load = model_module.load_pretrained

    def load_pretrained(*arguments: Any, **options: Any) -> Any:
        if NO_LOADING.exists():
            raise OSError("injected: the weights are gone")
        return honest_load(*arguments, **options)

    model_module.load_pretrained = load_pretrained
    honest_fit, honest_loss = fit_module.fit, fit_module.forward_loss

    def fit(train: Any, **options: Any) -> None:
        steps = 0

        def forward_loss(*arguments: Any) -> Any:
            nonlocal steps
            steps += 1
            strike(train.learning_rate, steps, options["world"].rank)
            return honest_loss(*arguments)

        fit_module.forward_loss = forward_loss
        honest_fit(train, **options)

    fit_module.fit = fit


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
        if fault["action"] == "raise":
            raise ValueError("injected: the loss function has a bug")
        os._exit(1)
