"""What the frozen layers of a model make of every example, computed once per machine.

A frozen trunk runs without dropout, so its output is a constant of the example.  It lies in Arrow
files that all workers, slots and trials of the machine map into memory.  Deeper outputs are made
from shallower ones, and what other trials will ask for is made on the way.  Always the same
examples go through the model together, whoever asks, so that the same search gives the same
numbers whether it finds outputs or makes them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import transformers
from filelock import FileLock, Timeout

from sft_ray.cache import cache_root
from sft_ray.training import batches
from sft_ray.training.batches import Trunk
from sft_ray.training.beat import Beat
from sft_ray.training.cpu_memory import give_back_free_memory
from sft_ray.training.encoding import IntArray
from sft_ray.training.examples import Dataset, Examples
from sft_ray.training.families import reads_first_token
from sft_ray.training.micro_batch import is_out_of_memory
from sft_ray.training.model import Pretrained
from sft_ray.training.passes import trunk_output
from sft_ray.training.world import World

FORMAT = 2  # change when the files change their meaning
FREE_SHARE = 0.25  # of the free disk, if no budget is given
CHUNK_TOKENS = 4096  # of a file, padding of its examples included
GONE_SECONDS = 30 * 86400  # after which a host that used none of its trunks will not
MEASURING_SECONDS = 3600  # longer than a chunk takes anywhere
WAIT_SECONDS = 0.05  # between looks at what others compute
COMPLETE, RESERVED, USED, LOCK = "complete.json", "reserved.json", "used", "lock"
BUILDING = "trunk cache"  # what a worker is at, for whoever watches it

Split = Literal["train", "validation"]


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second.

    Attributes:
        flops: of a forward pass.
        written: bytes into a new file.
        read: bytes from a mapped file onto the device.
    """

    flops: float
    written: float
    read: float


# One core and a local disk (benchmarks/RESULTS.md).  Written down, so that the same search decides
# the same; other devices are measured when a trial first asks.
RATES = {
    ("cpu", torch.float32): Rates(flops=8.5e10, written=6e8, read=6e9),
    ("cpu", torch.bfloat16): Rates(flops=1.4e11, written=6e8, read=6e9),
}


@dataclass(frozen=True)
class Costs:
    """Seconds per token.

    Attributes:
        compute: through all frozen layers.
        write, read: of the cache.
    """

    compute: float
    write: float
    read: float

    @classmethod
    def of(cls, rates: Rates, flops: float, num_bytes: int) -> Costs:
        return cls(flops / rates.flops, num_bytes / rates.written, num_bytes / rates.read)

    def pays(self, passes: float, *, is_on_the_way: bool = False) -> bool:
        """Whether to make it once and read it `passes` times is less than to compute every time.

        What is computed anyway on the way to a deeper one costs a read, where that goes on.
        """
        made = self.read if is_on_the_way else self.compute
        return made + self.write + passes * self.read < passes * self.compute


