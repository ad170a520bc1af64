"""Fixtures of the training core: its own cache, and one toy data set with its tiny model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_ray.config import Data
from sft_ray.training.data import open_dataset, prepare
from sft_ray.training.examples import Dataset
from tests.models import TASK, WIDE_VOCABULARY, tiny_model_folder, toy_dataset


@pytest.fixture(scope="session", autouse=True)
def training_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nothing is read from or left in the user's cache; tiny models want one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("training-cache")
        patch.setenv("SFT_RAY_CACHE", str(cache))
        yield cache
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("tiny-bert"))


@pytest.fixture(scope="session")
def wide_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its vocabulary also holds marks for entities and Chinese characters."""
    folder = tmp_path_factory.mktemp("wide-bert")
    return tiny_model_folder(folder, vocabulary=WIDE_VOCABULARY)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Dataset:
    return toy_dataset(tmp_path_factory.mktemp("toy"), tiny_bert)


@pytest.fixture
def load(tiny_bert: Path) -> Callable[..., Dataset]:
    """Prepare and open a data section given as keywords."""

    def load(seed: int = 17, **data: Any) -> Dataset:
        return open_dataset(prepare(Data(**data), TASK, str(tiny_bert), None, seed))

    return load
