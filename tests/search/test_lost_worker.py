"""A worker that dies while its group meets is known for what it is, so that no slot breaks down."""

from pathlib import Path

import pytest

from tests.training.parallel_worker import run_group

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize("when", ["before", "connected"])
def test_who_is_left_sees_a_lost_worker(tmp_path: Path, when: str) -> None:
    run_group("tests.search.lost_worker", 2, [Path(when)], tmp_path)
    assert (tmp_path / "0.txt").read_text() == "a lost worker"
