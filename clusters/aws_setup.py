"""What cluster.yaml needs on AWS, made once and filled in: bucket, group, two roles, image.

    python clusters/aws_setup.py --ssh-cidr 203.0.113.7/32 --bucket my-bucket

Can be run again: what is there stays, and a new address is let in beside the old ones.  The
security group lets those reach ssh, and the machines of the cluster each other; nothing else.
"""

import argparse
import ipaddress
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

CLUSTER = Path(__file__).parents[1] / "cluster.yaml"
GROUP, HEAD, WORKER = "sft-ray", "sft-ray-head", "sft-ray-worker"
# AWS's own name for the current image.  Its Python is 3.12; that of Ray's `latest_dlami` is 3.6.
IMAGE = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"


def cidr(text: str) -> str:
    """An address range that is not everybody."""
    network = ipaddress.ip_network(text)
    if network.prefixlen == 0:
        raise argparse.ArgumentTypeError("ssh open to everybody; give your own address, as …/32")
    return str(network)


def make_bucket(s3: Any, bucket: str, region: str) -> None:
    """The bucket, unless it is there and ours; ends with a line where it is somebody else's."""
    where = {} if region == "us-east-1" else {"LocationConstraint": region}
    options = {"CreateBucketConfiguration": where} if where else {}
    try:
        s3.create_bucket(Bucket=bucket, **options)
    except s3.exceptions.BucketAlreadyOwnedByYou:
        pass
    except s3.exceptions.BucketAlreadyExists:
        raise SystemExit(
            f"error: --bucket: {bucket} belongs to somebody else, and names of buckets are the "
            "world's; take another name"
        ) from None


def make_group(ec2: Any, ssh_cidr: str) -> str:
    """The id of the security group, in the default network."""
    from botocore.exceptions import ClientError

    known = ec2.describe_security_groups(Filters=[{"Name": "group-name", "Values": [GROUP]}])
    if known["SecurityGroups"]:
        group = known["SecurityGroups"][0]["GroupId"]
    else:
        group = ec2.create_security_group(GroupName=GROUP, Description="sft_ray")["GroupId"]
    among = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
    ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": ssh_cidr}]}
    for rule in (among, ssh):
        try:
            ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[rule])
        except ClientError as error:
            if error.response["Error"]["Code"] != "InvalidPermission.Duplicate":
                raise
    return str(group)


def make_role(iam: Any, name: str, statements: list[dict[str, Any]]) -> str:
    """A role for machines, with a profile of the same name; the role's ARN."""
    trust = {"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}}
    trust["Action"] = "sts:AssumeRole"
    already = iam.exceptions.EntityAlreadyExistsException
    with suppress(already):
        iam.create_role(RoleName=name, AssumeRolePolicyDocument=policy([trust]))
    iam.put_role_policy(RoleName=name, PolicyName=name, PolicyDocument=policy(statements))
    with suppress(already):
        iam.create_instance_profile(InstanceProfileName=name)
    with suppress(already, iam.exceptions.LimitExceededException):
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    return str(iam.get_role(RoleName=name)["Role"]["Arn"])


def policy(statements: list[dict[str, Any]]) -> str:
    return json.dumps({"Version": "2012-10-17", "Statement": statements})


def allowed(actions: list[str], *resources: str) -> dict[str, Any]:
    return {"Effect": "Allow", "Action": actions, "Resource": list(resources)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ssh-cidr", type=cidr, required=True, help="who may reach ssh")
    parser.add_argument("--bucket", required=True)
    parser.add_argument("--region", default="us-west-2")
    parser.add_argument("--file", type=Path, default=CLUSTER, help="in which to fill in")
    given = parser.parse_args(arguments)
    import boto3

    session = boto3.Session(region_name=given.region)
    make_bucket(session.client("s3"), given.bucket, given.region)
    group = make_group(session.client("ec2"), given.ssh_cidr)
    iam = session.client("iam")
    arn = f"arn:aws:s3:::{given.bucket}"
    store = allowed(
        ["s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject"], arn, f"{arn}/*"
    )
    worker = make_role(iam, WORKER, [store])
    start = allowed(["ec2:*"], "*")
    make_role(iam, HEAD, [store, start, allowed(["iam:PassRole"], worker)])

    image = session.client("ssm").get_parameter(Name=IMAGE)["Parameter"]["Value"]

    text = given.file.read_text(encoding="utf-8")
    text = re.sub(r"ImageId: \S+", f"ImageId: {image}", text)
    text = re.sub(r"SecurityGroupIds: \[.*?\]", f"SecurityGroupIds: [{group}]", text)
    text = re.sub(r"(?m)^  region: .*$", f"  region: {given.region}", text)
    text = re.sub(r"s3://[^/\s]+/sft_ray", f"s3://{given.bucket}/sft_ray", text)
    given.file.write_text(text, encoding="utf-8")
    found = f"group {group}, bucket {given.bucket}, image {image}"
    print(f"filled in {given.file}: {found}")  # noqa: T201


if __name__ == "__main__":
    main()
