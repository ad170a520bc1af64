"""Machines on one machine: network namespaces with a home, a /tmp and an sshd of their own.

Needs root, iproute2, util-linux, openssh-server and rsync.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NETWORK, BRIDGE = "10.77.0", "sftray0"
OUTSIDE = f"{NETWORK}.254"  # this machine, as the hosts see it
TOOLS = ("sshd", "rsync", "ip", "unshare", "ssh-keygen")
INTERPRETER = Path(sys.base_prefix)

# What runs as process 1 of a host.  Python may live below the home that is covered.
INSIDE = """
set -e
mount --make-rprivate /
hostname {name}
mkdir -p {home}/.ssh /run/sshd
mount -t tmpfs tmpfs /mnt && mkdir /mnt/shared && mount --bind {shared} /mnt/shared
mkdir -p {home}{below_home} && mount --bind {interpreter} {home}{below_home}
mount --rbind {home} /root
mount -t tmpfs -o size=2g tmpfs /dev/shm
mount -t tmpfs -o size=8g tmpfs /tmp
exec /usr/sbin/sshd -D -e -o UsePAM=no -o StrictModes=no -o PidFile=none -o PrintMotd=no \\
    -o PrintLastLog=no -o AuthorizedKeysFile=/root/.ssh/authorized_keys
"""


def what_is_missing() -> str | None:
    """Why hosts cannot be made here, if so."""
    if os.geteuid() != 0:
        return "needs root"
    lacking = [
        tool for tool in TOOLS if shutil.which(tool, path="/usr/sbin:/usr/bin:/sbin:/bin") is None
    ]
    return f"needs {', '.join(lacking)}: apt-get install openssh-server rsync" if lacking else None


def run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


class Host:
    """One machine.

    Attributes:
        ip: its address.
        home: its /root, as seen from here.
    """

    def __init__(self, number: int, folder: Path, shared: Path, key: Path) -> None:
        self.name, self.ip = f"sfthost{number}", f"{NETWORK}.{number}"
        self.home, self._log = folder / self.name, folder / f"{self.name}.log"
        self._veth = f"sftv{number}"
        (self.home / ".ssh").mkdir(parents=True)
        (self.home / ".ssh" / "authorized_keys").write_text(key.with_suffix(".pub").read_text())
        (self.home / ".profile").write_text(". ~/.bashrc\n")
        self._shared = shared
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        run("ip", "netns", "add", self.name)
        peer = f"{self._veth}p"
        run("ip", "link", "add", self._veth, "type", "veth", "peer", "name", peer)
        run("ip", "link", "set", peer, "netns", self.name, "name", "eth0")
        run("ip", "link", "set", self._veth, "master", BRIDGE, "up")
        for words in (("addr", "add", f"{self.ip}/24", "dev", "eth0"), ("link", "set", "lo", "up")):
            run("ip", "-n", self.name, *words)
        run("ip", "-n", self.name, "link", "set", "eth0", "up")
        below_home = (
            INTERPRETER.relative_to("/root") if INTERPRETER.is_relative_to("/root") else ".no"
        )
        inside = INSIDE.format(
            name=self.name,
            home=self.home,
            shared=self._shared,
            interpreter=INTERPRETER,
            below_home=f"/{below_home}",
        )
        enter = ["ip", "netns", "exec", self.name, "unshare", "-m", "-p", "-u", "-f"]
        enter += ["--mount-proc", "--kill-child", "bash", "-c", inside]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                enter, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def kill(self) -> None:
        """Pull the plug: every process of it dies at once, and it answers no more."""
        if self.process is not None:
            with suppress(subprocess.CalledProcessError):
                run("ip", "link", "set", self._veth, "down")
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def remove(self) -> None:
        self.kill()
        for words in (("link", "del", self._veth), ("netns", "del", self.name)):
            with suppress(subprocess.CalledProcessError):
                run("ip", *words)


@contextmanager
def hosts(count: int, folder: Path) -> Iterator[tuple[list[Host], Path]]:
    """So many machines that run, and the key that opens them."""
    key, shared = folder / "key", folder / "shared"
    shared.mkdir()
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
    run("ip", "link", "add", BRIDGE, "type", "bridge")
    made = [Host(number, folder, shared, key) for number in range(1, count + 1)]
    try:
        run("ip", "addr", "add", f"{OUTSIDE}/24", "dev", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
        for host in made:
            host.start()
        for host in made:
            wait_for_ssh(host, key)
        yield made, key
    finally:
        for host in made:
            host.remove()
        run("ip", "link", "del", BRIDGE)


def ssh(
    host: Host, key: Path, command: str, *, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a command in a login shell there."""
    options = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
    options += ["-o", "LogLevel=ERROR", "-o", "ConnectTimeout=5", "-i", str(key)]
    quoted = command.replace("'", "'\\''")
    return subprocess.run(
        ["ssh", *options, f"root@{host.ip}", f"bash --login -c -i '{quoted}'"],
        capture_output=True,
        text=True,
        check=check,
    )


def wait_for_ssh(host: Host, key: Path) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if ssh(host, key, "true", check=False).returncode == 0:
            return
        time.sleep(0.5)
    raise RuntimeError(f"{host.name} did not come up")
