"""How many texts a second `sft-ray serve` answers on the loopback interface, and how fast.

    python -m benchmarks.serve_load runs/quickstart

Starts the server, sends one text per request from N clients that each wait for their answer before
they send the next, and prints one JSON line per N.  Clients, HTTP proxy and model share the
machine's cores, so the figures are lower bounds for a model that has them to itself.  Beside them
stands what the model answers without a server, one text at a time and in one call.  CPU seconds per
text, of the process with the model and of all else that serves, also hold on a machine that does
other work.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from itertools import cycle, islice

import numpy as np
import psutil

from sft_ray.serving.predict import load_predictor
from sft_ray.serving.samples import sample_rows

SECONDS_TO_START = 300


def main() -> None:
    parser = argparse.ArgumentParser(description="Load on a server of one model.")
    parser.add_argument("model", help="run folder or model folder of a task that reads a text")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=400, help="for each number of clients")
    parser.add_argument("--replicas", type=int, default=1)
    arguments = parser.parse_args()
    predictor = load_predictor(arguments.model)
    texts = [row["text"] for row in sample_rows(predictor.task, 200)]
    rows = [{"text": text} for text in islice(cycle(texts), arguments.requests)]
    list(predictor.predict(rows[:8]))
    for what, parts in (("one at a time", [[row] for row in rows]), ("in one call", [rows])):
        began, used = time.perf_counter(), time.process_time()
        for part in parts:
            list(predictor.predict(part))
        seconds, used = time.perf_counter() - began, time.process_time() - used
        say(
            what=f"no server, {what}",
            cpus=os.cpu_count(),
            per_second=round(len(rows) / seconds, 1),
            model_cpu_ms=round(1000 * used / len(rows), 1),
        )
    port = free_port()
    command = [sys.executable, "-m", "sft_ray.cli", "serve", arguments.model]
    command += ["--port", str(port), "--replicas", str(arguments.replicas)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            began = time.perf_counter()
            if "serving" not in server.stdout.readline():
                sys.exit("the server did not start")
            say(what="server", seconds_to_start=round(time.perf_counter() - began, 1))
            bodies = [json.dumps(row).encode() for row in rows]
            measure(port, bodies[: max(arguments.clients)], max(arguments.clients))  # warm up
            for clients in arguments.clients:
                before = cpu_seconds(server.pid)
                seconds, took = measure(port, bodies, clients)
                after = cpu_seconds(server.pid)
                model, others = (
                    round(1000 * (b - a) / len(took), 1) for a, b in zip(before, after, strict=True)
                )
                p50, p95, p99 = (round(1000 * x, 1) for x in np.quantile(took, (0.5, 0.95, 0.99)))
                say(
                    what="served",
                    clients=clients,
                    requests=len(took),
                    per_second=round(len(took) / seconds, 1),
                    p50_ms=p50,
                    p95_ms=p95,
                    p99_ms=p99,
                    model_cpu_ms=model,
                    other_cpu_ms=others,
                )
        finally:
            server.send_signal(signal.SIGINT)


def measure(port: int, bodies: list[bytes], clients: int) -> tuple[float, list[float]]:
    """Seconds in all, and of each request; every one must be answered with 200."""
    took: list[float] = []
    errors: list[str] = []

    def talk(mine: list[bytes]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS_TO_START)
        for body in mine:
            began = time.perf_counter()
            connection.request("POST", "/predict", body)
            answer = connection.getresponse()
            said = answer.read()
            if answer.status != 200:
                errors.append(f"{answer.status} {said[:200]!r}")
            took.append(time.perf_counter() - began)
        connection.close()

    threads = [threading.Thread(target=talk, args=(bodies[i::clients],)) for i in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    if errors or len(took) != len(bodies):
        sys.exit(f"{len(errors)} requests failed, first: {errors[:1]}")
    return seconds, took


def cpu_seconds(server: int) -> tuple[float, float]:
    """Used so far by the processes with the model, and by the others that the server started."""
    model = others = 0.0
    for process in psutil.Process(server).children(recursive=True):
        try:
            times, name = process.cpu_times(), " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        if "ServeReplica" in name:
            model += times.user + times.system
        else:
            others += times.user + times.system
    return model, others


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def say(**facts: object) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