@dataclass(frozen=True)
class TrunkCache:
    """Outputs of all trunks of one model on one data set.

    Attributes:
        dataset: with its whole splits.
        pad_token: fills up what goes through the model together.
        budget_bytes: most that all trunks of this machine take on disk; None takes a part of what
            is free, 0 keeps none.
        others_per_depth: how many trials, beside one, will ask for a given depth, roughly.
        depths: those that trials will ask for; none says that all ask for the same.
        rates: of this machine, by number format, where they had to be measured.
    """

    pretrained: Pretrained
    dataset: Dataset
    world: World
    pad_token: int
    budget_bytes: int | None = None
    others_per_depth: float = 0.0
    depths: tuple[int, ...] = ()
    rates: dict[torch.dtype, Rates] = field(default_factory=dict)

    @property
    def may_keep(self) -> bool:
        """Whether there is a trunk to keep, and any room for it."""
        return self.budget_bytes != 0 and self.pretrained.can_split

    def pays(
        self,
        split: Split,
        depth: int,
        dtype: torch.dtype,
        passes: float,
        *,
        is_on_the_way: bool = False,
    ) -> bool:
        """Whether to keep the outputs of the first `depth` layers, as far as this worker knows.

        Whatever is there already: else a trial's numbers would depend on who ran before.  Not where
        there is no room for both splits: they would take it from each other, trial by trial.

        Args:
            dtype: of matrix products.
            passes: how often a trial will ask for every example.
            is_on_the_way: for other trials, by one that computes these anyway for deeper ones.
        """
        if depth == 0 or not self.may_keep:
            return False
        try:
            uses = self.others_per_depth if is_on_the_way else self.likely_uses(depth, dtype)
            return uses > 0 and _Build(self, split, depth, dtype).costs().pays(
                passes * uses, is_on_the_way=is_on_the_way
            )
        except Exception as error:  # where rates are measured
            if _may_stop(error):
                raise
            return False

    def likely_uses(self, depth: int, dtype: torch.dtype) -> float:
        """How many trials read what one has made, before its room is taken; 0 if there is none.

        With room for some of the depths, those of the last trials are kept.  The next trial finds
        its own among them in `fit` of `depths` cases, and makes it in all others.
        """
        fit, depths = self._num_fitting(depth, dtype), max(1, len(self.depths))
        uses = 1 + self.others_per_depth
        if fit >= depths:
            return uses
        return min(uses, depths / (depths - fit)) if fit else 0.0

    def _num_fitting(self, depth: int, dtype: torch.dtype) -> int:
        """How many depths there is room for, were all as large as this one."""
        return room_bytes(self.budget_bytes) // self.num_bytes(depth, dtype)

    def num_bytes(self, depth: int, dtype: torch.dtype) -> int:
        """What the outputs of the first `depth` layers take on disk, of both splits."""
        splits: tuple[Split, ...] = ("train", "validation")
        return sum(_Build(self, split, depth, dtype).num_bytes for split in splits)

    def open(
        self, splits: Sequence[Split], depth: int, dtype: torch.dtype, beat: Beat
    ) -> dict[Split, Trunk]:
        """Outputs of the first `depth` layers, made now if they are missing.

        All workers of the machine that ask for the same share the work; one that is killed leaves
        its part to the others.

        Args:
            splits: all that a trial reads; there is room for all of them, or they are not made.

        Returns:
            Without those that shall be computed each time, because there is no room on disk, or
            because somebody asks for a pause.
        """
        builds = [_Build(self, split, depth, dtype) for split in splits]
        try:
            # Before room is made, which may take what these are made from: a map keeps its file.
            below = {b.split: b.deepest_below() for b in builds if not b.is_complete()}
            way = {b.split: self._on_the_way(b, below[b.split]) for b in builds if b.split in below}
            steps = [*builds, *(step for found in way.values() for step in found)]
            sizes = {build.folder: build.num_bytes for build in steps}
            if below and not make_room(sizes, self.budget_bytes):
                return {}
        except OSError:
            return {}
        opened: dict[Split, Trunk] = {}
        for build in builds:
            trunk = below.get(build.split)
            for step in way.get(build.split, []):
                trunk = self._opened(step, trunk, beat) or trunk
            if (trunk := self._opened(build, trunk, beat)) is not None:
                opened[build.split] = trunk
        return opened

    def _on_the_way(self, build: _Build, below: Trunk | None) -> list[_Build]:
        """What is kept of what is computed anyway, because other trials will ask for it.

        Nothing where there is no room for all depths.
        """
        between = range(1 if below is None else below.depth + 1, build.depth)
        return [
            _Build(self, build.split, depth, build.dtype)
            for depth in between
            if depth in self.depths
            and self._num_fitting(depth, build.dtype) >= len(self.depths)
            and self.pays(build.split, depth, build.dtype, 1, is_on_the_way=True)
        ]

    def _opened(self, build: _Build, below: Trunk | None, beat: Beat) -> Trunk | None:
        try:
            if not build.is_complete():
                if not build.run(below, beat):
                    return None
                give_back_free_memory()
            return build.open()
        except Exception as error:
            if _may_stop(error):
                raise
            shutil.rmtree(build.folder, ignore_errors=True)
            return None

    def folder(self, split: Split, depth: int, dtype: torch.dtype) -> Path:
        """Named by all that decides what the output is."""
        recipe = {
            "format": FORMAT,
            "model": self.pretrained.fingerprint,
            "data": self.dataset.fingerprint,
            "dtype": [str(dtype), str(self.pretrained.model.dtype)],
            "device": self.world.device.type,
            "versions": [torch.__version__, transformers.__version__],
        }
        key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:32]
        return trunks_root() / key / f"{split}-{depth}"


