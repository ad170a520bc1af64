"""A search, its confirmation, the ablation of frozen depth and the report, with MiniLM on a CPU.

Leaves run folders below --storage, goes on there when started again, and writes tables, figures and
the report, without a word of the data, to --out.

--data names a folder of `<name>-train.parquet`, `-validation` and `-test` files.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.against_trainer import CASES
from benchmarks.real_data import experiment
from sft_ray.analysis.report.page import write_report
from sft_ray.analysis.results import SearchResult
from sft_ray.run_store import CONFIRMATION

DATASETS = ("trec", "mrpc", "sst2")
SEEDS = 5
ABLATION = Path(__file__).parents[1] / "experiments" / "ablations" / "frozen_layers.yaml"
TABLES = ("table.md", "table.csv", "table.tex", "figure.svg", "figure.png")


def run(dataset: str, options: argparse.Namespace) -> Path:
    """Everything of one data set; its run folder."""
    from sft_ray.ablation_file import Ablation
    from sft_ray.search.ablate import run_ablations
    from sft_ray.search.tuner import run_search

    case = next(case for case in CASES if case.name == dataset)
    found = experiment(
        case,
        options.data,
        options.storage,
        f"research-{dataset}",
        search={"objective": case.metric, "trials": options.trials},
        confirm={"top": 3, "seeds": SEEDS},
        resources={"workers_per_trial": 1, "cpus_per_worker": 1, "slots": options.slots},
    )
    limit = {"train": options.rows, "validation": options.validation_rows}
    data = found.data.model_copy(update={"limit": found.data.limit.model_copy(update=limit)})
    location = Path(run_search(found.model_copy(update={"data": data})).location)
    if options.ablation:
        ablation = Ablation.load(str(ABLATION), [f"base={location}", f"seeds={SEEDS}"])
        run_ablations([ablation])
    return location


def confirmation_table(location: Path) -> str:
    """Markdown: each configuration over the fresh seeds, the two gaps, the test scores."""
    tree = json.loads((location / CONFIRMATION).read_text())
    metric = tree["metric"]
    lines = [
        f"| configuration | search | {metric} over fresh seeds (95 %) | n "
        "| over the default recipe (95 %) | test |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in tree["configurations"]:
        expected, over = row["expected"], row["over_default"]
        test = (tree["test"] or {}).get(row["arm"])
        cells = [
            row["arm"] + (" (clearly behind)" if row["behind"] else ""),
            "" if row["search_value"] is None else f"{row['search_value']:.4f}",
            _with_interval(expected, expected["mean"], ""),
            str(expected["n"]),
            "" if over is None else _with_interval(over, over["difference"], "+"),
            "" if test is None else f"{test['metrics'][metric]:.4f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _with_interval(found: dict[str, Any], value: float, sign: str) -> str:
    if found["low"] is None:
        return f"{value:{sign}.4f}"
    return f"{value:{sign}.4f} ({found['low']:{sign}.4f} to {found['high']:{sign}.4f})"


def publish(location: Path, dataset: str, out: Path) -> None:
    """Copy what holds figures only."""
    target = out / dataset
    target.mkdir(parents=True, exist_ok=True)
    tables = location / "ablations" / "frozen_layers"
    for name in TABLES if tables.is_dir() else ():
        shutil.copyfile(tables / name, target / name)
    (target / "confirm.md").write_text(confirmation_table(location) + "\n", encoding="utf-8")
    page = Path(write_report(str(location), out=str(target / "report.html"), texts=False))
    here = page.read_text(encoding="utf-8").replace(f"{location.parent.absolute().parent}/", "")
    page.write_text(here, encoding="utf-8")  # paths of this machine say nothing to others
    result = SearchResult.load(str(location))
    result.frame().drop(columns="reason").to_csv(target / "trials.csv")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--storage", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--datasets", nargs="*", default=list(DATASETS), choices=list(DATASETS))
    parser.add_argument("--rows", type=int, default=600, help="of training")
    parser.add_argument("--validation-rows", type=int, default=300)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--no-ablation", dest="ablation", action="store_false")
    parser.add_argument("--slots", type=int, default=2, help="of one CPU each")
    options = parser.parse_args()
    for dataset in options.datasets:
        publish(run(dataset, options), dataset, options.out)


if __name__ == "__main__":
    main()
