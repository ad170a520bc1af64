"""Draws a board at the bottom of a terminal, while lines scroll by above it."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderResult
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType, Segment
from rich.table import Table
from rich.text import Text

from sft_ray.screen import Screen
from sft_ray.search.board import NUM_BEST, Board, EndedTrial, RunningTrial, View

REFRESHES_PER_SECOND = 2
CLOCK_WIDTH = 6  # as `Screen.event` leads its lines
LABEL_WIDTHS = (9, 16)
SMALLEST_TABLE = 8  # lines; a lower terminal gets the first line only
# Columns between label and settings: width, and how wide all must be to show them.
COLUMNS = {
    "bar": (10, 88),
    "percent": (4, 0),
    "score": (10, 0),
    "train loss": (10, 72),
    "seconds": (8, 48),
}
SETTINGS_FROM = 48


@contextmanager
def live_view(screen: Screen, board: Board) -> Iterator[None]:
    """Show the board while the block runs, if the screen is a terminal that can; then remove it."""
    console = Console(highlight=False)
    if not screen.is_terminal or not console.is_interactive or console.options.ascii_only:
        yield
        return
    region = _Region(screen, board, console)
    with region, screen.writing_through(region.write):
        yield


class _Region(Live):
    """The lines at the bottom.

    Terminals wrap what is already there when they get narrower: rich would then erase too few
    lines and leave pieces behind.
    """

    def __init__(self, screen: Screen, board: Board, console: Console) -> None:
        self._frame = _Frame(screen, board)
        super().__init__(
            self._frame,
            console=console,
            refresh_per_second=REFRESHES_PER_SECOND,
            transient=True,
            redirect_stderr=os.isatty(2),  # else it would no longer go where it was sent
        )

    def write(self, line: str) -> None:
        """A line above; as one piece with the lines below, which a thread paints too."""
        with self._lock:
            self.console.print(Text(line), soft_wrap=True)

    def refresh(self) -> None:
        with suppress(OSError):  # the terminal was closed; the run is not to suffer
            super().refresh()

    def stop(self) -> None:
        with suppress(OSError):
            super().stop()

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        _, *rest = super().process_renderables(renderables)
        width = self.console.width
        lines = sum(max(math.ceil(cells / width), 1) for cells in self._frame.painted)
        above = ((ControlType.CURSOR_UP, 1), (ControlType.ERASE_IN_LINE, 2)) * (lines - 1)
        begin = (ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2))
        return [Control(*begin, *above) if lines else Control(), *rest]


class _Frame:
    """What is drawn, in the size the terminal has at that moment.

    Attributes:
        painted: width of each line that was drawn last, in cells.
    """

    def __init__(self, screen: Screen, board: Board) -> None:
        self._screen, self._board = screen, board
        self.painted: list[int] = []

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, height = console.size
        # A line that fills the last column leaves the cursor where terminals disagree.
        drawing = draw(self._board.view(), self._screen.clock(), width - 1, height)
        lines = console.render_lines(drawing, options.update(width=width - 1), pad=False)
        lines = [_without_blanks_behind(line) for line in lines]
        self.painted = [Segment.get_line_length(line) for line in lines]
        for number, line in enumerate(lines):
            yield from line
            if number < len(lines) - 1:
                yield Segment.line()


def _without_blanks_behind(line: list[Segment]) -> list[Segment]:
    """Blanks would be wrapped, too."""
    line = [segment for segment in line if segment.text]
    while line and not line[-1].text.strip():
        line.pop()
    if line:
        line[-1] = line[-1]._replace(text=line[-1].text.rstrip())
    return line


def draw(view: View, clock: str, width: int, height: int) -> Table:
    """The whole in a line or two, running trials, the best trials; fewer lines than `height`.

    Args:
        clock: minutes and seconds so far.
        width: cells in a line.
        height: of the terminal, in lines.
    """
    summary = textwrap.wrap(", ".join(_summary(view)), max(width - CLOCK_WIDTH - 2, 1))
    summary = summary[: max(height // 4, 1)]
    whole = Table.grid(padding=(0, 2, 0, 0))
    whole.add_column(width=CLOCK_WIDTH, no_wrap=True)
    whole.add_column(no_wrap=True, overflow="ellipsis")
    whole.add_row(clock, Text("\n".join(summary)))
    frame = Table.grid(expand=True)
    frame.add_column()
    if height < SMALLEST_TABLE:
        frame.add_row(whole)
    else:
        frame.add_row("")  # apart from the lines above
        frame.add_row(whole)
        frame.add_row(_trials(view, width, height - len(summary) - 2))
    return frame


def _summary(view: View) -> Iterator[str]:
    states = ", ".join(f"{number} {state}" for state, number in sorted(view.counts.items()))
    yield f"{view.num_ended} of {view.planned} {view.noun}s ended" + (f" ({states})" * bool(states))
    yield f"{len(view.running)} running"
    if view.best:
        yield f"best {view.objective} {view.best[0].score:.4f}"
    if view.budget_seconds is not None:
        yield f"{_roughly(view.budget_seconds)} of the budget left"
    if view.seconds_to_go is not None:
        limit = math.inf if view.budget_seconds is None else view.budget_seconds
        yield f"about {_roughly(max(min(view.seconds_to_go, limit), 60))} to go"


def _roughly(seconds: float) -> str:
    """In minutes, from an hour on in hours."""
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _trials(view: View, width: int, height: int) -> Table:
    """One table, so that running and best trials have their columns in line."""
    best = view.best or ()
    # A header each; running trials have the first claim, but the best one is always seen.
    room = height - 1 - bool(best)
    num_best = min(len(best), NUM_BEST, max(room - len(view.running), 1))
    num_running = min(len(view.running), room - num_best)
    if hidden := len(view.running) - num_running:
        num_running, hidden = num_running - 1, hidden + 1
    running, best = view.running[: max(num_running, 0)], best[:num_best]
    columns = [name for name, (_, least) in COLUMNS.items() if width >= least]
    labels = [*(one.label for one in running), *(trial.label for trial in best)]
    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    low, high = LABEL_WIDTHS
    table.add_column(
        width=min(max([low, *map(cell_len, labels)]), high), no_wrap=True, overflow="ellipsis"
    )
    for name in columns:
        table.add_column(
            width=COLUMNS[name][0],
            no_wrap=True,
            overflow="ellipsis",
            justify="left" if name == "bar" else "right",
        )
    if width >= SETTINGS_FROM:
        table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    heads = {name: name for name in COLUMNS} | {"bar": "", "percent": "", "score": view.objective}

    def add(first: str, cells: dict[str, str], settings: str, style: str = "") -> None:
        row = [first, *(cells[name] for name in columns), settings]
        shown = row if width >= SETTINGS_FROM else row[:-1]
        table.add_row(*map(Text, shown), style=style)

    add("running", {**heads, "seconds": "heard"}, "settings", "dim")
    for one in running:
        add(one.label, _of_running(one), one.settings)
    if hidden:
        add(f"{hidden} more", dict.fromkeys(COLUMNS, ""), "")
    if best:
        add("best", {**heads, "seconds": "took"}, "settings", "dim")
    for trial in best:
        add(trial.label, _of_ended(trial), trial.settings)
    return table


def _of_running(trial: RunningTrial) -> dict[str, str]:
    return {
        "bar": "━" * (COLUMNS["bar"][0] * trial.percent // 100),
        "percent": f"{trial.percent}%",
        "score": _number(trial.score),
        "train loss": _number(trial.train_loss),
        "seconds": f"{_brief(trial.heard_seconds)} ago",
    }


def _of_ended(trial: EndedTrial) -> dict[str, str]:
    return {
        "bar": trial.state,
        "percent": "",
        "score": _number(trial.score),
        "train loss": _number(trial.train_loss),
        "seconds": _brief(trial.seconds),
    }


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _brief(seconds: float) -> str:
    """`48s`, `12m`, `5h`."""
    if seconds < 99.5:
        return f"{seconds:.0f}s"
    return f"{seconds / 60:.0f}m" if seconds < 100 * 60 else f"{seconds / 3600:.0f}h"
