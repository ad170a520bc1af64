"""On a GPU, on SST-2: steps beside `transformers.Trainer`, trials that share it, frozen layers.

`steps`: examples per second, and model FLOPs as in benchmarks/throughput.py against the GPU's bf16
matrix peak measured between the turns; the last layer counts as a whole, of which ours computes no
more than is read.  `ours` is a step of our training core, also with its layers compiled and with
its passes recorded as CUDA graphs; `dynamic` one of Trainer in bf16, each batch padded to its
longest; `grouped` the same with the rows of a turn sorted by length first, as `group_by_length` has
them; `compiled` with torch.compile.  All train the same rows in turns of a few steps; what is
compiled or recorded has been before.  Texts are SST-2's (`sst2`), or many of them joined and cut at
128 tokens (`full`).

`search`: trials per hour of a real search of equal short trials, none of them pruned, with so many
trials on each GPU, and with one and CUDA graphs; from the first slot's first trial to the end of
the last.  Beside it the same trials by `transformers.Trainer` in bf16, dynamically padded and
grouped by length, with and without torch.compile: one after the other in one process, which loads
the model for each and whose first one is not counted.

`trunk`: seconds of an epoch with k frozen layers, their output computed each time or kept.

MiniLM is pretrained.  BERT-base is built from its configuration with random weights and MiniLM's
tokenizer, which has BERT's vocabulary, so that no hub is asked; a step takes the same time.

Every row comes from a process of its own, in a shuffled order; one JSON line per row goes to --out,
and rows whose line is there are not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks import throughput, trunk_cache
from benchmarks.rows import finished, in_a_process, once

Row = dict[str, Any]
LAYERS = {"bert-base": 12, "minilm": 6}
LENGTHS, BATCH_SIZES = ("sst2", "full"), (16, 64)
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours compiled": {"compile": True},
    "ours with graphs": {"cuda_graphs": True},
}
SYSTEMS = (*OURS, "dynamic", "grouped", "dynamic compiled", "grouped compiled")
WITH_GRAPHS = "1 with graphs"
SLOTS = (1, 2, 4, 8)
SHARES = (*SLOTS, "auto", WITH_GRAPHS)
TRAINERS = ("Trainer", "Trainer compiled")
JOINED = 12  # sentences of a text that is cut at 128 tokens
TURNS = 6
SLOT_TRIALS = 12  # for each slot, whose first trial is slow
TRAINER_TRIALS, TRIAL_ROWS, EVAL_ROWS, TRIAL_BATCH_SIZE = 4, 2000, 200, 32
TRUNK_ROWS, TRUNK_BATCH_SIZE = 2000, 32
PEAK_SIZE = 8192
WANTED_OF_PEAK = {("bert-base", "full", 64): 0.45}
WANTED_TRIALS = {"bert-base": 2.0, "minilm": 5.0}  # times the trials per hour of Trainer
NO_GPU = "error: this measures a CUDA GPU, and torch sees none here; run it on a machine with one"


def all_units(kinds: Sequence[str], models: Sequence[str], repeats: int) -> list[list[Any]]:
    """What is measured, a row each: its kind, its model and what else tells it apart."""
    found: list[list[Any]] = []
    for repeat in range(repeats):
        turn: list[list[Any]] = [
            *(["steps", *u, repeat] for u in itertools.product(models, LENGTHS, BATCH_SIZES)),
            *(["search", *u, repeat] for u in itertools.product(models, (*SHARES, *TRAINERS))),
            *(["trunk", m, k, repeat] for m in models for k in depths(LAYERS[m])),
        ]
        random.Random(repeat).shuffle(turn)
        found += [unit for unit in turn if unit[0] in kinds]
    return found


def depths(layers: int) -> list[int]:
    return [layers // 3, 2 * layers // 3, layers - 1, layers]


def build_bert_base(folder: Path) -> None:
    """Random weights in the shape of BERT-base, and a tokenizer."""
    from sft_ray.training.model_facts import quiet_transformers, resolve_model

    quiet_transformers()
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        resolve_model(throughput.MODEL), trust_remote_code=False
    )
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(tokenizer))
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_full(data: Path, folder: Path) -> None:
    """SST-2 with further sentences behind each, so that every text is cut at 128 tokens."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for split in ("train", "validation"):
        rows = pq.read_table(data / f"sst2-{split}.parquet").to_pylist()
        texts = [row["text"] for row in rows] * 2
        joined = [" ".join(texts[i : i + JOINED]) for i in range(len(rows))]
        table = pa.table({"text": joined, "label": [row["label"] for row in rows]})
        pq.write_table(table, folder / f"full-{split}.parquet")


