"""`ray up cluster.yaml` against AWS's API as moto speaks it, up to the first ssh connection."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from clusters import aws_setup
from sft_ray.yaml_text import parse_yaml
from tests.aws import name_an_image
from tests.s3 import CREDENTIALS, s3_server

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of Ray's own use of boto3
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
REGION = "us-west-2"


@pytest.fixture
def filled_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A checkout whose cluster.yaml `aws_setup.py` has filled in; all of boto3 asks moto."""
    for name, value in {**CREDENTIALS, "AWS_DEFAULT_REGION": REGION}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray leaves the key of its machines in ~/.ssh
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("a" * 64)
    file = tmp_path / "cluster.yaml"
    shutil.copy(aws_setup.CLUSTER, file)
    with s3_server() as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        name_an_image(boto3.Session(region_name=REGION), monkeypatch)
        words = ["--ssh-cidr", "203.0.113.7/32", "--bucket", "mine", "--file", str(file)]
        aws_setup.main(words)
        yield file


def instances() -> list[dict[str, Any]]:
    found = boto3.client("ec2", region_name=REGION).describe_instances()["Reservations"]
    return [instance for one in found for instance in one["Instances"]]


def tags_of(instance: dict[str, Any]) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in instance.get("Tags", [])}


def test_the_head_is_started_with_its_role_its_group_and_its_tags(filled_in: Path) -> None:
    wanted = parse_yaml(filled_in.read_text(), "cluster.yaml")["available_node_types"]["head"]
    command = [str(Path(sys.executable).parent / "ray"), "up", "cluster.yaml", "--yes"]
    with (filled_in.parent / "said").open("w") as said:
        up = subprocess.Popen(
            [*command, "--no-config-cache"],
            cwd=filled_in.parent,
            env={**os.environ, "RAY_UP_enable_autoscaler_v2": "0"},
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        until = time.monotonic() + 200
        while not instances() and up.poll() is None and time.monotonic() < until:
            time.sleep(1)
    finally:
        os.killpg(up.pid, signal.SIGTERM)  # from here on it would wait for ssh
        up.wait()
    (head,) = instances() or [pytest.fail((filled_in.parent / "said").read_text()[-3000:])]
    config = wanted["node_config"]
    assert head["InstanceType"] == config["InstanceType"]
    assert [group["GroupId"] for group in head["SecurityGroups"]] == config["SecurityGroupIds"]
    assert head["IamInstanceProfile"]["Arn"].endswith("/sft-ray-head")
    assert head.get("InstanceLifecycle") != "spot"
    assert tags_of(head)["ray-cluster-name"] == "sft-ray"
    assert tags_of(head)["ray-node-type"] == "head"
    groups = boto3.client("ec2", region_name=REGION).describe_security_groups()["SecurityGroups"]
    ranges = [
        one["CidrIp"]
        for group in groups
        for rule in group["IpPermissions"]
        for one in rule["IpRanges"]
    ]
    assert ranges == ["203.0.113.7/32"]  # Ray has made no group of its own


def test_a_worker_is_a_spot_instance_with_the_workers_role(filled_in: Path) -> None:
    from ray.autoscaler._private.commands import _bootstrap_config
    from ray.autoscaler._private.providers import _get_node_provider

    tree = parse_yaml(filled_in.read_text(), "cluster.yaml")
    config = _bootstrap_config(tree, no_config_cache=True)
    provider = _get_node_provider(config["provider"], config["cluster_name"])
    node_type = config["available_node_types"]["gpu_worker"]
    tags = {"ray-node-type": "worker", "ray-user-node-type": "gpu_worker"}
    for _ in range(2):  # Ray asks for "1 to n" instances, and moto gives the least
        provider.create_node(node_type["node_config"], tags, 1)
    found = instances()
    assert len(found) == 2
    for worker in found:
        assert worker["InstanceLifecycle"] == "spot"
        assert worker["InstanceType"] == "g5.2xlarge"
        assert worker["IamInstanceProfile"]["Arn"].endswith("/sft-ray-worker")
        assert tags_of(worker)["ray-user-node-type"] == "gpu_worker"
        (group,) = worker["SecurityGroups"]
        assert [group["GroupId"]] == node_type["node_config"]["SecurityGroupIds"]
