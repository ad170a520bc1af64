"""Memory of one training beside `transformers.Trainer`, and of one slot over many trials.

`peak`: most resident memory during training minus that behind the imports, data in memory in both;
the same rows, batches of 32, an evaluation behind each of two epochs, with nothing and with four
of six layers frozen.  A process of its own each, in turns.  Trainer's batches are padded to their
longest.

`slot`: a search of many trials on one slot of one worker; resident memory of that worker after each
trial.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks.rows import once
from benchmarks.throughput import MODEL
from sft_ray.config import Experiment

SYSTEMS, DEPTHS = ("ours", "trainer"), (0, 4)
ROWS, BATCH_SIZE, EPOCHS, SEED = 2000, 32, 2, 0
MOST_GROWTH = 1.1  # wanted; of a peak, Trainer's + 2 times the weights, and 0.7 of it at depth 4
FIRST_TRIAL, TRIALS = 5, 60


def experiment(data: Path, frozen_layers: int) -> Experiment:
    return Experiment.model_validate(
        {
            "name": "memory",
            "model": MODEL,
            "data": {
                **{s: str(data / f"sst2-{s}.parquet") for s in ("train", "validation")},
                "max_length": 128,
                "limit": {"train": ROWS, "validation": 400},
            },
            "train": {
                "batch_size": BATCH_SIZE,
                "learning_rate": 1e-4,
                "epochs": EPOCHS,
                "frozen_layers": frozen_layers,
            },
        }
    )


def peak(system: str, data: Path, frozen_layers: int) -> dict[str, Any]:
    """Bytes that training takes at its highest, in this process, and those of the weights."""
    import transformers
    from transformers.models.bert import modeling_bert  # noqa: F401

    from sft_ray.search.preflight import prepare_experiment
    from sft_ray.training.fitting import fit
    from sft_ray.training.setup import load_setup
    from sft_ray.training.world import World

    prepared = prepare_experiment(experiment(data, frozen_layers))
    dataset = prepared.dataset
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the highest begins anew
    if system == "ours":
        setup = load_setup(prepared.experiment, prepared.dataset_folder, World())
        fit(
            prepared.experiment.train,
            setup,
            objective=prepared.objective,
            rungs=[],
            seed=SEED,
            report=lambda progress: True,
        )
        model = setup.pretrained.model
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            prepared.model.folder, trust_remote_code=False
        )
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            prepared.model.folder, num_labels=len(dataset.label_names), trust_remote_code=False
        )
        if frozen_layers:
            model.bert.embeddings.requires_grad_(False)
            model.bert.encoder.layer[:frozen_layers].requires_grad_(False)
        splits = [
            [
                {"input_ids": split.tokens[split[i]], "labels": int(split.labels[i])}
                for i in range(len(split))
            ]
            for split in (dataset.train, dataset.validation)
        ]
        with tempfile.TemporaryDirectory() as folder:
            transformers.Trainer(
                model=model,
                args=transformers.TrainingArguments(
                    output_dir=folder,
                    learning_rate=1e-4,
                    num_train_epochs=EPOCHS,
                    per_device_train_batch_size=BATCH_SIZE,
                    per_device_eval_batch_size=64,
                    eval_strategy="epoch",
                    save_strategy="no",
                    seed=SEED,
                    use_cpu=True,
                    dataloader_pin_memory=False,
                    report_to=[],
                    disable_tqdm=True,
                ),
                train_dataset=splits[0],
                eval_dataset=splits[1],
                data_collator=transformers.DataCollatorWithPadding(tokenizer),
            ).train()
    status = Path("/proc/self/status").read_text()
    [highest] = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"bytes": 1024 * int(highest) - before, "weights": weights}


def slot(data: Path) -> list[int]:
    """Resident bytes of a slot's worker after each trial."""
    from sft_ray.search.tuner import run_search

    with tempfile.TemporaryDirectory() as folder:
        tree = experiment(data, 0).to_tree()
        tree["storage"] = folder
        tree["data"]["limit"] = {"train": 64, "validation": 64}
        tree["resources"] = {"workers_per_trial": 1, "cpus_per_worker": 1, "slots": 1}
        tree["search"] = {
            "trials": TRIALS,
            "pruner": "none",
            "default_recipe": False,
            "space": {
                "train.learning_rate": {"log_uniform": [1e-5, 1e-3]},
                "train.batch_size": {"choice": [8, 16, 32]},
                "train.frozen_layers": {"int": [0, 6]},
                "train.epochs": 1,
            },
        }
        found: dict[int, int] = {}
        ended = threading.Event()

        def look() -> None:
            worker = None
            while not ended.wait(0.2):
                begun = len(list(Path(folder).glob("memory/trials/*")))
                try:
                    worker = worker or _worker()
                    # A process that is ending holds nothing.
                    if worker is not None and (resident := worker.memory_info().rss):
                        found[begun] = resident
                except psutil.Error:
                    worker = None

        watching = threading.Thread(target=look)
        watching.start()
        try:
            run_search(Experiment.model_validate(tree), quiet=True)
        finally:
            ended.set()
            watching.join()
    return [found[n] for n in sorted(found) if n > 0]


def _worker() -> psutil.Process | None:
    for process in psutil.Process().children(recursive=True):
        if " ".join(process.cmdline()).startswith("ray::Worker"):
            return process
    return None


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| frozen | runs | Trainer, times the weights | ours, times the weights | ours / Trainer |",
        "|---:|---:|---:|---:|---:|",
    ]
    weights = max((row["weights"] for row in rows if "weights" in row), default=1)  # ours has fewer
    for k in DEPTHS:
        mine = {
            system: [r["bytes"] / weights for r in rows if (r["system"], r.get("k")) == (system, k)]
            for system in SYSTEMS
        }
        if all(mine.values()):
            ours, trainer = (statistics.median(mine[system]) for system in SYSTEMS)
            lines.append(
                f"| {k} | {len(mine['ours'])} | {trainer:.2f} | {ours:.2f} | {ours / trainer:.2f} |"
            )
    for row in rows:
        if row["system"] == "slot":
            after = row["bytes"]
            growth = after[-1] / after[FIRST_TRIAL - 1]
            lines.append(
                f"\nA slot after trial {len(after)} holds {growth:.3f} times what it held after "
                f"trial {FIRST_TRIAL} (at most {MOST_GROWTH} wanted)."
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of sst2-*.parquet")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--here", nargs=2, metavar=("SYSTEM", "DEPTH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        system, depth = options.here
        print(json.dumps(peak(system, options.data, int(depth))))
        return
    date = {"date": datetime.now(UTC).date().isoformat()}

    def in_a_process(system: str, k: int) -> dict[str, Any]:
        command = [sys.executable, "-m", "benchmarks.memory", "--here", system, str(k)]
        command += ["--data", str(options.data), "--out", str(options.out)]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        time.sleep(1)
        return {**json.loads(said.splitlines()[-1]), **date}

    rows = [
        once(
            options.out,
            {"system": system, "k": k, "repeat": repeat},
            partial(in_a_process, system, k),
        )
        for repeat, k, system in itertools.product(range(options.repeats), DEPTHS, SYSTEMS)
    ]
    of_slot = once(options.out, {"system": "slot"}, lambda: {"bytes": slot(options.data), **date})
    print(table([*rows, of_slot]))


if __name__ == "__main__":
    main()