class _Build:
    """Files of one split at one depth: a chunk of examples of like length each."""

    def __init__(self, cache: TrunkCache, split: Split, depth: int, dtype: torch.dtype) -> None:
        self.cache, self.split, self.depth, self.dtype = cache, split, depth, dtype
        self.examples: Examples = getattr(cache.dataset, split)
        self.folder = cache.folder(split, depth, dtype)
        model = cache.pretrained.model
        is_top = depth == cache.pretrained.num_layers
        self.most_tokens = 1 if is_top and reads_first_token(model) else None
        kept = batches.kept_lengths(self.examples.lengths, self.most_tokens)
        itemsize = 2 if dtype == torch.bfloat16 else model.dtype.itemsize
        self.num_bytes = int(kept.sum()) * model.config.hidden_size * itemsize

    @cached_property
    def chunks(self) -> list[IntArray]:
        return list(batches.evaluation_shares(self.examples.lengths, 0, 1, CHUNK_TOKENS))

    def is_complete(self) -> bool:
        return (self.folder / COMPLETE).exists()

    def path(self, chunk: int) -> Path:
        return self.folder / f"{chunk:06d}.arrow"

    def open(self) -> Trunk:
        """Map all files into memory.

        Raises:
            OSError, pyarrow.ArrowException: a file is missing or torn.
        """
        for used in (self.folder, trunks_root()):
            (used / USED).touch()
        chunk_of = np.zeros(len(self.examples), dtype=np.int64)
        start_of = np.zeros(len(self.examples), dtype=np.int64)
        for number, items in enumerate(self.chunks):
            chunk_of[items] = number
            kept = batches.kept_lengths(self.examples.lengths[items], self.most_tokens)
            start_of[items] = np.cumsum(kept) - kept
        maps = [_read(self.path(number)) for number in range(len(self.chunks))]
        return Trunk(self.depth, maps, chunk_of, start_of, self.most_tokens)

    def run(self, below: Trunk | None, beat: Beat) -> bool:
        """Make what is missing, together with others.

        Args:
            below: outputs of fewer layers to go on from.

        Returns:
            False where somebody else wanted the room, or asks for a pause.
        """
        first = self.cache.world.rank * len(self.chunks) // self.cache.world.size
        order = [*range(first, len(self.chunks)), *range(first)]
        while missing := [number for number in order if not self.path(number).exists()]:
            made = 0
            for number in missing:
                if beat(BUILDING) or not (self.folder / RESERVED).exists():
                    return False
                made += self._make(number, below)
            if made == 0:  # others are at all of them
                time.sleep(WAIT_SECONDS)
        _write_text(self.folder / COMPLETE, "{}")
        for pattern in ("*.lock", "*.arrow.tmp-*"):  # the latter of who was killed
            for left in self.folder.glob(pattern):
                left.unlink(missing_ok=True)
        return True

    def _make(self, number: int, below: Trunk | None) -> bool:
        """One chunk; False if somebody else is at it."""
        path = self.path(number)
        try:
            with FileLock(path.with_suffix(".lock"), timeout=0):
                if not path.exists():
                    _write(path, self._compute(self.chunks[number], below))
        except Timeout:
            return False
        return True

    @torch.no_grad()
    def _compute(self, items: IntArray, below: Trunk | None) -> torch.Tensor:
        """Output for the tokens of some examples, [tokens, width]."""
        cache, device = self.cache, self.cache.world.device
        batch = batches.collate(
            self.examples,
            items,
            pad_token=cache.pad_token,
            device=device,
            with_labels=False,
            trunk=below,
        )
        one = replace(batch.one_pass, stop=self.depth)
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            hidden_TH = trunk_output(cache.pretrained.model, batch.inputs, one)
        if self.most_tokens is not None:
            lengths = self.examples.lengths[items]
            hidden_TH = hidden_TH[torch.from_numpy(np.cumsum(lengths) - lengths).to(device)]
        return hidden_TH.cpu()

    def deepest_below(self) -> Trunk | None:
        """Outputs to go on from."""
        for depth in range(self.depth - 1, 0, -1):
            found = _Build(self.cache, self.split, depth, self.dtype)
            try:
                if found.is_complete():
                    return found.open()
            except (OSError, pa.ArrowException):  # torn, or evicted just now: the next one will do
                shutil.rmtree(found.folder, ignore_errors=True)
        return None

    def costs(self) -> Costs:
        layers = self.cache.pretrained.num_layers
        flops = 2.0 * self.cache.pretrained.layer_parameters() / layers  # per token and layer
        rates = RATES.get((self.cache.world.device.type, self.dtype))
        if rates is None:
            known = self.cache.rates
            if self.dtype not in known:
                known[self.dtype] = self._measured_rates(flops)
            rates = known[self.dtype]
        num_bytes = self.num_bytes // int(self.examples.lengths.sum())
        return Costs.of(rates, flops * self.depth, num_bytes)

    def _measured_rates(self, flops: float) -> Rates:
        """Of this machine, by one chunk; `flops` is per token and layer."""
        trunks_root().mkdir(parents=True, exist_ok=True)
        items, trial = self.chunks[-1], trunks_root() / f"rates-{uuid.uuid4().hex}"
        self._compute(items, None)  # what is first is slow
        began = time.monotonic()
        hidden_TH = self._compute(items, None)
        computed = time.monotonic()
        _write(trial, hidden_TH)
        written = time.monotonic()
        torch.from_numpy(np.array(_read(trial))).to(self.cache.world.device)
        self.cache.world.synchronize()
        read = time.monotonic()
        trial.unlink()
        num_bytes = hidden_TH.numel() * hidden_TH.element_size()
        all_flops = flops * self.depth * int(self.examples.lengths[items].sum())
        return Rates(
            all_flops / (computed - began),
            num_bytes / (written - computed),
            num_bytes / (read - written),
        )


