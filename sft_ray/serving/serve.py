"""`sft-ray serve`: a model behind HTTP on Ray Serve; requests that come together are batched."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft_ray.errors import ConfigError, DataError, ResourceError, TrialError
from sft_ray.interrupt import interruptible
from sft_ray.serving.predict import load_predictor
from sft_ray.serving.requests import Limits, answer_together, read_request

ROWS_PER_BATCH = 32
REQUESTS_AT_ONCE = 256  # per replica; more wait
REQUESTS_WAITING = 1024  # more are told 503
APPLICATION = "sft_ray"
PATHS = {"/healthz": "GET", "/predict": "POST"}


@dataclass(frozen=True)
class Service:
    """What is served, and where.

    Attributes:
        model: run folder, model folder or hub id.
        num_replicas: processes that each hold the model, with one CPU each, or one GPU.
        timeout_seconds: of one request; who waits longer is told 408.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    num_replicas: int = 1
    limits: Limits = field(default_factory=Limits)
    timeout_seconds: float = 60.0


def check_service(service: Service) -> None:
    """Load the model once and try the port, before anything is started.

    Raises:
        ConfigError: the extra is missing, there is no such model, or the port is taken.
    """
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        raise ConfigError("serve: Ray Serve is not installed; pip install 'sft-ray[serve]'")
    load_predictor(service.model, _device(on_gpu=False))
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((service.host, service.port))
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"serve: cannot listen on {service.host}:{service.port}: {error}; choose another --port"
        ) from None


def check_room(service: Service, has: Mapping[str, float]) -> None:
    """Whether all replicas find a CPU each in a cluster that has, or can start, so much.

    Raises:
        ResourceError: they do not, so Ray would wait for ever.
    """
    wanted, cpus = service.num_replicas, has.get("CPU", 0.0)
    if cpus < wanted:
        raise ResourceError(
            f"serve: {wanted} replicas need as many CPUs, the cluster has {cpus:g}; choose fewer "
            "--replicas"
        )


def run_service(service: Service, ready: Callable[[str], None]) -> None:
    """Serve until Ctrl-C, on the Ray that is connected; nothing of it stays behind.

    Args:
        ready: is told the address when it answers.

    Raises:
        TrialError: the replicas do not start.
    """
    import ray
    from ray import serve
    from ray.serve.api import RunTarget
    from ray.serve.config import HTTPOptions
    from ray.serve.schema import LoggingConfig

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    quiet = LoggingConfig(log_level="ERROR", enable_access_log=False)
    options = HTTPOptions(
        host=service.host, port=service.port, request_timeout_s=service.timeout_seconds
    )
    gpus = 1 if ray.cluster_resources().get("GPU", 0) >= service.num_replicas else 0
    deployment = serve.deployment(
        Endpoint,
        num_replicas=service.num_replicas,
        max_ongoing_requests=REQUESTS_AT_ONCE,
        max_queued_requests=REQUESTS_WAITING,
        ray_actor_options={"num_cpus": 1, "num_gpus": gpus},
        logging_config=quiet,
    )
    place = str(Path(service.model).absolute()) if Path(service.model).exists() else service.model
    with interruptible() as interruption:
        try:
            serve.start(proxy_location="HeadOnly", http_options=options, logging_config=quiet)
            application = deployment.bind(place, service.limits, on_gpu=gpus > 0)
            target = RunTarget(application, name=APPLICATION, logging_config=quiet)
            serve.run_many([target], wait_for_applications_running=False)  # so Ctrl-C is heard
            while not interruption.is_asked and not _is_running():
                time.sleep(0.1)
            if not interruption.is_asked:
                ready(f"http://{service.host}:{service.port}")
            while not interruption.is_asked:
                time.sleep(0.1)
        finally:
            serve.shutdown()


def _is_running() -> bool:
    """Whether every replica has the model."""
    from ray import serve

    found = serve.status().applications[APPLICATION]
    if found.status == "DEPLOY_FAILED":
        reason = " ".join(found.message.split())[:300]
        raise TrialError(f"serve: the replicas do not start: {reason}")
    return bool(found.status == "RUNNING")


class Batches:
    """Answers rows together: those that come while the model computes make the next batch.

    Ray Serve's own batching closes a batch when its waiting time is over, also while the model is
    busy; under load that makes many small batches where this makes few large ones.
    """

    def __init__(self, answer: Callable[[list[Any]], list[Any]]) -> None:
        self._answer_all = answer
        self._waiting: list[tuple[Any, asyncio.Future[Any]]] = []
        self._task: asyncio.Task[None] | None = None

    async def answer(self, row: Any) -> Any:
        """The answer of one row; raises what answering its batch raised."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((row, future))
        if self._task is None:
            self._task = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        while self._waiting:
            # Of who has gone nothing is computed, and nothing kept.
            self._waiting = [pair for pair in self._waiting if not pair[1].done()]
            batch = self._waiting[:ROWS_PER_BATCH]
            self._waiting = self._waiting[ROWS_PER_BATCH:]
            try:
                # In a thread, so that requests are read meanwhile.
                answers = await asyncio.to_thread(self._answer_all, [row for row, _ in batch])
            except Exception as error:  # is each request's to tell
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():  # its client may have gone
                    future.set_result(answer)
        self._task = None


class Endpoint:
    """One replica: GET /healthz and POST /predict."""

    def __init__(self, model: str, limits: Limits, *, on_gpu: bool) -> None:
        import torch

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        # A replica that has no GPU sees all of them.
        self._predictor, self._limits = load_predictor(model, _device(on_gpu=on_gpu)), limits
        self._batches = Batches(lambda rows: answer_together(self._predictor, rows))

    async def __call__(self, request: Any) -> Any:
        path, method = request.url.path, request.method
        if path not in PATHS:
            return _refusal(404, f"no {path} here; there are {' and '.join(PATHS)}")
        if method != PATHS[path]:
            return _refusal(405, f"{path} takes {PATHS[path]}, got {method}")
        if path == "/healthz":
            return _reply({"status": "ok", "task": self._predictor.task.name})
        try:
            body = await self._body(request)
            if body is None:
                return _refusal(413, f"a request has at most {self._limits.body_bytes} bytes")
            rows, as_list = read_request(body, self._predictor, self._limits)
        except DataError as error:
            return _refusal(400, error.problems[0])
        answers = await asyncio.gather(*(self._batches.answer(row) for row in rows))
        return _reply(answers if as_list else answers[0])

    async def _body(self, request: Any) -> bytes | None:
        """The request's body; None if it is too large, however much more there would be."""
        most = self._limits.body_bytes
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > most:
                return None
        return bytes(body)


def _device(*, on_gpu: bool) -> Any:
    import torch

    return torch.device("cuda" if on_gpu else "cpu")


def _reply(content: Any, status: int = 200) -> Any:
    from starlette.responses import JSONResponse

    return JSONResponse(content, status_code=status)


def _refusal(status: int, line: str) -> Any:
    return _reply({"error": " ".join(line.split())}, status)
