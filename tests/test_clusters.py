"""The cluster files fit the schemas of those who read them, and open nothing to the world."""

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

from sft_ray.yaml_text import parse_yaml

ROOT = Path(__file__).parents[1]
LAUNCHED = ["cluster.yaml", "clusters/gcp.yaml", "clusters/on_prem.yaml"]
CLOUDS = {"cluster.yaml": "aws", "clusters/gcp.yaml": "gcp"}
KUBERNETES = "1.37"


def tree_of(file: str) -> Any:
    return parse_yaml((ROOT / file).read_text(encoding="utf-8"), file)


def commands_of(tree: dict[str, Any], which: str) -> str:
    return "\n".join(tree[f"{which}_commands"])


def test_every_cluster_file_is_looked_at() -> None:
    here = {str(p.relative_to(ROOT)) for p in (ROOT / "clusters").iterdir() if p.is_file()}
    assert here == {*LAUNCHED, "clusters/kuberay-rayjob.yaml", "clusters/slurm.sh"} - {
        "cluster.yaml"
    } | {"clusters/aws_setup.py"}


@pytest.mark.parametrize("file", LAUNCHED)
def test_what_ray_up_reads_fits_rays_own_schema(file: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(tree_of(file)))


@pytest.mark.parametrize("file", LAUNCHED)
def test_a_misspelt_key_does_not_fit_it(file: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config({**tree_of(file), "max_wokers": 3}))


@pytest.mark.parametrize("file", LAUNCHED)
def test_every_node_has_the_versions_the_token_and_the_storage(file: str) -> None:
    tree = tree_of(file)
    setup = commands_of(tree, "setup")
    assert "constraints.txt" in setup
    assert "RAY_AUTH_MODE=token" in setup
    assert "SFT_RAY_STORAGE=" in setup
    assert "head_setup_commands" not in tree or "bashrc" not in commands_of(tree, "head_setup")
    mounted = {
        target.rsplit("/", 2)[-2:][1]: source for target, source in tree["file_mounts"].items()
    }
    assert mounted == {"sft_ray": ".", "auth_token": "~/.ray/auth_token"}
    assert all(target.endswith((".ray/auth_token", "/sft_ray")) for target in tree["file_mounts"])


def test_an_image_leaves_out_what_ray_up_leaves_out() -> None:
    left_out = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert all(tree_of(file)["rsync_exclude"] == left_out for file in LAUNCHED)


@pytest.mark.parametrize("file", LAUNCHED)
def test_the_dashboard_is_on_localhost(file: str) -> None:
    head = commands_of(tree_of(file), "head_start_ray")
    assert "--dashboard-host=127.0.0.1" in head
    assert "0.0.0.0" not in (ROOT / file).read_text()


@pytest.mark.parametrize("file", CLOUDS)
def test_training_stays_on_spot_machines_that_drain(file: str) -> None:
    tree = tree_of(file)
    types = tree["available_node_types"]
    assert types[tree["head_node_type"]]["resources"]["CPU"] == 0
    worker = types["gpu_worker"]
    assert worker["resources"]["GPU"] >= 1
    assert worker["min_workers"] < worker["max_workers"] <= tree["max_workers"]
    assert f"spot_notice --cloud {CLOUDS[file]}" in commands_of(tree, "worker_start_ray")
    assert "spot_notice" not in commands_of(tree, "head_start_ray")


@pytest.mark.parametrize("file", CLOUDS)
def test_the_poller_is_started_anew_by_a_command_that_does_not_kill_itself(
    file: str, tmp_path: Path
) -> None:
    """As Ray runs it: in an interactive login shell, whose own words hold the command."""
    (command,) = [c for c in tree_of(file)["worker_start_ray_commands"] if "spot_notice" in c]
    here, ours = f"#!/bin/sh\necho started > {tmp_path}/started\n", tmp_path / "python"
    ours.write_text(here)
    ours.chmod(0o755)
    words = f"export PATH={tmp_path}:$PATH HOME={tmp_path} && ({command})"
    done = subprocess.run(
        ["bash", "--login", "-c", "-i", words], capture_output=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0
    until = time.monotonic() + 10
    while not (tmp_path / "started").exists() and time.monotonic() < until:
        time.sleep(0.01)
    assert (tmp_path / "started").read_text() == "started\n"


def test_on_aws_spot_instances_have_a_profile_and_no_group_of_rays_making() -> None:
    tree = tree_of("cluster.yaml")
    assert "security_group" not in tree["provider"]  # Ray would add ssh from everywhere
    for node_type in tree["available_node_types"].values():
        config = node_type["node_config"]
        assert config["SecurityGroupIds"] == ["sg-FILL-IN"]
        assert config["IamInstanceProfile"]["Name"].startswith("sft-ray-")
        assert config["MetadataOptions"] == {"HttpTokens": "required"}
    worker = tree["available_node_types"]["gpu_worker"]["node_config"]
    assert worker["InstanceMarketOptions"] == {"MarketType": "spot"}


def test_on_google_machines_may_be_taken_and_have_an_account() -> None:
    tree = tree_of("clusters/gcp.yaml")
    for node_type in tree["available_node_types"].values():
        assert node_type["node_config"]["serviceAccounts"][0]["scopes"]
        for disk in node_type["node_config"]["disks"]:  # G2 machines take no pd-standard
            kind = f"zones/{tree['provider']['availability_zone']}/diskTypes/pd-balanced"
            assert disk["initializeParams"]["diskType"] == kind
    # One object in Google's schema, to which Ray hands it as it is.
    scheduling = tree["available_node_types"]["gpu_worker"]["node_config"]["scheduling"]
    assert scheduling == {"preemptible": True, "onHostMaintenance": "TERMINATE"}


# -- Kubernetes ---------------------------------------------------------------------------------

POD = {"type": "object", "required": ["spec"], "properties": {"metadata": {}, "spec": {}}}
START = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0}


