"""builtin:docstrings: real text, the same on every call, without a sentence in two splits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from sft_ray.config import Data
from sft_ray.errors import DataError
from sft_ray.training.builtin import EXAMPLES_PER_CLASS, PACKAGES, SPLIT_SHARES, docstrings
from sft_ray.training.sources import read_splits
from tests.models import TASK


@pytest.fixture(scope="module")
def splits() -> dict[str, pa.Table]:
    return docstrings()


def labels(table: pa.Table) -> Counter[str]:
    return Counter(table.column("label").to_pylist())


def test_no_sentence_occurs_twice_within_or_across_splits(splits) -> None:
    sentences = [
        text.casefold() for table in splits.values() for text in table.column("text").to_pylist()
    ]
    assert len(set(sentences)) == len(sentences)


def test_classes_are_packages_capped_and_balanced(splits) -> None:
    total = sum((labels(table) for table in splits.values()), Counter())
    assert set(total) == set(PACKAGES)
    assert len(total) >= 4
    assert max(total.values()) <= EXAMPLES_PER_CLASS
    assert min(total.values()) > 0.9 * max(total.values())


def test_every_split_holds_its_share_of_every_class(splits) -> None:
    assert set(splits) == {"train", "validation", "test"}
    total = sum((labels(table) for table in splits.values()), Counter())
    for split, fraction in SPLIT_SHARES.items():
        for package, count in labels(splits[split]).items():
            assert count == pytest.approx(fraction * total[package], abs=1)


def test_classes_are_mixed_within_a_split(splits) -> None:
    first = splits["train"].column("label").to_pylist()[:60]
    assert set(first) == set(PACKAGES)


def test_sentences_are_prose_of_bounded_length(splits) -> None:
    for table in splits.values():
        for text in table.column("text").to_pylist():
            assert 4 <= len(text.split()) <= 40
            assert text.isascii()
            assert ">>>" not in text


def test_a_second_call_is_served_from_the_cache(splits, training_cache: Path) -> None:
    def written() -> dict[str, tuple[int, int]]:
        files = sorted((training_cache / "builtin").rglob("*.parquet"))
        return {f.name: (f.stat().st_ino, f.stat().st_mtime_ns) for f in files}

    before = written()
    assert len(before) == 3
    again = docstrings()
    assert written() == before
    assert all(again[split].equals(splits[split]) for split in splits)


def test_a_build_from_nothing_gives_the_same_tables(splits, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SFT_RAY_CACHE", str(tmp_path))
    again = docstrings()
    assert all(again[split].equals(splits[split]) for split in splits)


def test_it_is_read_by_its_name_and_leaves_the_test_split_sealed(splits, load) -> None:
    source = read_splits(Data(path="builtin:docstrings"), TASK.fields, seed=1)
    assert source.names is None
    assert all(source.tables[split].equals(splits[split]) for split in ("train", "validation"))
    dataset = load(path="builtin:docstrings")
    assert len(dataset.train) == splits["train"].num_rows
    assert len(dataset.validation) == splits["validation"].num_rows


def test_an_unknown_name_is_refused_with_the_closest_one() -> None:
    with pytest.raises(DataError, match=r"'builtin:docstring'; did you mean 'builtin:docstrings'"):
        read_splits(Data(path="builtin:docstring"), TASK.fields, seed=1)
