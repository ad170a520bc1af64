"""A real S3 API on the loopback interface, in a process of its own; a proxy that misbehaves."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pyarrow import fs

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
BUCKET = "bucket"


def options(port: int, host: str = "127.0.0.1") -> str:
    """What follows a URI's path so that it means the server at this port."""
    return f"?endpoint_override={host}:{port}&scheme=http"


@contextmanager
def s3_server(host: str = "127.0.0.1") -> Iterator[int]:
    """A moto server with one bucket; its port.  CREDENTIALS must be in the environment."""
    with socket.socket() as free:
        free.bind((host, 0))
        port: int = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", host]
    quiet = subprocess.DEVNULL
    server = subprocess.Popen([*command, "-p", str(port)], stdout=quiet, stderr=quiet)
    try:
        _wait_for(host, port, server)
        filesystem, _ = fs.FileSystem.from_uri(
            f"s3://{BUCKET}{options(port, host)}&allow_bucket_creation=true"
        )
        filesystem.create_dir(BUCKET)
        yield port
    finally:
        server.kill()
        server.wait()


def _wait_for(host: str, port: int, server: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until and server.poll() is None:
        try:
            socket.create_connection((host, port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError("the S3 server did not come up")


class Proxy:
    """Between a client and the server: turns `failures` connections away, passes the others on.

    Args:
        port: of the server.

    Attributes:
        failures: requests that are still to fail.
        status: that they fail with.
        failed: requests that did.
        delay: seconds that every PUT is held up.
    """

    def __init__(self, port: int) -> None:
        self.failures, self.status, self.failed, self.delay = 0, 503, 0, 0.0
        self._server_port, self._open = port, set[socket.socket]()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def fail(self, times: int, status: int = 503) -> None:
        """From now on, on new connections; the old ones are closed."""
        self.failures, self.status = times, status
        for connection in list(self._open):
            _close(connection)

    def close(self) -> None:
        self.fail(0)
        _close(self._listener)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._open.add(client)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            first = client.recv(1 << 16)
            if self.failures > 0:
                self.failures -= 1
                self.failed += 1
                head = (
                    f"HTTP/1.1 {self.status} No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                )
                client.sendall(head.encode())
                return
            server = socket.create_connection(("127.0.0.1", self._server_port))
            self._open.add(server)
            threading.Thread(target=self._back, args=(server, client), daemon=True).start()
            while first:
                if first.startswith(b"PUT"):
                    time.sleep(self.delay)
                server.sendall(first)
                first = client.recv(1 << 16)
            _close(server)
        except OSError:
            pass
        finally:
            _close(client)

    def _back(self, server: socket.socket, client: socket.socket) -> None:
        try:
            while content := server.recv(1 << 16):
                client.sendall(content)
        except OSError:
            pass
        finally:
            _close(client)
            _close(server)


def _close(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def names_below(port: int, prefix: str, host: str = "127.0.0.1") -> list[str]:
    """Every object of the bucket below a prefix."""
    filesystem, _ = fs.FileSystem.from_uri(f"s3://{BUCKET}{options(port, host)}")
    selector = fs.FileSelector(f"{BUCKET}/{prefix}", recursive=True, allow_not_found=True)
    infos = filesystem.get_file_info(selector)
    return sorted(i.path for i in infos if i.type == fs.FileType.File)