def measure_steps(folder: Path, model: str, name: str, batch_size: int, device: str) -> Row:
    """Examples per second and share of the peak of every system, medians over turns."""
    loaded = {
        system: throughput.load(folder, name, batch_size, model, device, **train)
        for system, train in OURS.items()
    }
    setup, trial = loaded["ours"]
    whole = throughput.trainer_step(setup, batch_size, padded=False)
    compiled = throughput.trainer_step(setup, batch_size, padded=False, compiled=True)
    steps: dict[str, Callable[[Any], Any]] = {name: t.take_step for name, (_, t) in loaded.items()}
    steps |= {"dynamic": whole, "grouped": whole}
    steps |= {"dynamic compiled": compiled, "grouped compiled": compiled}
    lengths, source = setup.dataset.train.lengths, throughput.endless(trial)
    seconds: dict[str, list[float]] = {system: [] for system in SYSTEMS}
    flops, peaks = [], []
    steps_per_turn = batches_grouped(len(lengths), batch_size)
    turns = [[next(source) for _ in range(steps_per_turn)] for _ in range(TURNS + 1)]
    for system in SYSTEMS:  # every shape is compiled and recorded before it counts
        if system not in ("ours", "dynamic", "grouped"):
            for chosen in turns:
                for indices in by_length(chosen, lengths) if "grouped" in system else chosen:
                    steps[system](indices)
    if not loaded["ours compiled"][0].pretrained.compiled.works:
        raise SystemExit("the layers could not be compiled here, and ran as they are")
    for turn, chosen in enumerate(turns):
        grouped = by_length(chosen, lengths)
        peaks.append(throughput.peak_flops(device, torch.bfloat16, PEAK_SIZE))
        flops.append(sum(throughput.model_flops(setup, 0, lengths[i]) for i in chosen))
        first = turn % len(SYSTEMS)
        for system in (*SYSTEMS[first:], *SYSTEMS[:first]):
            setup.world.synchronize()
            began = time.perf_counter()
            for indices in grouped if "grouped" in system else chosen:
                steps[system](indices)
            setup.world.synchronize()
            seconds[system].append(time.perf_counter() - began)
    peak = max(peaks)
    examples = steps_per_turn * batch_size

    def median(values: Iterable[float]) -> float:
        return statistics.median(list(values)[1:])  # what is first is slow

    return {
        "examples_per_second": {s: median(examples / t for t in seconds[s]) for s in SYSTEMS},
        "of_peak": {
            s: median(f / t / peak for f, t in zip(flops, seconds[s], strict=True)) for s in SYSTEMS
        },
        "times_slower": {
            s: median(t / ours for t, ours in zip(seconds[s], seconds["ours"], strict=True))
            for s in SYSTEMS
        },
        "peak_flops": peak,
        "tokens_per_example": float(lengths.mean()),
    }


