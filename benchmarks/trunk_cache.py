"""An epoch with frozen layers, with and without the trunk cache; and the search over all depths.

For every k: seconds per training example and per validation example, without the cache
(`requires_grad` off, the trunk in evaluation mode in both) and with it, in turns in one process;
what building costs from nothing, in epochs without it; the scores of whole trials; then trials of
k = 0..L, in turns without the cache and with one that is empty at first, in an order drawn by
chance and building included, as a search with k uniform would have it.
`loop` asks how many times as fast an epoch with the cache is as one of a loop of a few lines around
the library's own model, `requires_grad` off, batches padded to their longest, in the same format
of numbers: what the cache and all else do together; then trials of all depths as above, in turns
with such a loop that evaluates behind every epoch.
`rates` measures the constants of `training/trunk_cache.py`.

One JSON line per depth goes to --out; what has its line there is not measured again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from benchmarks.rows import once
from benchmarks.throughput import MODEL
from sft_ray.config import Experiment, Train
from sft_ray.search.preflight import prepare_experiment
from sft_ray.training.batches import Trunk, collate, global_batches
from sft_ray.training.encoding import IntArray
from sft_ray.training.examples import Examples
from sft_ray.training.fitting import Trial, fit
from sft_ray.training.passes import Pass, trunk_output
from sft_ray.training.progress import Progress
from sft_ray.training.setup import Setup, load_setup
from sft_ray.training.trunk_cache import Split, TrunkCache, _read, _write, trunks_root
from sft_ray.training.world import World, resolve_precision

SEED, EPOCHS = 0, 3
WANTED = {2: 1.3, 4: 2.4, 5: 3.5, 6: 25.0}
WANTED_OF_SEARCH = 1.5


def load(
    data: Path, rows: int, name: str = "trec", model: str = MODEL, device: str = "cpu"
) -> Setup:
    tree = {
        "name": "trunks",
        "model": model,
        "data": {
            **{s: str(data / f"{name}-{s}.parquet") for s in ("train", "validation")},
            "max_length": 128,
            "limit": {"train": rows},
        },
        "resources": {"trunk_cache_gb": 4},
    }
    prepared = prepare_experiment(Experiment.model_validate(tree))
    world = World(device=torch.device(device))
    layers = prepared.model.num_layers
    others = layers / (layers + 1)  # of the search over all depths
    return load_setup(prepared.experiment, prepared.dataset_folder, world, others_per_depth=others)


def whole_trial(setup: Setup, k: int, batch_size: int) -> Progress:
    """The last mark of a trial of some epochs."""
    marks: list[Progress] = []

    def report(progress: Progress) -> bool:
        marks.append(progress)
        return True

    train = Train(
        learning_rate=3e-4 if k < 5 else 1e-3,
        epochs=EPOCHS,
        batch_size=batch_size,
        frozen_layers=k,
    )
    fit(
        train,
        setup,
        objective="accuracy",
        rungs=[],
        seed=SEED,
        report=report,
    )
    return marks[-1]


class Kept(TrunkCache):
    """A cache that keeps every trunk, whether that pays or not."""

    def pays(self, *_: object, **__: object) -> bool:
        return True

    def open(self, splits: Sequence[Split], *which: Any) -> dict[Split, Trunk]:
        found = super().open(splits, *which)
        assert len(found) == len(splits), "there was no room for the trunk"
        return found


def measure(setup: Setup, k: int, batch_size: int) -> dict[str, Any]:
    """Trials with an empty cache, a full one and none; ratios of their seconds."""
    plain = replace(setup, trunk_cache=None)
    if (cache := setup.trunk_cache) is not None:
        setup = replace(setup, trunk_cache=Kept(**vars(cache)))
    runs: dict[str, list[Progress]] = {"plain": [], "filling": [], "full": []}
    for order in (("plain", "filling", "full"), ("full", "plain")):
        for how in order:
            if how == "filling":
                shutil.rmtree(trunks_root(), ignore_errors=True)
            runs[how].append(whole_trial(plain if how == "plain" else setup, k, batch_size))

    def seconds(how: str, what: str) -> float:
        return float(statistics.mean(getattr(run, f"{what}_seconds") for run in runs[how]))

    build = seconds("filling", "trunk")
    return {
        "epoch_times_faster": seconds("plain", "train") / seconds("full", "train"),
        "evaluation_times_faster": seconds("plain", "eval") / seconds("full", "eval"),
        "building_in_plain_epochs": EPOCHS * build / seconds("plain", "train"),
        "plain_epoch_seconds": seconds("plain", "train") / EPOCHS,
        "full_epoch_seconds": seconds("full", "train") / EPOCHS,
        "plain_seconds": seconds("plain", "train") + seconds("plain", "eval"),
        "filling_seconds": seconds("filling", "train") + seconds("filling", "eval"),
        "full_seconds": seconds("full", "train") + seconds("full", "eval"),
        "plain_accuracy": runs["plain"][0].metrics["accuracy"],
        "cached_accuracy": runs["full"][0].metrics["accuracy"],
        "date": datetime.now(UTC).date().isoformat(),
    }


def plain_loop(
    setup: Setup, k: int, dtype: torch.dtype, batch_size: int
) -> tuple[Callable[[IntArray], None], Callable[[], float]]:
    """A step of a loop as anyone writes it, on rows of our global batches; its accuracy."""
    kept = setup.pretrained.model.config
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        kept._name_or_path, num_labels=kept.num_labels, trust_remote_code=False
    )
    model.train()
    trunk = [model.base_model.embeddings, *model.base_model.encoder.layer[:k]] if k else []
    for module in trunk:
        module.requires_grad_(False).eval()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    pad = transformers.DataCollatorWithPadding(setup.tokenizer)

    def answer(examples: Examples, indices: IntArray) -> Any:
        rows = [
            {"input_ids": examples.tokens[examples[i]], "labels": int(examples.labels[i])}
            for i in indices
        ]
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return model(**pad(rows))

    def step(indices: IntArray) -> None:
        answer(setup.dataset.train, indices).loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def accuracy() -> float:
        model.eval()
        examples, right = setup.dataset.validation, 0
        ends = range(batch_size, len(examples), batch_size)
        for indices in np.split(np.arange(len(examples)), ends):
            guesses = answer(examples, indices).logits.argmax(-1).numpy()
            right += int((guesses == examples.labels[indices]).sum())
        model.train()
        for module in trunk:
            module.eval()
        return right / len(examples)

    return step, accuracy


def loop_trial(setup: Setup, k: int, batch_size: int) -> Callable[[], float]:
    """What trains and evaluates for some epochs, its model loaded; the last accuracy."""
    dtype, _ = resolve_precision("auto", setup.world.device)
    step, accuracy = plain_loop(setup, k, dtype, batch_size)
    lengths = setup.dataset.train.lengths

    def run() -> float:
        found = 0.0
        for epoch in range(EPOCHS):
            for indices in global_batches(lengths, batch_size=batch_size, seed=SEED, epoch=epoch):
                step(indices)
            found = accuracy()
        return found

    return run


def against_loop(setup: Setup, k: int, batch_size: int) -> dict[str, Any]:
    """An epoch of the loop in turns with one of a trial whose cache is full."""
    train = Train(learning_rate=1e-4, epochs=EPOCHS, batch_size=batch_size, frozen_layers=k)
    trial = Trial(train, setup, "accuracy", SEED)
    steps: dict[str, Callable[[IntArray], Any]] = {
        "loop": plain_loop(setup, k, trial.dtype, batch_size)[0],
        "ours": trial.take_step,
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    batches = list(trial.batches_from(0))
    for epoch in np.array_split(np.arange(len(batches)), EPOCHS):
        for name, step in steps.items():
            began = time.perf_counter()
            for i in epoch:
                step(batches[i])
            seconds[name].append(time.perf_counter() - began)
    ratios = [a / b for a, b in zip(seconds["loop"], seconds["ours"], strict=True)]
    return {
        "dtype": str(trial.dtype),
        "times_faster_than_loop": statistics.median(ratios[1:]),  # what is first is slow
        "loop_epoch_seconds": statistics.median(seconds["loop"][1:]),
        "date": datetime.now(UTC).date().isoformat(),
    }


def rates(setup: Setup) -> None:
    """Forward FLOPs, bytes written and read per second, as `RATES` holds them, in both formats."""
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            print(dtype, end="  ")
            rates_now(setup)


def rates_now(setup: Setup) -> None:
    examples, layers = setup.dataset.train, setup.pretrained.num_layers
    setup.pretrained.reset("all")
    chosen = np.argsort(examples.lengths)[-256:]
    batch = collate(examples, chosen, pad_token=0, device=setup.world.device)
    one = Pass(batch.one_pass.layout, stop=layers)
    computed, written, read = [], [], []
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for number in range(6):
            began = time.perf_counter()
            hidden_TH = trunk_output(setup.pretrained.model, batch.inputs, one)
            then = time.perf_counter()
            computed.append(then - began)
            _write(Path(folder) / f"{number}.arrow", hidden_TH)
            written.append(time.perf_counter() - then)
            then = time.perf_counter()
            np.array(_read(Path(folder) / f"{number}.arrow"))
            read.append(time.perf_counter() - then)
    tokens, size = len(hidden_TH), hidden_TH.numel() * hidden_TH.element_size()
    flops = 2.0 * setup.pretrained.layer_parameters() * tokens / statistics.median(computed)
    print(f"flops {flops:.1e}  written {size / statistics.median(written):.1e} bytes  ", end="")
    print(f"read {size / statistics.median(read):.1e} bytes, a second")


def all_depths(setup: Setup, options: argparse.Namespace) -> None:
    whole_trial(setup, 0, options.batch_size)  # what is first is slow
    print("| k | epoch, times faster (wanted) | evaluation | building, epochs | accuracy |")
    print("|---:|---:|---:|---:|---:|")
    for k in range(setup.pretrained.num_layers + 1):
        row = once(
            options.out,
            {"what": "depths", "k": k, **key(options)},
            partial(measure, setup, k, options.batch_size),
        )
        print(
            f"| {k} | {row['epoch_times_faster']:.2f} ({WANTED.get(k, '–')}) "
            f"| {row['evaluation_times_faster']:.2f} | {row['building_in_plain_epochs']:.2f} "
            f"| {row['plain_accuracy']:.3f} / {row['cached_accuracy']:.3f} |",
            flush=True,
        )
    plain = replace(setup, trunk_cache=None)
    search("search", setup, options, lambda k: partial(whole_trial, plain, k, options.batch_size))


def search(
    what: str,
    setup: Setup,
    options: argparse.Namespace,
    other: Callable[[int], Callable[[], Any]],
) -> None:
    """Trials of all depths, with a cache that is empty at first, in turns with others.

    Args:
        what: names the row.
        other: makes the other trial for a depth, which is not on the clock.
    """
    order = np.random.default_rng(SEED).permutation(setup.pretrained.num_layers + 1).tolist()

    def measured() -> dict[str, Any]:
        shutil.rmtree(trunks_root(), ignore_errors=True)
        seconds = {"cached": 0.0, "other": 0.0}
        for number, k in enumerate(order):
            runs: dict[str, Callable[[], Any]]
            runs = {"cached": partial(whole_trial, setup, k, options.batch_size), "other": other(k)}
            for how in sorted(runs, reverse=bool(number % 2)):
                began = time.perf_counter()
                runs[how]()
                seconds[how] += time.perf_counter() - began
        return {"search_times_faster": seconds["other"] / seconds["cached"]}

    row = once(options.out, {"what": what, "order": order, **key(options)}, measured)
    said = f"all depths once, in the order {order}, building included"
    print(f"{said}: {row['search_times_faster']:.2f} ({WANTED_OF_SEARCH})", flush=True)


def beside_loop(setup: Setup, options: argparse.Namespace) -> None:
    print("| k | epoch, times as fast as the loop's (wanted) |\n|---:|---:|")
    for k in range(setup.pretrained.num_layers + 1):
        row = once(
            options.out,
            {"what": "loop", "k": k, **key(options)},
            partial(against_loop, setup, k, options.batch_size),
        )
        print(f"| {k} | {row['times_faster_than_loop']:.2f} ({WANTED.get(k, '–')}) |", flush=True)
    search("loop search", setup, options, lambda k: loop_trial(setup, k, options.batch_size))


def key(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("batch_size", "threads", "rows")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=["depths", "loop", "rates"], default="depths")
    parser.add_argument("--data", type=Path, required=True, help="folder of trec-*.parquet")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["SFT_RAY_CACHE"] = cache
        setup = load(options.data, options.rows)
        if options.what == "depths":
            all_depths(setup, options)
        elif options.what == "loop":
            beside_loop(setup, options)
        else:
            rates(setup)


if __name__ == "__main__":
    main()
