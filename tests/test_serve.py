"""The server answers as `predict` does, refuses in a line, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_ray.errors import ConfigError, DataError, ResourceError
from sft_ray.serving import serve
from sft_ray.serving.predict import Predictor, load_predictor
from sft_ray.serving.requests import Limits, answer_together, read_request
from sft_ray.serving.serve import Batches, Endpoint, Service, check_room, check_service
from sft_ray.training.tasks import TASKS
from tests.models import (
    WIDE_VOCABULARY,
    load_tiny,
    save_tiny,
    task_dataset,
    task_rows,
    tiny_model_folder,
    toy_rows,
)
from tests.processes import processes_with

pytest.importorskip("fastapi")
TINY_LIMITS = Limits(body_bytes=2000, rows=8, characters=300)


def model_of(folder: Path, task: str) -> Path:
    base = tiny_model_folder(folder / "base", vocabulary=WIDE_VOCABULARY, noise=0.1, seed=3)
    dataset = task_dataset(folder / "data", task, base, train=40, validation=20)
    save_tiny(
        folder / "mine",
        base,
        load_tiny(base, dataset, task=TASKS[task]),
        dataset,
        {},
        TASKS[task],
    )
    return folder / "mine"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_of(tmp_path_factory.mktemp("served"), "text-classification")


@pytest.fixture(scope="module")
def predictor(model: Path) -> Predictor:
    return load_predictor(str(model))


@pytest.mark.parametrize(
    ("body", "fragment"),
    [
        (b"{", "the body is no JSON"),
        (b"\xff\xfe", "the body is no JSON"),
        (b"[" * 100_000, "the body is no JSON"),
        (b"[]", 'one input like {"text": "…"}, or a list'),
        (b'"text"', "one input like"),
        (b"[1]", "one input like"),
        (b'{"body": "a"}', "input 1: text-classification needs 'text'"),
        (b'[{"text": "a"}, {"text": 3}]', "input 2: column 'text' must hold texts"),
        (b'{"text": " "}', "input 1: column 'text' is empty"),
        (json.dumps([{"text": "a"}] * 9).encode(), "at most 8 inputs per request, got 9"),
        (json.dumps({"text": "a" * 301}).encode(), "input 1: at most 300 characters, got 301"),
        (b'{"text": "a \\ud83d"}', "input 1: "),
        (b'{"text": "a", "text_pair": "b"}', "trained without 'text_pair'; leave it out"),
    ],
)
def test_bad_requests_are_refused_in_a_line(
    predictor: Predictor, body: bytes, fragment: str
) -> None:
    with pytest.raises(DataError) as refusal:
        read_request(body, predictor, TINY_LIMITS)
    (line,) = refusal.value.problems
    assert fragment in line


@pytest.mark.parametrize(
    ("task", "optional", "row"),
    [
        ("text-classification", None, '{"text": "…"}'),
        ("text-classification", ("text_pair",), '{"text": "…", "text_pair": "…"}'),
        ("token-classification", (), '{"tokens": ["…"]}'),
        ("token-classification", ("predicate",), '{"tokens": ["…"], "predicate": 0}'),
        ("question-answering", (), '{"question": "…", "context": "…"}'),
    ],
)
def test_the_example_is_one_that_the_model_reads(
    predictor: Predictor, task: str, optional: tuple[str, ...] | None, row: str
) -> None:
    other = replace(predictor, task=TASKS[task], optional=optional)
    with pytest.raises(DataError) as refusal:
        read_request(b"[]", other, TINY_LIMITS)
    assert refusal.value.problems == (f"the body must be one input like {row}, or a list of them",)


@pytest.mark.parametrize("task", TASKS)
def test_rows_of_unlike_shape_share_a_batch(task: str, tmp_path: Path) -> None:
    predictor = load_predictor(str(model_of(tmp_path, task)))
    rows = task_rows(task, 6, seed=4)
    rows[2] = {"id": 7, **rows[2]}
    found = answer_together(predictor, [dict(row) for row in rows])
    alone = [next(predictor.predict([dict(row)])) for row in rows]
    assert json.dumps(found)
    assert same(found, alone)


def same(found: Any, expected: Any) -> bool:
    """Equal, numbers up to rounding: a batch pads."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[k], expected[k]) for k in found)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == (pytest.approx(expected, abs=1e-4) if expected != "" else ""))


async def asked(endpoint: Endpoint, path: str, method: str, body: bytes = b"") -> Any:
    """Status and answer of the endpoint, in parts of 500 bytes as a network would bring them."""
    from starlette.requests import Request

    parts = [body[i : i + 500] for i in range(0, max(len(body), 1), 500)]

    async def receive() -> Any:
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    scope = {"type": "http", "method": method, "path": path, "headers": [], "query_string": b""}
    response = await endpoint(Request(scope, receive))
    return response.status_code, json.loads(response.body), len(parts)


def test_a_replica_computes_on_a_gpu_only_if_it_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # it sees those of others
    monkeypatch.setattr(serve, "load_predictor", lambda _, device: asked.append(device.type))
    for on_gpu in (True, False):
        serve.Endpoint("model", TINY_LIMITS, on_gpu=on_gpu)
    assert asked == ["cuda", "cpu"]


