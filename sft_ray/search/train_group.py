"""Groups of Ray Train without what their processes would start, import or ask for and not use.

Where several workers train one trial, Ray Train starts and ranks them, and starts all anew when
one dies.  That takes its controller, a process for synchronisation and the workers.  Left out is
what serves other users of it: processes for Ray Data, for the autoscaler (which sees what the
placement group lacks) and for freeing placement groups (`free_what_the_dead_hold` does); torch in
any process but the workers, which join their process group themselves; and runtime environments,
with which Python starts twice per process.
"""

from __future__ import annotations

import os
from typing import Any

import ray
from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

SERVES_OTHERS = (DatasetsCallback, PlacementGroupCleanerCallback)


class GroupTrainer(DataParallelTrainer):
    """Ray Train's trainer of any framework, with less around its workers.

    Args:
        arguments: those of `DataParallelTrainer`.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, backend_config=GroupConfig(), **named)

    def _create_default_callbacks(self) -> list[Any]:
        found = super()._create_default_callbacks()
        return [callback for callback in found if not isinstance(callback, SERVES_OTHERS)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        """As Ray Train does it, on this node, for as long as this process lives."""
        arguments["scaling_policy"] = UnannouncedPolicy(self.scaling_config)
        here = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
        quiet = {RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR: "0"}  # it blocks now and then
        controller = (
            ray.remote(Controller)
            .options(num_cpus=0, label_selector=here)
            .remote(quiet | get_env_vars_to_propagate(), **arguments)
        )
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())


class UnannouncedPolicy(FixedScalingPolicy):
    """So many workers, without a word to the coordinator that Ray Data shares."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Nothing is asked for."""

    def _maybe_send_resource_request(self) -> None:
        """Nothing is asked for."""


class GroupOfWorkers(WorkerGroup):
    """Workers in the environment of their node."""

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> dict[str, Any]:
        return {}


class Controller(TrainController):
    """Takes the settings of Ray Train's own as an argument.

    Args:
        environment: Ray Train's variables, as the slot has them.
        arguments: those of `TrainController`.
    """

    worker_group_cls = GroupOfWorkers

    def __init__(self, environment: dict[str, str], **arguments: Any) -> None:
        os.environ.update(environment)
        super().__init__(**arguments)


class SharedDevices(Backend):
    """Workers of one node see each other's GPUs, which NCCL needs; else there is nothing to do."""

    share_cuda_visible_devices = True


class GroupConfig(BackendConfig):
    """The workers join their process group themselves."""

    @property
    def backend_cls(self) -> type[SharedDevices]:
        return SharedDevices
