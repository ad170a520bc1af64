"""`python -m sft_ray.search.spot_notice`: drains this node when its cloud is about to take it.

Ray itself asks no cloud.  A node that drains gets no new work, and searches have the trials on it
write their states and go on elsewhere.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.request import Request, urlopen

POLL_SECONDS = 5.0
TIMEOUT_SECONDS = 2.0
AWS, GCP = "http://169.254.169.254", "http://metadata.google.internal"
GCP_GRACE_SECONDS = 30.0  # Google gives no time, and never more than this


def aws_seconds_left(endpoint: str = AWS) -> float | None:
    """Until AWS takes this spot instance; None while it has not said so."""
    token = _ask(f"{endpoint}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
    headers = {} if token is None else {"X-aws-ec2-metadata-token": token}
    notice = _ask(f"{endpoint}/latest/meta-data/spot/instance-action", headers)
    if notice is None:
        return None
    at = datetime.fromisoformat(json.loads(notice)["time"])
    return max(0.0, (at - datetime.now(UTC)).total_seconds())


def gcp_seconds_left(endpoint: str = GCP) -> float | None:
    """Until Google takes this spot machine; None while it has not said so."""
    url = f"{endpoint}/computeMetadata/v1/instance/preempted"
    said = _ask(url, {"Metadata-Flavor": "Google"})
    return GCP_GRACE_SECONDS if said == "TRUE" else None


def _ask(url: str, headers: dict[str, str]) -> str | None:
    """What the metadata service answers; None where it knows no such thing or does not answer."""
    method = "PUT" if url.endswith("/token") else "GET"
    request = Request(url, headers=headers, method=method)  # noqa: S310 - http, by the clouds' design
    try:
        with urlopen(request, timeout=TIMEOUT_SECONDS) as answer:  # noqa: S310
            return str(answer.read().decode())
    except HTTPError as error:
        error.close()
        return None
    except (OSError, HTTPException):  # a connection that is refused, cut off, or takes too long
        return None


def drain(seconds: float) -> None:
    """Tell Ray that this node ends in so many seconds."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node"]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot notice"]
    command += ["--deadline-remaining-seconds", str(int(seconds))]
    subprocess.run(command, check=True)  # noqa: S603 - fixed arguments


def wait_and_drain(
    seconds_left: Callable[[], float | None],
    drain: Callable[[float], None] = drain,
    poll_seconds: float = POLL_SECONDS,
) -> None:
    """Ask until there is a notice, then drain; again where Ray does not answer, in that time."""
    while (seconds := seconds_left()) is None:
        time.sleep(poll_seconds)
    print(f"to be taken in {seconds:.0f} s: draining", flush=True)  # noqa: T201
    end = time.monotonic() + seconds
    while True:
        try:
            drain(max(0.0, end - time.monotonic()))
            return
        except subprocess.CalledProcessError:
            if time.monotonic() + poll_seconds >= end:
                raise
            time.sleep(poll_seconds)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cloud", choices=("aws", "gcp"), default="aws")
    parser.add_argument("--endpoint", help="of the metadata service, for a test")
    parser.add_argument("--now", action="store_true", help="drain without asking")
    parser.add_argument("--seconds", type=float, default=120.0, help="that --now leaves")
    given = parser.parse_args(arguments)
    if given.now:
        drain(given.seconds)
        return
    ask = aws_seconds_left if given.cloud == "aws" else gcp_seconds_left
    where = (given.endpoint,) if given.endpoint else ()
    wait_and_drain(lambda: ask(*where))


if __name__ == "__main__":
    main()