def _may_stop(error: Exception) -> bool:
    """Whether it may end a trial: not a full disk, a full memory or a torn file."""
    return not (isinstance(error, OSError | pa.ArrowException) or is_out_of_memory(error))


def trunks_root() -> Path:
    """Where the trunks of this machine lie.

    Apart from those of others that share the folder: on NFS, what makes way on one machine is lost
    to those that have mapped it on another.
    """
    return cache_root() / "trunks" / socket.gethostname()


def _remove_of_gone_hosts(root: Path) -> None:
    """Containers have new names every time, and nobody would make their trunks make way."""
    for other in root.parent.glob("*/"):
        with suppress(OSError):
            used = max(other.stat().st_mtime, _last_used(other))
            if time.time() - used > GONE_SECONDS:
                shutil.rmtree(other, ignore_errors=True)


def room_bytes(budget_bytes: int | None) -> int:
    """Most that all trunks of this machine may take: the budget, or a part of the free disk.

    What they have taken of it already counts as free.
    """
    if budget_bytes is not None:
        return budget_bytes
    root = trunks_root()
    taken = sum(_reserved(found) for found in root.glob(f"*/*/{RESERVED}"))
    there = next(folder for folder in (root, *root.parents) if folder.exists())
    return int(FREE_SHARE * (shutil.disk_usage(there).free + taken))


def make_room(wanted: Mapping[Path, int], budget_bytes: int | None) -> bool:
    """Reserve room for folders of trunk outputs together; those used longest ago make way.

    Whoever has mapped what goes keeps it: the files live as long as their maps.

    Args:
        wanted: bytes of each folder.
        budget_bytes: for all trunks together; None takes a part of what is free or theirs.

    Returns:
        False if they are too large.
    """
    root = trunks_root()
    root.mkdir(parents=True, exist_ok=True)
    (root / USED).touch()
    _remove_of_gone_hosts(root)
    with FileLock(root / LOCK):
        for measured in root.glob("rates-*"):
            with suppress(OSError):  # of who was killed while measuring, or is at it
                if time.time() - measured.stat().st_mtime > MEASURING_SECONDS:
                    measured.unlink()
        sizes = {}
        for found in root.glob("*/*/"):
            if (found / RESERVED).exists():
                sizes[found] = _reserved(found / RESERVED)
            else:  # of who wrote on where room had been made
                shutil.rmtree(found, ignore_errors=True)
        room = room_bytes(budget_bytes) - sum(wanted.values())
        if room < 0:
            return False
        others = sizes.keys() - wanted.keys()
        oldest_first = sorted(others, key=lambda found: _last_used(found))
        while sum(sizes[found] for found in oldest_first) > room:
            shutil.rmtree(oldest_first.pop(0), ignore_errors=True)
        for folder, num_bytes in wanted.items():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / USED).touch()
            _write_text(folder / RESERVED, json.dumps({"bytes": num_bytes}))
    return True


def _reserved(path: Path) -> int:
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _last_used(folder: Path) -> float:
    try:
        return (folder / USED).stat().st_mtime
    except OSError:
        return 0.0


def _write(path: Path, hidden_TH: torch.Tensor) -> None:
    """One column, a list of `width` numbers per token; bf16, unknown to Arrow, as its bits."""
    if hidden_TH.dtype == torch.bfloat16:
        hidden_TH = hidden_TH.view(torch.int16)
    values = pa.array(hidden_TH.contiguous().numpy().reshape(-1))
    table = pa.table({"hidden": pa.FixedSizeListArray.from_arrays(values, hidden_TH.shape[1])})
    unfinished = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
    try:
        with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
            file.write_table(table)
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _read(path: Path) -> npt.NDArray[np.number]:
    """As it was written; mapped, not copied; [tokens, width]."""
    with pa.memory_map(str(path)) as source:
        column = pa.ipc.open_file(source).read_all().column("hidden").chunk(0)
    hidden_TH: npt.NDArray[np.number] = column.values.to_numpy().reshape(-1, column.type.list_size)
    return hidden_TH


def _write_text(path: Path, text: str) -> None:
    unfinished = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.rename(path)
