"""What the doctor makes of what machines say; the machines themselves are in tests/cluster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sft_ray.search import doctor
from sft_ray.search.doctor import Check, draw, look_around

NAMES = {"a": "10.0.0.1", "b": "10.0.0.2"}
HERE = look_around(None)
FINE = replace(HERE, gpus=["L4"], driver="570.1", disk_gb=90, shm_gb=8, has_token_mode=True)


def found(check: Check) -> tuple[bool | None, str]:
    return check.ok, check.found


def test_this_machine_says_what_it_has() -> None:
    import optuna

    assert HERE.versions["optuna"] == optuna.__version__
    assert HERE.disk_gb > 0
    assert HERE.reaches_dashboard is False


def test_an_open_port_is_found() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        assert look_around(server.getsockname()).reaches_dashboard


def test_machines_that_are_alike_are_fine() -> None:
    machines = {"a": FINE, "b": FINE}
    checks = [
        doctor._versions(NAMES, machines),
        doctor._gpus(NAMES, machines, {"a": 0, "b": 1}),
        *doctor._room(NAMES, machines),
        doctor._token(NAMES, machines),
        doctor._dashboard(NAMES, machines),
    ]
    assert [check.ok for check in checks] == [True] * 6
    assert checks[1].found == "1: L4; driver 570.1"
    assert checks[3].found == "at least 8 GB"


@pytest.mark.parametrize(
    ("wrong", "check", "said"),
    [
        ({"versions": {**HERE.versions, "optuna": "4.0"}}, "_versions", "optuna 4.0, here"),
        ({"disk_gb": 2.0}, "disk", "2.0 GB, wanted 10"),
        ({"shm_gb": 0.1}, "shm", "0.1 GB, wanted 0.5"),
        ({"has_token_mode": False}, "_token", "off"),
        ({"reaches_dashboard": True}, "_dashboard", "can open it"),
        ({"gpus": []}, "_gpus", "Ray counts 1, nvidia-smi finds 0"),
    ],
)
def test_what_is_wrong_is_named_with_its_machine_and_a_mend(wrong, check, said) -> None:
    machines = {"a": FINE, "b": replace(FINE, **wrong)}
    if check in ("disk", "shm"):
        line = doctor._room(NAMES, machines)[check == "shm"]
    elif check == "_gpus":
        line = doctor._gpus(NAMES, machines, {"a": 1, "b": 1})
    else:
        line = getattr(doctor, check)(NAMES, machines)
    assert line.ok is False
    assert line.found.startswith("10.0.0.2: ")
    assert said in line.found
    assert "10.0.0.1" not in line.found
    assert line.mend


def test_storage_that_nobody_named_is_wrong_only_for_several_machines(tmp_path: Path) -> None:
    assert doctor._storage(None, {"a": "10.0.0.1"}).ok is None
    assert doctor._storage(None, NAMES).ok is False
    unwritable = tmp_path / "file"
    unwritable.write_text("")
    assert doctor._storage(str(unwritable), NAMES).ok is False
    slashless = doctor._storage("s3:/bucket/x", NAMES)
    assert slashless.ok is False
    assert "a URI is written s3://…" in slashless.found


def test_the_table_says_the_mend_below_what_is_wrong(capsys) -> None:
    draw([Check("clocks", True, "within 0.1 s"), Check("storage", False, "b: [red]", "mount it")])
    first, second, third, fourth = capsys.readouterr().out.rstrip().splitlines()
    assert first.split() == ["check", "found"]
    assert second.split() == ["ok", "clocks", "within", "0.1", "s"]
    assert third.split() == ["BAD", "storage", "b:", "[red]"]
    assert fourth.strip() == "mend: mount it"