def batches_grouped(num_rows: int, batch_size: int) -> int:
    """How many batches transformers' `group_by_length` sorts together; so many make a turn."""
    return max(1, min(50, num_rows // (4 * batch_size)))


def by_length(chosen: Sequence[Any], lengths: Any) -> list[Any]:
    """The same rows in as many batches, of like lengths each."""
    rows = np.concatenate(list(chosen))
    return np.array_split(rows[np.argsort(lengths[rows], kind="stable")], len(chosen))


def measure_search(folder: Path, model: str, share: int | str) -> Row:
    """Trials per hour of a search with so many trials on each GPU."""
    from sft_ray.config import Experiment
    from sft_ray.search.tuner import run_search

    graphs = share == WITH_GRAPHS
    slots = 1 if graphs else max(SLOTS) if share == "auto" else int(share)  # of each GPU, at most
    trials = SLOT_TRIALS * slots * torch.cuda.device_count()
    with tempfile.TemporaryDirectory() as storage:
        tree = {
            "name": "gpu",
            "model": model,
            "data": {
                **{s: str(folder / f"sst2-{s}.parquet") for s in ("train", "validation")},
                "limit": {"train": TRIAL_ROWS, "validation": EVAL_ROWS},
            },
            "train": {"epochs": 1, "batch_size": TRIAL_BATCH_SIZE, "cuda_graphs": graphs},
            "search": {
                "space": {"train.learning_rate": {"log_uniform": [1e-5, 1e-4]}},
                "sampler": "random",
                "pruner": "none",
                "rungs": [],
                "default_recipe": False,
                "trials": trials,
            },
            "resources": {"trials_per_gpu": 1 if graphs else share},
            "storage": storage,
        }
        began = datetime.now()  # without a zone, as the study has it
        result = run_search(Experiment.from_tree(tree), address="local", quiet=True)
        ends = [trial.datetime_complete for trial in result.study.trials]
    seconds = (max(end for end in ends if end) - began).total_seconds()
    startup_seconds = result.tree["startup_seconds"]
    return {
        "trials_per_hour": 3600 * trials / (seconds - startup_seconds),
        "gpus_per_worker": result.tree["environment"]["gpus_per_worker"],
        "slots": result.tree["environment"]["slots"],
        "startup_seconds": startup_seconds,
        "states": [trial["state"] for trial in result.trials],
    }


def measure_trainer(
    folder: Path, model: str, compiled: bool, device: str, trials: int = TRAINER_TRIALS
) -> Row:
    """Trials per hour of Trainer's, in its favour: data is tokenized once, and not on the clock."""
    import pyarrow.parquet as pq

    from sft_ray.training.model_facts import resolve_model

    place = resolve_model(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    splits = {}
    for split, most in (("train", TRIAL_ROWS), ("validation", EVAL_ROWS)):
        table = pq.read_table(folder / f"sst2-{split}.parquet").slice(0, most)
        splits[split] = [
            {**tokenizer(row["text"], truncation=True, max_length=128), "labels": row["label"]}
            for row in table.to_pylist()
        ]

    def trial(output: str) -> None:
        arguments = transformers.TrainingArguments(
            output_dir=output,
            num_train_epochs=1,
            per_device_train_batch_size=TRIAL_BATCH_SIZE,
            per_device_eval_batch_size=64,
            learning_rate=5e-5,
            bf16=True,
            torch_compile=compiled,
            train_sampling_strategy="group_by_length",
            eval_strategy="epoch",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=device == "cpu",
        )
        transformers.Trainer(
            model=transformers.AutoModelForSequenceClassification.from_pretrained(
                place, num_labels=2, trust_remote_code=False
            ),
            args=arguments,
            train_dataset=splits["train"],
            eval_dataset=splits["validation"],
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
        ).train()

    with tempfile.TemporaryDirectory() as output:
        trial(output)  # what is first is slow, and compiles
        began = time.perf_counter()
        for _ in range(trials):
            trial(output)
        seconds = time.perf_counter() - began
    return {"trials_per_hour": 3600 * trials / seconds, "gpus_per_worker": 1.0, "slots": 1}


def measure_trunk(folder: Path, model: str, k: int, device: str) -> Row:
    setup = trunk_cache.load(folder, TRUNK_ROWS, "sst2", model, device)
    trunk_cache.whole_trial(setup, 0, TRUNK_BATCH_SIZE)  # what is first is slow
    return {"k": k, **trunk_cache.measure(setup, k, TRUNK_BATCH_SIZE)}


def measure(unit: list[Any], folder: Path, device: str = "cuda") -> Row:
    """One row; `folder` holds the data and BERT-base."""
    kind, name, *rest = unit[:-1]
    model = throughput.MODEL if name == "minilm" else str(folder / name)
    transformers.logging.set_verbosity_error()
    if kind == "steps":
        found = measure_steps(folder, model, rest[0], rest[1], device)
    elif kind == "search" and rest[0] in TRAINERS:
        found = measure_trainer(folder, model, "compiled" in rest[0], device)
    elif kind == "search":
        found = measure_search(folder, model, rest[0])
    else:
        found = measure_trunk(folder, model, rest[0], device)
    device_name = torch.cuda.get_device_name() if device == "cuda" else device
    versions = {m.__name__: m.__version__ for m in (torch, transformers)}
    date = datetime.now(UTC).date().isoformat()
    return {"unit": unit, **found, "device": device_name, "versions": versions, "date": date}


def table(rows: Sequence[Row]) -> str:
    """Markdown: what was found, medians over repeats, what is wanted in parentheses."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row["unit"][:-1]), []).append(row)

    def found(unit: tuple[Any, ...], *keys: str) -> float:
        values: list[Any] = groups[unit]
        for key in keys:
            values = [value[key] for value in values]
        return float(statistics.median(values))

    order = sorted(groups, key=lambda unit: [str(part).zfill(9) for part in unit])
    lines = [
        "| model | texts | batch | system | examples/s | time, times ours | of the peak (wanted) |",
        "|---|---|---:|---|---:|---:|---:|",
    ]
    for unit in (unit for unit in order if unit[0] == "steps"):
        for system in SYSTEMS:
            wanted = WANTED_OF_PEAK.get(unit[1:]) if system == "ours" else None
            lines.append(
                f"| {' | '.join(map(str, unit[1:]))} | {system} "
                f"| {found(unit, 'examples_per_second', system):,.0f} "
                f"| {found(unit, 'times_slower', system):.2f} "
                f"| {found(unit, 'of_peak', system):.2f}{f' ({wanted})' if wanted else ''} |"
            )
    lines += [
        "",
        "| model | trials per GPU | slots | trials per hour | times one of ours "
        "| times the better of Trainer's (wanted of the best) |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for unit in (unit for unit in order if unit[0] == "search"):
        _, model, share = unit
        number = f"auto: {1 / found(unit, 'gpus_per_worker'):.0f}" if share == "auto" else share
        per_hour, whole = found(unit, "trials_per_hour"), ("search", model, 1)
        times = f"{per_hour / found(whole, 'trials_per_hour'):.2f}" if whole in groups else "–"
        peers = [("search", model, name) for name in TRAINERS]
        theirs = [found(peer, "trials_per_hour") for peer in peers if peer in groups]
        times_theirs = f"{per_hour / max(theirs):.2f}" if theirs else "–"
        goal = "" if share in TRAINERS else f" ({WANTED_TRIALS[model]})"
        lines.append(
            f"| {model} | {number} | {found(unit, 'slots'):.0f} | {per_hour:,.0f} "
            f"| {times} | {times_theirs}{goal} |"
        )
    lines += [
        "",
        "| model | k | epoch, s, computed each time | kept | times faster |",
        "|---|---:|---:|---:|---:|",
    ]
    for unit in (unit for unit in order if unit[0] == "trunk"):
        plain, kept = (found(unit, f"{how}_epoch_seconds") for how in ("plain", "full"))
        line = f"| {unit[1]} | {unit[2]} | {plain:.2f} | {kept:.2f} | {plain / kept:.2f} |"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of sst2-*.parquet")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl")
    kinds, models = ("steps", "search", "trunk"), tuple(LAYERS)
    parser.add_argument("--only", nargs="*", choices=kinds, default=kinds)
    parser.add_argument("--models", nargs="*", choices=models, default=models)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--here", type=json.loads, metavar="UNIT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        sys.exit(2)
    if options.here:
        print(json.dumps(measure(options.here, options.data)), flush=True)
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for split in ("train", "validation"):
            file = f"sst2-{split}.parquet"
            (folder / file).symlink_to((options.data / file).absolute())
        write_full(options.data, folder)
        build_bert_base(folder / "bert-base")
        failed = 0
        for unit in all_units(options.only, options.models, options.repeats):
            try:
                once(options.out, {"unit": unit}, partial(measure_apart, unit, folder, options.out))
            except subprocess.CalledProcessError:  # it has said why; the others may work
                print(f"{' '.join(map(str, unit))}: failed", flush=True)
                failed += 1
    print(table(finished(options.out)))
    sys.exit(failed > 0)


def measure_apart(unit: list[Any], folder: Path, out: Path) -> Row:
    arguments = ("--data", str(folder), "--out", str(out), "--here", json.dumps(unit))
    row = in_a_process("benchmarks.gpu", *arguments, TOKENIZERS_PARALLELISM="false")
    print(f"{' '.join(map(str, unit))}: done", flush=True)
    return row


if __name__ == "__main__":
    main()
