"""The poller against metadata services like those of the clouds, on the loopback interface."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sft_ray.search.spot_notice import aws_seconds_left, gcp_seconds_left, wait_and_drain

TOKEN = "only-good-for-a-minute"
HOP = "X-aws-ec2-metadata-token"


class Metadata(ThreadingHTTPServer):
    """Answers as AWS (tokens required) and Google do; `notice` is what they know."""

    notice: str | None = None
    asked = 0
    cuts_off = False


class Handler(BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        right = self.path == "/latest/api/token" and self.headers[f"{HOP}-ttl-seconds"]
        self.answer(200 if right else 400, TOKEN)

    def do_GET(self) -> None:
        self.server.asked += 1
        if self.server.cuts_off:
            self.close_connection = True
            return
        if self.path == "/latest/meta-data/spot/instance-action":
            known = self.headers[HOP] == TOKEN
            code = 404 if self.server.notice is None else 200
            self.answer(code if known else 401, self.server.notice or "")
        elif self.path == "/computeMetadata/v1/instance/preempted":
            known = self.headers["Metadata-Flavor"] == "Google"
            self.answer(200 if known else 403, "TRUE" if self.server.notice else "FALSE")
        else:
            self.answer(404, "")

    def answer(self, code: int, text: str) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    with Metadata(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def endpoint_of(server: Metadata) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def aws_notice(seconds: float) -> str:
    at = datetime.now(UTC) + timedelta(seconds=seconds)
    return json.dumps({"action": "terminate", "time": at.strftime("%Y-%m-%dT%H:%M:%SZ")})


def test_no_notice_no_deadline(metadata: Metadata) -> None:
    assert aws_seconds_left(endpoint_of(metadata)) is None
    assert gcp_seconds_left(endpoint_of(metadata)) is None


def test_a_notice_says_how_long_is_left(metadata: Metadata) -> None:
    metadata.notice = aws_notice(120)
    left = aws_seconds_left(endpoint_of(metadata))
    assert left is not None
    assert 115 < left <= 120
    assert gcp_seconds_left(endpoint_of(metadata)) == 30
    metadata.notice = aws_notice(-5)
    assert aws_seconds_left(endpoint_of(metadata)) == 0


def test_a_service_that_does_not_answer_is_no_notice() -> None:
    nowhere = "http://127.0.0.1:9"
    assert aws_seconds_left(nowhere) is None
    assert gcp_seconds_left(nowhere) is None


def test_a_connection_that_is_cut_off_is_no_notice(metadata: Metadata) -> None:
    metadata.notice, metadata.cuts_off = aws_notice(60), True
    assert aws_seconds_left(endpoint_of(metadata)) is None
    assert gcp_seconds_left(endpoint_of(metadata)) is None
    assert metadata.asked == 2


def test_the_poller_waits_for_the_notice_and_drains_once(metadata: Metadata, capsys) -> None:
    drained: list[float] = []
    poller = threading.Thread(
        target=wait_and_drain,
        args=(lambda: aws_seconds_left(endpoint_of(metadata)), drained.append, 0.01),
    )
    poller.start()
    while metadata.asked < 3:
        poller.join(0.01)
    assert drained == []
    metadata.notice = aws_notice(90)
    poller.join(10)
    assert len(drained) == 1
    assert 85 < drained[0] <= 90
    assert "draining" in capsys.readouterr().out


@pytest.mark.parametrize(("seconds", "tries"), [(5.0, 3), (0.0, 1)])
def test_draining_is_tried_again_as_long_as_there_is_time(seconds: float, tries: int) -> None:
    asked: list[float] = []

    def drain(left: float) -> None:
        asked.append(left)
        if len(asked) < 3:
            raise subprocess.CalledProcessError(1, "ray drain-node")

    with nullcontext() if tries == 3 else pytest.raises(subprocess.CalledProcessError):
        wait_and_drain(lambda: seconds, drain, 0.001)
    assert len(asked) == tries
    assert asked == sorted(asked, reverse=True)
