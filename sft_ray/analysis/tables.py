"""Tables of plain text for the screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sft_ray.analysis.outcome import slot_seconds_of
from sft_ray.analysis.results import SearchResult
from sft_ray.run_store import RunStore, scorings_of_test
from sft_ray.screen import count, duration, short_params

WIDTH = 100  # columns of a screen
GAP = "  "
STARTUP = {  # of a search, in the order of time
    "checks": "checks",
    "ray": "Ray",
    "study": "layout and study",
    "slot": "slot",
    "workers": "workers",
    "loading": "model and data",
}


def trial_table(result: SearchResult, top: int | None = None) -> list[str]:
    """The trials of a run, best first: one line each under a heading, the winner with a star.

    Finished trials come first, then the others by how far they got and what they scored there,
    because the score of a trial that was stopped early says little about its end.

    Args:
        result: of a run that may still be going on.
        top: how many trials to show; default: all.
    """
    rows = _best_first(result)
    shown = rows if top is None else rows[: max(top, 0)]
    best = result.best["trial"] if result.is_finished else None
    heading = ("trial", "state", result.tree.get("metric") or "score", "percent", "seconds")
    cells = [heading, *(_cells(row, best) for row in shown)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(heading))]
    settings = ["settings", *(short_params(row["params"]) for row in shown)]
    lines = [
        _cut(_aligned(line, widths) + GAP + params)
        for line, params in zip(cells, settings, strict=True)
    ]
    if left_out := len(rows) - len(shown):
        lines.append(f"… and {count(left_out, 'more trial')}")
    return lines


def scored_words(store: RunStore) -> str | None:
    """How often the test split was scored in a run; None if no scoring is on record."""
    models = [str(record.get("model")).partition("?")[0] for record in scorings_of_test(store)]
    if len(models) <= 1:
        return "scored once" if models else None
    # A confirmation scores its winner and the default recipe; whose models have folders there.
    confirmed = {tuple(model.split("/")[-3:]) for model in models if "/confirm/" in model}
    if len(confirmed) == len(models):
        return f"scored once with each of {len(models)} models"
    return f"scored {len(models)} times in this run"


def padding_line(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """How much padding a run has trained with, as one line; none if its trials do not say.

    Each trial counts by its epochs, which are its tokens: all train on the same data.
    """
    told = [(row.get("epochs_run") or 0.0, row.get("padding_share")) for row in rows]
    epochs = sum(epochs for epochs, share in told if share is not None)
    if not epochs:
        return {}
    share = sum(epochs * share for epochs, share in told if share is not None) / epochs
    return {"padding": f"{100 * share:.1f} % of what training computed"}


def startup_line(tree: Mapping[str, Any]) -> dict[str, str]:
    """When the first slot of a search was ready, and where the seconds went; none if unknown."""
    seconds, parts = tree.get("startup_seconds"), tree.get("startup_parts") or {}
    if seconds is None:
        return {}
    told = [f"{STARTUP.get(name, name)} {taken:.1f} s" for name, taken in parts.items()]
    return {"startup": f"{duration(seconds)}{': ' * bool(told)}{', '.join(told)}"}


def _best_first(result: SearchResult) -> list[dict[str, Any]]:
    sign = {"maximize": 1, "minimize": -1}.get(result.tree.get("direction") or "", 0)

    def rank(row: dict[str, Any]) -> tuple[bool, float, bool, float, int]:
        complete, value = row["state"] == "COMPLETE", row.get("value")
        progress = 0 if complete else -row.get("schedule_percent", 0)
        return not complete, progress, value is None, -sign * (value or 0), row["number"]

    return sorted(result.trials, key=rank)


def _cells(row: dict[str, Any], best: int | None) -> tuple[str, ...]:
    value = row.get("value")
    return (
        f"{row['number']}{'*' if row['number'] == best else ' '}",
        row["state"],
        "" if value is None else f"{value:.4f}",
        str(row.get("schedule_percent", "")),
        f"{slot_seconds_of(row):.1f}",
    )


def _aligned(cells: tuple[str, ...], widths: list[int]) -> str:
    """Texts to the left, figures to the right."""
    number, state, *figures = cells
    aligned = [f"{number:>{widths[0]}}", f"{state:<{widths[1]}}"]
    aligned += [f"{text:>{width}}" for text, width in zip(figures, widths[2:], strict=True)]
    return GAP.join(aligned)


def _cut(line: str) -> str:
    line = line.rstrip()
    return line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"
