"""clusters/on_prem.yaml on three hosts: launched, searched on, broken, mended, resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from sft_ray.yaml_text import dump_yaml, parse_yaml
from tests.cluster.hosts import OUTSIDE, Host, hosts, ssh, wait_for_ssh, what_is_missing
from tests.s3 import BUCKET, CREDENTIALS, names_below, s3_server

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
MISSING = what_is_missing()
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
]
TOKEN = "a" * 64
LASTING = [
    "experiments/quickstart.yaml",
    "search.trials=3",
    "search.default_recipe=false",
    "search.pruner=none",
    "search.space={train.learning_rate: {log_uniform: [1.0e-5, 1.0e-3]}}",
    "train.epochs=4",
    "checkpoint.every_minutes=0.05",
]


class Desk:
    """Where the user sits: a checkout with a filled-in cluster.yaml, and the three hosts."""

    def __init__(self, folder: Path, machines: list[Host], key: Path, s3: str) -> None:
        self.folder, self.machines, self.key, self.s3 = folder / "checkout", machines, key, s3
        files = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        for name in files:
            if (ROOT / name).is_file():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, self.folder / name)
        quickstart = self.folder / "experiments" / "quickstart.yaml"
        text = quickstart.read_text().replace("trials: 12", "trials: 3")
        text = text.replace("{train: 800, validation: 300}", "{train: 96, validation: 48}")
        quickstart.write_text(text)
        self.home = folder / "home"
        (self.home / ".ray").mkdir(parents=True)
        (self.home / ".ray" / "auth_token").write_text(TOKEN)
        (self.home / ".ray" / "auth_token").chmod(0o600)
        self.environment = {
            **os.environ,
            "HOME": str(self.home),
            "RAY_UP_enable_autoscaler_v2": "0",
            "RAY_TMPDIR": str(folder / "r"),
            "OMP_NUM_THREADS": "1",
        }
        (folder / "r").mkdir()
        self.write_cluster_file()

    def write_cluster_file(self) -> None:
        """clusters/on_prem.yaml with its FILL-INs; the environment of this test instead of pip."""
        tree = parse_yaml((ROOT / "clusters" / "on_prem.yaml").read_text(), "on_prem.yaml")
        head, *workers = self.machines
        tree["cluster_name"] = f"sft-ray-{os.getpid()}"
        tree["provider"] |= {"head_ip": head.ip, "worker_ips": [host.ip for host in workers]}
        tree["auth"] = {"ssh_user": "root", "ssh_private_key": str(self.key)}
        names = {
            "PATH": f"{BIN}:$PATH",
            "PYTHONPATH": "$HOME/sft_ray",
            "RAY_AUTH_MODE": "token",
            "SFT_RAY_STORAGE": "/mnt/shared/runs",
            "HF_HUB_OFFLINE": "1",
            **CREDENTIALS,
        }
        lines = "; ".join(f'echo export {name}=\\"{value}\\"' for name, value in names.items())
        tree["setup_commands"] = [f"({lines}) > ~/.bashrc".replace("$", "\\$")]
        for which in ("head", "worker"):
            starts = tree[f"{which}_start_ray_commands"]
            host = (
                "--num-cpus=1 --node-ip-address=$(ip -4 -br addr show eth0 | grep -o '10[.0-9]*')"
            )
            starts[-1] += f" {host}"
        (self.folder / "cluster.yaml").write_text(dump_yaml(tree))

    @property
    def head(self) -> Host:
        return self.machines[0]

    def ray(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(BIN / "ray"), *words],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=1500,
            **options,
        )

    def submit(self, *words: str) -> subprocess.Popen[str]:
        """`ray submit cluster.yaml tune.py -- …`, running."""
        more = ["--", *words] if words else []
        with (self.folder / "said").open("w") as said:
            return subprocess.Popen(
                [str(BIN / "ray"), "submit", "cluster.yaml", "tune.py", *more],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return (self.folder / "said").read_text(errors="replace")

    def wait(self, condition: Callable[[], Any], seconds: float = 900) -> Any:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if found := condition():
                return found
            time.sleep(1)
        raise AssertionError(f"waited in vain; {self.said[-3000:]}")

    def on_head(self, command: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
        return ssh(self.head, self.key, command, check=check)

    def revive(self, host: Host) -> None:
        """Another machine at the address of one that is gone."""
        host.remove()
        host.start()
        wait_for_ssh(host, self.key)

    def driver_pid(self) -> int:
        """Of the one job that runs."""
        command = "from ray.job_submission import JobSubmissionClient as C"
        command += "; print('PID', [j.driver_info.pid for j in C().list_jobs()"
        command += " if j.status == 'RUNNING'][0])"
        return int(self.on_head(f'python -c "{command}"').stdout.split("PID")[1])

    def alive(self) -> int:
        command = "import ray; ray.init(address='auto', logging_level='ERROR', log_to_driver=False)"
        command += "; print('ALIVE', sum(n['Alive'] for n in ray.nodes()))"
        done = self.on_head(f'python -c "{command}"', check=False)
        return int(done.stdout.split("ALIVE")[1]) if "ALIVE" in done.stdout else 0


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """Three hosts with `ray up` behind them, and an S3 server that they reach."""
    folder = Path("/var/tmp") / f"sft{os.getpid()}"  # short: sockets lie below
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        with hosts(3, folder) as (machines, key), s3_server(OUTSIDE) as port:
            place = f"?endpoint_override={OUTSIDE}:{port}&scheme=http"
            desk = Desk(folder, machines, key, f"s3://{BUCKET}/runs{place}")
            desk.s3_port = port
            done = desk.ray("up", "cluster.yaml", "--yes")
            assert done.returncode == 0, done.stdout + done.stderr
            desk.wait(lambda: desk.alive() == 3, 300)
            yield desk
    shutil.rmtree(folder, ignore_errors=True)


def shared(desk: Desk, run: str) -> Path:
    return desk.head.home.parent / "shared" / "runs" / run


def results(desk: Desk, run: str) -> dict[str, Any]:
    return json.loads((shared(desk, run) / "results.json").read_text())


def test_the_exact_line_runs_the_quickstart_over_two_hosts(desk: Desk) -> None:
    process = desk.submit()
    assert process.wait(1500) == 0, desk.said
    assert "ray job logs --follow" in desk.said
    found = results(desk, "quickstart")
    assert len(found["trials"]) == 3
    assert found["environment"]["workers_per_trial"] == 2
    assert found["environment"]["slots"] == 1
    # Each host has one CPU: two workers of one trial cannot have been on one.
    assert {trial["state"] for trial in found["trials"]} <= {"COMPLETE", "PRUNED"}


def test_on_s3_with_overrides_in_many_words(desk: Desk) -> None:
    words = ["experiments/quickstart.yaml", "name=on-s3", f"storage='{desk.s3}'", "search.trials=2"]
    words += ["search.space={train.learning_rate: {log_uniform: [1.0e-5, 1.0e-3]}}"]
    assert desk.submit(*words).wait(1500) == 0, desk.said
    names = names_below(desk.s3_port, "runs/on-s3", OUTSIDE)
    assert f"{BUCKET}/runs/on-s3/results.json" in names
    assert f"{BUCKET}/runs/on-s3/best/model.safetensors" in names
    assert not [name for name in names if "marker" in name]


def test_a_folder_that_is_not_shared_is_refused_in_one_line(desk: Desk) -> None:
    words = ["experiments/quickstart.yaml", "name=alone", "storage=/root/runs"]
    assert desk.submit(*words).wait(300) != 0, desk.said
    lines = [line for line in desk.said.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, desk.said
    assert "is not shared" in lines[0]
    assert not (desk.head.home / "runs").exists()


def test_a_dropped_connection_a_killed_driver_and_a_lost_host_cost_little(desk: Desk) -> None:
    words = [*LASTING, "train.epochs=24", "name=lasting"]  # not over before the host is missed
    process, run = desk.submit(*words), shared(desk, "lasting")
    desk.wait(lambda: list(run.glob("trials/*/metrics.jsonl")))

    os.killpg(process.pid, signal.SIGKILL)  # the ssh session drops
    process.wait()
    before = (run / "study.journal").stat().st_size
    desk.wait(lambda: (run / "study.journal").stat().st_size > before)

    process = desk.submit(*words)  # sees it again
    desk.wait(lambda: "following job" in desk.said)
    desk.wait(lambda: list(run.glob("trials/*/last/state.json")))
    desk.on_head(f"kill -9 {desk.driver_pid()}")
    assert process.wait(300) != 0
    assert not (run / "results.json").exists()

    process = desk.submit(*words)  # resumes
    desk.wait(lambda: "going on with" in desk.said)
    desk.wait(lambda: "%" in desk.said.split("going on with")[1])
    desk.machines[2].kill()
    desk.wait(lambda: f"{desk.machines[2].ip} is gone" in desk.said, 300)
    assert process.wait(1500) == 0, desk.said
    trials = results(desk, "lasting")["trials"]
    assert [trial["number"] for trial in trials] == [0, 1, 2]
    assert {trial["state"] for trial in trials} == {"COMPLETE"}


def test_a_host_joins_and_drains(desk: Desk) -> None:
    lost = desk.machines[2]
    lost.kill()
    desk.wait(lambda: desk.alive() == 2, 300)
    long = ["train.epochs=24", "resources.workers_per_trial=1"]
    process = desk.submit(*LASTING, *long, "name=growing")
    desk.wait(lambda: "%" in desk.said.split("starting")[-1] if "starting" in desk.said else False)
    desk.revive(lost)
    join = f"ray start --address={desk.head.ip}:6379 --num-cpus=1 --node-ip-address={lost.ip}"
    assert ssh(lost, desk.key, join, check=False).returncode == 0
    desk.wait(lambda: f"{lost.ip} joins" in desk.said, 120)
    desk.wait(lambda: "room for 3 slots now" in desk.said, 120)
    drain = "python -m sft_ray.search.spot_notice --now --seconds 60"
    done = ssh(desk.machines[1], desk.key, drain, check=False)
    assert done.returncode == 0, done.stderr
    desk.wait(lambda: f"{desk.machines[1].ip} is taken away" in desk.said, 60)
    assert process.wait(1500) == 0, desk.said
    assert {trial["state"] for trial in results(desk, "growing")["trials"]} == {"COMPLETE"}


def test_a_new_head_goes_on_where_the_lost_one_stopped(desk: Desk) -> None:
    words = [*LASTING, "name=headless"]
    process, run = desk.submit(*words), shared(desk, "headless")
    desk.wait(lambda: list(run.glob("trials/*/last/state.json")))
    desk.head.kill()
    with suppress(subprocess.TimeoutExpired):  # ssh may wait long for a machine that is silent
        process.wait(20)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (run / "results.json").exists()

    for host in desk.machines:  # Ray on the others does not outlive its head for long
        desk.revive(host)
    done = desk.ray("up", "cluster.yaml", "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    desk.wait(lambda: desk.alive() == 3, 300)
    process = desk.submit(*words)
    assert process.wait(1500) == 0, desk.said
    assert "going on with" in desk.said
    trials = results(desk, "headless")["trials"]
    assert [trial["number"] for trial in trials] == [0, 1, 2]
    assert {trial["state"] for trial in trials} == {"COMPLETE"}
    assert sum(trial["restarts"] for trial in trials) == 0  # a lost head is nobody's fault


def test_a_wrong_token_is_refused(desk: Desk) -> None:
    ask = "import ray; ray.init(address='auto', log_to_driver=False); print(ray.nodes())"
    done = desk.on_head(f'RAY_AUTH_TOKEN={"b" * 64} python -c "{ask}"', check=False)
    assert done.returncode != 0
    assert "NodeID" not in done.stdout
    http = "curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1:8265/api/jobs/"
    assert desk.on_head(http, check=False).stdout.strip() in ("401", "403")


def test_the_doctor_finds_what_was_planted(desk: Desk) -> None:
    fine = desk.on_head("sft-ray doctor --address auto", check=False)
    assert "token authentication" in fine.stdout, fine.stdout + fine.stderr
    sick = next(host for host in desk.machines[1:] if host.process is not None)
    planted = sick.home / "sft_ray" / "optuna-4.0.dist-info"
    planted.mkdir()
    (planted / "METADATA").write_text("Metadata-Version: 2.1\nName: optuna\nVersion: 4.0\n")
    ssh(sick, desk.key, "fallocate -l 1700M /dev/shm/full", check=False)
    unreachable = f"s3://{BUCKET}/runs?endpoint_override={OUTSIDE}:9&scheme=http"
    done = desk.on_head(f"sft-ray doctor --address auto --storage '{unreachable}'", check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "optuna 4.0, here" in done.stdout
    assert sick.ip in done.stdout
    assert "to mend: versions, storage, free /dev/shm" in done.stderr + done.stdout
