"""Tells TensorBoard, MLflow and Weights & Biases what trials report, by Ray's own logger callbacks.

Tune itself would hand them the slots' messages as they are; here each of our trials is a trial
of theirs, and the step is the percentage of its schedule, so that curves of unlike lengths lie over
each other.

Source: ray.tune.logger, ray.air.integrations (Ray 2.60).
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sft_ray.config import TrackingTool
from sft_ray.errors import ConfigError, first_line
from sft_ray.run_store import RunStore
from sft_ray.search.trials import PlannedTrial

FOLDER = "tracking"  # below the run folder: event files, and what W&B keeps on disk
TOLD = ("train_loss", "penalty", "epochs_run", "step", "examples_seen", "score")
SECONDS = ("train_seconds", "eval_seconds", "slot_seconds")


@dataclass(eq=False)
class TrackedTrial:
    """As much of Tune's `Trial` as the callbacks look at.

    Attributes:
        percent: of its schedule, at the last mark that was told.
    """

    trial_id: str
    label: str
    config: dict[str, Any]
    experiment_dir_name: str
    local_path: str
    remote_path: str
    percent: int = 0

    @property
    def evaluated_params(self) -> dict[str, Any]:
        return self.config

    def init_local_path(self) -> None:
        Path(self.local_path).mkdir(parents=True, exist_ok=True)

    def __str__(self) -> str:
        return self.label


class Tool:
    """One callback, on a thread of its own: a slow server holds nothing up.

    Whatever it raises ends it, and nothing else.
    """

    def __init__(self, name: str, callback: Any, say: Callable[[str], None]) -> None:
        self._name, self._callback, self._say = name, callback, say
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._has_failed = False

    def tell(self, event: str, *arguments: Any) -> None:
        self._thread.submit(self._call, getattr(self._callback, event), *arguments)

    def run(self, action: Callable[[], None]) -> None:
        """Something of ours, behind all that it has been told."""
        self._thread.submit(self._call, action)

    def _call(self, action: Callable[..., Any], *arguments: Any) -> None:
        if self._has_failed:
            return
        try:
            action(*arguments)
        except Exception as error:  # of a server, a network, a library
            self._has_failed = True
            self._say(f"{self._name} is not told any more: {first_line(error)}")

    def close(self) -> None:
        """Wait until everything is told."""
        self.tell("on_experiment_end", [])
        self._thread.shutdown()


class Tracker:
    """Hears of every trial and tells every tool.

    Args:
        names: of the tools.
        store: the run folder.
        say: prints a line.

    Raises:
        ConfigError: a tool is not installed, or cannot be reached.
    """

    def __init__(
        self, names: Sequence[TrackingTool], store: RunStore, say: Callable[[str], None]
    ) -> None:
        self._store = store
        self._tools = {name: Tool(name, opened(name, store.name), say) for name in names}
        self._trials: dict[int, TrackedTrial] = {}
        self._root, self._scratch = store.local_root, None
        if names and self._root is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="sft_ray-")
            self._root = Path(self._scratch.name)

    def start(self, planned: PlannedTrial) -> None:
        """A trial begins; nothing is new if it goes on after its slot was lost."""
        if planned.number in self._trials or self._root is None or not self._tools:
            return
        path = f"{FOLDER}/{planned.folder}"
        local = self._root / path
        shutil.rmtree(local, ignore_errors=True)  # of an earlier driver: all of it is told again
        trial = TrackedTrial(
            trial_id=f"{os.getpid()}-{planned.number}-{os.urandom(4).hex()}",
            label=planned.label,
            config={**planned.params, "seed": planned.seed},
            experiment_dir_name=self._store.name,
            local_path=str(local),
            remote_path=path,
        )
        self._trials[planned.number] = trial
        trial.init_local_path()
        self._tell("log_trial_start", trial)

    def mark(self, number: int, message: dict[str, Any]) -> None:
        trial = self._trials.get(number)
        if trial is None or message["percent"] <= trial.percent:
            return  # told before its slot was lost
        trial.percent = message["percent"]
        scalars = {name: message[name] for name in (*TOLD, *SECONDS) if name in message}
        result = {"training_iteration": trial.percent, **message["metrics"], **scalars}
        self._tell("log_trial_result", trial.percent, trial, result)

    def end(self, number: int, has_failed: bool) -> None:
        trial = self._trials.pop(number, None)
        if trial is None:
            return
        self._tell("log_trial_end", trial, has_failed)
        if self._scratch and "tensorboard" in self._tools:
            self._tools["tensorboard"].run(
                lambda: self._store.put_folder(Path(trial.local_path), trial.remote_path)
            )

    def close(self) -> None:
        """End what has not ended, and wait until everything is told."""
        for number in list(self._trials):
            self.end(number, has_failed=True)
        for tool in self._tools.values():
            tool.close()
        if self._scratch:
            self._scratch.cleanup()

    def _tell(self, event: str, *arguments: Any) -> None:
        for tool in self._tools.values():
            tool.tell(event, *arguments)


def opened(name: TrackingTool, run: str) -> Any:
    """A callback that is ready for trials.

    Raises:
        ConfigError: the tool is not installed, or cannot be reached.
    """
    try:
        with warnings.catch_warnings():  # of what these packages do while they are imported
            warnings.simplefilter("ignore")
            callback = {"tensorboard": tensorboard, "mlflow": mlflow, "wandb": wandb}[name](run)
            callback.setup()
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"tracking: {name} cannot be loaded ({first_line(error)}); "
            "pip install 'sft-ray[tracking]', or leave it out"
        ) from None
    except Exception as error:  # of the package: no address, no key, no server
        raise ConfigError(
            f"tracking: {name} cannot be used: {first_line(error)}; mend that, or leave it out"
        ) from None
    return callback


def tensorboard(run: str) -> Any:
    from ray.tune.logger import TBXLoggerCallback

    return TBXLoggerCallback()


def mlflow(run: str) -> Any:
    """Where MLFLOW_TRACKING_URI says, or in MLflow's own file in the working folder."""
    # A server that is away is to be known of in seconds, not in MLflow's minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    logging.getLogger("mlflow").setLevel(logging.WARNING)

    return MLflowLoggerCallback(experiment_name=run)


def wandb(run: str) -> Any:
    """In the project that WANDB_PROJECT names, a group for the run."""
    import ray
    from ray.air.integrations.wandb import WandbLoggerCallback
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    callback = WandbLoggerCallback(project=os.environ.get("WANDB_PROJECT", "sft_ray"), group=run)
    settings = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
    base: Any = callback._logger_actor_cls

    class Logger(base):
        def __init__(self, settings: dict[str, str], **arguments: Any) -> None:
            os.environ.update(settings)
            super().__init__(**arguments)

    # Ray's own way would put WANDB_API_KEY into a runtime environment, which ends up in its logs.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Logger).options(num_cpus=0, scheduling_strategy=here)
    callback._remote_logger_class = SimpleNamespace(remote=partial(actor.remote, settings))
    return callback