def closed(required: list[str], **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "required": required,
        "properties": properties,
        "additionalProperties": False,
    }


# The fields of ray.io/v1 (KubeRay 1.5) as far as they are of use; pods have Kubernetes' schema.
RAY_JOB = closed(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata={"type": "object", "required": ["name"]},
    spec=closed(
        ["entrypoint", "rayClusterSpec"],
        entrypoint={"type": "string"},
        shutdownAfterJobFinishes={"type": "boolean"},
        ttlSecondsAfterFinished=COUNT,
        backoffLimit=COUNT,
        activeDeadlineSeconds=COUNT,
        runtimeEnvYAML={"type": "string"},
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        submitterPodTemplate=POD,
        rayClusterSpec=closed(
            ["headGroupSpec"],
            rayVersion={"type": "string"},
            enableInTreeAutoscaling={"type": "boolean"},
            autoscalerOptions=closed(
                [],
                idleTimeoutSeconds=COUNT,
                upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
            ),
            authOptions=closed(["mode"], mode={"enum": ["token", "disabled"]}),
            headGroupSpec=closed(["template"], rayStartParams=START, template=POD),
            workerGroupSpecs={
                "type": "array",
                "items": closed(
                    ["groupName", "template"],
                    groupName={"type": "string"},
                    replicas=COUNT,
                    minReplicas=COUNT,
                    maxReplicas=COUNT,
                    numOfHosts=COUNT,
                    rayStartParams=START,
                    template=POD,
                ),
            },
        ),
    ),
)


def pods_of(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def check_pod(template: dict[str, Any]) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **template}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_the_ray_job_fits_the_schemas_of_kuberay_and_kubernetes() -> None:
    job = tree_of("clusters/kuberay-rayjob.yaml")
    jsonschema.validate(job, RAY_JOB)
    assert len(pods_of(job)) == 2
    for pod in pods_of(job):
        check_pod(pod)
        names = {variable["name"] for variable in pod["spec"]["containers"][0]["env"]}
        assert names == {"SFT_RAY_STORAGE"}
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    import ray

    assert cluster["rayVersion"] == ray.__version__


def test_a_misspelt_field_fits_neither() -> None:
    job = tree_of("clusters/kuberay-rayjob.yaml")
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplica"] = 3
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, RAY_JOB)
    pod = pods_of(job)[0]
    pod["spec"]["containers"][0]["imagePullPolice"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError):
        check_pod(pod)


# -- Slurm --------------------------------------------------------------------------------------


def test_the_slurm_job_hands_its_words_on_and_starts_one_ray_per_machine(tmp_path: Path) -> None:
    """With a Slurm of three shell scripts: what would be run, and with which environment."""
    tools, venv = tmp_path / "tools", tmp_path / "venv" / "bin"
    tools.mkdir()
    venv.mkdir(parents=True)
    (venv / "activate").write_text("")
    said = tmp_path / "said.json"
    scripts = {
        "scontrol": "echo node-7; echo node-8",
        "ray": "true",
        "srun": 'python3 -c "import json, os, sys; json.dump('
        "[sys.argv[1:], os.environ['RAY_AUTH_MODE'], os.environ['SFT_RAY_STORAGE']], "
        f"open('{said}', 'w'))\" \"$@\"",
    }
    for name, body in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    environment = {
        "PATH": f"{tools}:/usr/local/bin:/usr/bin:/bin",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SFT_RAY_VENV": str(tmp_path / "venv"),
        "SLURM_JOB_NODELIST": "node-[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "8",
        "SLURM_JOB_ID": "123456",
    }
    words = ["experiments/sst2.yaml", "search.space.train.epochs={int: [1, 2]}"]
    subprocess.run([ROOT / "clusters" / "slurm.sh", *words], env=environment, check=True)
    command, auth, storage = json.loads(said.read_text())
    assert command[:4] == ["ray", "symmetric-run", "--address", "node-7:23456"]
    assert command[command.index("--") + 1 :] == ["python", "tune.py", *words]
    assert (auth, storage) == ("token", f"{ROOT}/runs")
    assert re.search(
        r"^#SBATCH --ntasks-per-node=1$", (ROOT / "clusters/slurm.sh").read_text(), re.M
    )