def test_the_endpoint_batches_what_comes_together(model: Path, predictor: Predictor) -> None:
    rows = [{"text": text} for text, _ in toy_rows(40, seed=6)]
    sizes: list[int] = []

    async def talk() -> None:
        endpoint = Endpoint(str(model), TINY_LIMITS, on_gpu=False)
        honest = endpoint._predictor.predict

        def counting(rows: Any) -> Any:
            kept = list(rows)
            sizes.append(len(kept))
            return honest(kept)

        object.__setattr__(endpoint._predictor, "predict", counting)
        bodies = [json.dumps(row).encode() for row in rows]
        several = await asyncio.gather(*(asked(endpoint, "/predict", "POST", b) for b in bodies))
        assert [status for status, _, _ in several] == [200] * 40
        assert same([answer for _, answer, _ in several], list(predictor.predict(rows)))
        status, answers, _ = await asked(
            endpoint, "/predict", "POST", json.dumps(rows[:3]).encode()
        )
        assert status == 200
        assert same(answers, list(predictor.predict(rows[:3])))
        assert await asked(endpoint, "/healthz", "GET") == (
            200,
            {"status": "ok", "task": "text-classification"},
            1,
        )
        assert (await asked(endpoint, "/predict", "GET"))[:2] == (
            405,
            {"error": "/predict takes POST, got GET"},
        )
        assert (await asked(endpoint, "/predict/", "POST"))[0] == 404
        assert (await asked(endpoint, "/predict", "POST", b'{"text": 1}'))[0] == 400
        status, answer, unread = await asked(endpoint, "/predict", "POST", b" " * 100_000)
        assert (status, answer) == (413, {"error": "a request has at most 2000 bytes"})
        assert unread > 190  # the rest is not taken in

    asyncio.run(talk())
    assert sum(sizes) == 43
    assert len(sizes) <= 5


def test_a_batch_grows_while_the_model_is_busy_and_an_error_is_that_batch_s_only() -> None:
    sizes: list[int] = []

    def slow(rows: list[int]) -> list[int]:
        sizes.append(len(rows))
        time.sleep(0.05)
        if -1 in rows:
            raise ValueError("of this batch")
        return [2 * row for row in rows]

    async def talk() -> None:
        batches = Batches(slow)
        first = asyncio.create_task(batches.answer(0))
        await asyncio.sleep(0.02)  # the model is busy now
        later = [asyncio.create_task(batches.answer(row)) for row in range(1, 51)]
        later[7].cancel()
        assert await first == 0
        found = await asyncio.gather(*later, return_exceptions=True)
        assert [x for i, x in enumerate(found) if i != 7] == [
            2 * row for row in range(1, 51) if row != 8
        ]
        with pytest.raises(ValueError, match="of this batch"):
            await batches.answer(-1)
        assert await batches.answer(3) == 6

    asyncio.run(talk())
    assert sizes in ([1, 32, 17, 1, 1], [1, 31, 18, 1, 1])


def test_nothing_is_computed_for_who_has_gone() -> None:
    seen: list[int] = []

    def slow(rows: list[int]) -> list[int]:
        seen.extend(rows)
        time.sleep(0.05)
        return rows

    async def talk() -> None:
        batches = Batches(slow)
        first = asyncio.create_task(batches.answer(0))
        await asyncio.sleep(0.02)
        gone = [asyncio.create_task(batches.answer(row)) for row in range(1, 200)]
        await asyncio.sleep(0)
        for task in gone:
            task.cancel()
        last = asyncio.create_task(batches.answer(200))
        assert [await first, await last] == [0, 200]

    asyncio.run(talk())
    assert seen == [0, 200]


def test_what_cannot_be_served_is_refused_before_ray_starts(model: Path, monkeypatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}.*--port"):
            check_service(Service(str(model), port=port))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        check_service(Service("no/such-model"))
    honest = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "fastapi" else honest(n, *a)
    )
    with pytest.raises(ConfigError, match=r"pip install 'sft-ray\[serve\]'"):
        check_service(Service(str(model)))


@pytest.mark.parametrize("cpus", [{"CPU": 2.0}, {}])
def test_more_replicas_than_cpus_are_refused(cpus: dict[str, float]) -> None:
    check_room(Service("x", num_replicas=2), {"CPU": 2.0})
    with pytest.raises(ResourceError, match=r"3 replicas need as many CPUs, the cluster has [02];"):
        check_room(Service("x", num_replicas=3), cpus)


def fetch(url: str, body: bytes | None = None) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(url, body, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.ray
@pytest.mark.usefixtures("hears_signals")
@pytest.mark.cluster
def test_a_real_server_answers_until_ctrl_c(
    model: Path, predictor: Predictor, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "sft_ray.cli", "serve", str(model), "--port", str(port)]
    mark = f"sft-ray-test-{port}"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "MARK": mark}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert f"on http://127.0.0.1:{port}; Ctrl-C ends it" in process.stdout.readline()
        url = f"http://127.0.0.1:{port}"
        assert fetch(f"{url}/healthz") == (200, {"status": "ok", "task": "text-classification"})
        rows = [{"text": text} for text, _ in toy_rows(60, seed=6)]
        with ThreadPoolExecutor(16) as clients:
            found = list(
                clients.map(lambda row: fetch(f"{url}/predict", json.dumps(row).encode()), rows)
            )
        assert [status for status, _ in found] == [200] * 60
        assert same([answer for _, answer in found], list(predictor.predict(rows)))
        assert fetch(f"{url}/predict", b"{}")[0] == 400
        assert fetch(f"{url}/predict", b" " * 1_000_001)[0] == 413
        process.send_signal(signal.SIGINT)
        said = process.stdout.read()
    assert (process.returncode, said) == (0, "ended\n")
    assert not processes_with(mark)
