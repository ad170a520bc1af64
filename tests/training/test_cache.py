"""Folders that are built once: by one builder, completely or not at all."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from sft_ray.cache import build_once, cache_root


def test_a_folder_is_built_once_by_concurrent_callers(tmp_path: Path) -> None:
    builds = []
    together = threading.Barrier(4)

    def build(folder: Path) -> None:
        builds.append(folder)
        (folder / "content").write_text("whole")

    def call() -> None:
        together.wait()
        build_once(tmp_path / "made", build)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert len(builds) == 1
    assert (tmp_path / "made" / "content").read_text() == "whole"


def test_a_builder_that_fails_leaves_nothing_and_the_next_one_builds(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        (folder / "content").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        build_once(tmp_path / "made", broken)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    made = build_once(tmp_path / "made", lambda folder: (folder / "content").touch())
    assert [path.name for path in made.iterdir()] == ["content"]


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SFT_RAY_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("SFT_RAY_CACHE")
    assert cache_root() == Path.home() / ".cache" / "sft_ray"
