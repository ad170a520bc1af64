"""The end of the page: errors, cost, environment and how to do it again."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from sft_ray.analysis.report import facts
from sft_ray.analysis.report.blocks import Block, Cell, Code, Fold, Grid, Table, Text
from sft_ray.analysis.report.run import Run
from sft_ray.analysis.results import reading
from sft_ray.analysis.tables import padding_line, startup_line
from sft_ray.run_store import ERROR_LOG, EXPERIMENT, RESULTS
from sft_ray.screen import count, duration

MOST_CAUSES = 30
MOST_NUMBERS = 12  # of trials behind a cause
LOG_LETTERS = 6000  # of the end of errors.log


def failures(run: Run) -> list[Block]:
    """Why trials ended early."""
    blocks: list[Block] = []
    causes = facts.causes(run)
    rows = [
        [cause.state, cause.reason, str(len(cause.trials)), _numbers(cause.trials)]
        for cause in causes[:MOST_CAUSES]
    ]
    if rows:
        more = len(causes) - len(rows)
        note = f"{count(more, 'rarer reason')} left out." if more else ""
        words, long = frozenset({0, 1, 3}), frozenset({1})
        head = ["state", "reason", "trials", "numbers"]
        blocks.append(Table(head, rows, words, long, note=note))
    if restarts := sum(trial.restarts for trial in run.trials):
        told = f"Trials were restarted {count(restarts, 'time')} after their workers had died."
        blocks.append(Text(told))
    log = run.store.read_text(ERROR_LOG)
    if log:
        cut = f"{ERROR_LOG}, its last {LOG_LETTERS:,} letters"
        summary = cut if len(log) > LOG_LETTERS else ERROR_LOG
        blocks.append(Fold(summary, [Code(log[-LOG_LETTERS:].strip())]))
    return blocks


def cost(run: Run, spent: Sequence[facts.Spent], price: float | None) -> list[Block]:
    """Worker time, and what it cost."""
    blocks: list[Block] = []
    if not spent:
        return blocks
    total = facts.Spent(
        "total",
        sum(part.runs for part in spent),
        sum(part.train_seconds for part in spent),
        sum(part.eval_seconds for part in spent),
        sum(part.overhead_seconds for part in spent),
    )
    rows: list[list[Cell]] = []
    for part in [*spent, total] if len(spent) > 1 else spent:
        seconds = (part.train_seconds, part.eval_seconds, part.overhead_seconds, part.seconds)
        dollars = [] if price is None else [f"${part.dollars(price):,.2f}"]
        rows.append([part.name, str(part.runs), *map(duration, seconds), *dollars])
    head = ["", "runs", "training", "evaluation", "overhead", "all"]
    head += [] if price is None else ["dollars"]
    tree = run.result.tree
    parts = [f"Time of all workers, {run.workers} per trial."]
    if tree.get("wall_seconds") is not None:
        what = "search" if run.is_search else "training"
        parts.append(f"The {what} took {duration(tree['wall_seconds'])} by the clock.")
    with reading(run.store.path_of(RESULTS)):
        parts += [f"Its first slot was ready after {w}." for w in startup_line(tree).values()]
        parts += [f"Padding: {words}." for words in padding_line(run.result.trials).values()]
    if price is not None:
        parts.append(f"At ${price:g} per worker and hour; idle and starting workers not counted.")
    else:
        parts.append("With --price DOLLARS per worker and hour this table counts money too.")
    last = frozenset({len(spent)})
    blocks.append(Table(head, rows, marked=last, note=" ".join(parts)))
    return blocks


def environment(run: Run) -> list[Block]:
    """Versions, hardware and fingerprints."""
    blocks: list[Block] = []
    found = run.environment
    plain = {**found, **(found.get("packages") or {})}
    for name in ("packages", "earlier"):
        plain.pop(name, None)
    if isinstance(plain.get("accelerators"), list):
        plain["accelerators"] = ", ".join(map(str, plain["accelerators"])) or None
    rows = [
        [name, f"{value:,}" if isinstance(value, int) else str(value)]
        for name, value in plain.items()
        if value is not None
    ]
    if rows:
        half = (len(rows) + 1) // 2
        words = frozenset({0, 1})
        tables = [Table(["", ""], part, words=words) for part in (rows[:half], rows[half:]) if part]
        blocks.append(Grid(tables))
    return blocks


def reproduce(run: Run) -> list[Block]:
    """The commands, and the experiment they need."""
    place = shlex.quote(run.store.location)
    verb = "search" if run.is_search else "train"
    is_here = run.store.local_root is not None
    file = shlex.quote(run.store.path_of(EXPERIMENT)) if is_here else EXPERIMENT
    saved = "the same from the start" if is_here else "the file below, saved to a disk"
    lines = [f"sft-ray {verb} {file} name=again    # {saved}"]
    if run.result.is_finished:
        lines.append(f"sft-ray verify {place}    # best/ scored again; files, data, versions")
        if run.winner is not None and run.is_search:
            lines.append(f"sft-ray replay {place} --trial {run.winner.number}    # one trial again")
        if run.is_search:
            lines.append(f"sft-ray confirm {place}    # fresh seeds, and the test split once")
    words = (
        f"All random numbers follow seed {run.experiment.seed}. With one slot and no limit of "
        "time, the same experiment, data and versions on the same machine give the same numbers."
    )
    resolved = run.store.read_text(EXPERIMENT) or ""
    return [Text(words), Code("\n".join(lines)), Fold(EXPERIMENT, [Code(resolved)])]


def _numbers(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:MOST_NUMBERS]))
    return f"{shown}, …" if len(numbers) > MOST_NUMBERS else shown
