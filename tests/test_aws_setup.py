"""What aws_setup.py makes, on AWS's own API as moto speaks it."""

import json
import shutil
from pathlib import Path

import boto3
import pytest

from clusters import aws_setup
from sft_ray.yaml_text import parse_yaml
from tests.aws import AN_IMAGE, name_an_image
from tests.s3 import CREDENTIALS, s3_server

CIDR = "203.0.113.7/32"


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch):
    """A session on a moto server that all of boto3 asks."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with s3_server() as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        session = boto3.Session(region_name="us-west-2")
        name_an_image(session, monkeypatch)
        yield session


def test_it_makes_what_the_cluster_file_names_and_fills_it_in(aws, tmp_path: Path, capsys) -> None:
    file = tmp_path / "cluster.yaml"
    shutil.copy(aws_setup.CLUSTER, file)
    words = ["--bucket", "mine", "--file", str(file)]
    for cidr in (CIDR, CIDR, "198.51.100.0/24"):  # what is there stays
        aws_setup.main(["--ssh-cidr", cidr, *words])
    (group,) = aws.client("ec2").describe_security_groups(
        Filters=[{"Name": "group-name", "Values": ["sft-ray"]}]
    )["SecurityGroups"]
    ranges = [r["CidrIp"] for rule in group["IpPermissions"] for r in rule["IpRanges"]]
    assert sorted(ranges) == ["198.51.100.0/24", CIDR]
    inside = [p["GroupId"] for r in group["IpPermissions"] for p in r["UserIdGroupPairs"]]
    assert inside == [group["GroupId"]]

    tree = parse_yaml(file.read_text(), "cluster.yaml")
    iam = aws.client("iam")
    for node_type in tree["available_node_types"].values():
        config = node_type["node_config"]
        assert config["SecurityGroupIds"] == [group["GroupId"]]
        assert config["ImageId"] == AN_IMAGE
        name = config["IamInstanceProfile"]["Name"]
        profile = iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]
        assert [role["RoleName"] for role in profile["Roles"]] == [name]
    assert "s3://mine/sft_ray" in "\n".join(tree["setup_commands"])
    assert "FILL-IN" not in file.read_text().replace("FILL-INs", "")
    assert "filled in" in capsys.readouterr().out
    worker = iam.get_role_policy(RoleName="sft-ray-worker", PolicyName="sft-ray-worker")
    statements = worker["PolicyDocument"]
    statements = json.loads(statements) if isinstance(statements, str) else statements
    assert {r for s in statements["Statement"] for r in s["Resource"]} == {
        "arn:aws:s3:::mine",
        "arn:aws:s3:::mine/*",
    }
    assert "mine" in [b["Name"] for b in aws.client("s3").list_buckets()["Buckets"]]


def test_a_bucket_of_somebody_else_is_told_in_a_line(aws, tmp_path: Path) -> None:
    role = "arn:aws:iam::111111111111:role/somebody"
    found = aws.client("sts").assume_role(RoleArn=role, RoleSessionName="somebody")["Credentials"]
    somebody = boto3.Session(
        found["AccessKeyId"], found["SecretAccessKey"], found["SessionToken"], "us-west-2"
    )
    aws_setup.make_bucket(somebody.client("s3"), "theirs", "us-west-2")
    file = tmp_path / "cluster.yaml"
    shutil.copy(aws_setup.CLUSTER, file)
    with pytest.raises(SystemExit, match=r"^error: --bucket: theirs belongs to somebody else.*$"):
        aws_setup.main(["--ssh-cidr", CIDR, "--bucket", "theirs", "--file", str(file)])
    assert file.read_text() == aws_setup.CLUSTER.read_text()
    groups = aws.client("ec2").describe_security_groups()["SecurityGroups"]
    assert "sft-ray" not in [group["GroupName"] for group in groups]


@pytest.mark.parametrize("everybody", ["0.0.0.0/0", "::/0", "my house"])
def test_ssh_is_not_opened_to_everybody(everybody: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        aws_setup.main(["--ssh-cidr", everybody, "--bucket", "mine"])
    assert caught.value.code == 2
    assert "--ssh-cidr" in capsys.readouterr().err
