"""The live view: what its board holds, how it is drawn, what a real terminal gets to see."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl
from pathlib import Path

import pytest
from optuna.trial import TrialState
from rich.cells import cell_len
from rich.console import Console

from sft_ray.analysis.outcome import Outcome
from sft_ray.config import Experiment, Train
from sft_ray.recipes import default_recipe
from sft_ray.search.board import NUM_BEST, Board
from sft_ray.search.live_view import draw
from sft_ray.search.study import SearchStudy, open_storage
from sft_ray.search.trials import PlannedTrial

SAID = "lr 3.2e-05, batch 32, epochs 3, l2_sp 0.01, frozen 2"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def planned(number: int, said: str = SAID) -> PlannedTrial:
    return PlannedTrial(number, f"trial {number}", said, f"trials/{number}", Train(), {}, 17)


def finish(board: Board, number: int, score: float | None, state: str = "COMPLETE") -> None:
    board.start(planned(number))
    if score is not None:
        board.mark(number, 100, score, 0.25)
    board.end(number, state, score, 3.0)


def best_of(board: Board) -> list[int]:
    best = board.view().best
    assert best is not None
    return [trial.number for trial in best]


def test_the_board_counts_ends_and_forgets_who_has_ended(clock: Clock) -> None:
    board = Board("accuracy", 10, 2, sign=1, clock=clock)
    assert board.view().num_ended == 0
    finish(board, 0, 0.5)
    finish(board, 1, 0.4, "PRUNED")
    finish(board, 2, None, "FAIL")
    board.start(planned(3))
    board.mark(3, 10, 0.3, 1.5)
    clock.now += 4
    view = board.view()
    assert view.counts == {"COMPLETE": 1, "PRUNED": 1, "FAIL": 1}
    assert (view.num_ended, view.planned) == (3, 10)
    [running] = view.running
    assert (running.label, running.percent, running.score) == ("trial 3", 10, 0.3)
    assert (running.train_loss, running.heard_seconds, running.settings) == (1.5, 4.0, SAID)


@pytest.mark.parametrize(("sign", "best"), [(1, [3, 6, 1, 5, 7]), (-1, [0, 4, 2, 1, 5])])
def test_the_best_are_complete_in_order_and_the_earlier_first(sign: int, best: list[int]) -> None:
    board = Board("score", 10, 1, sign=sign)
    for number, score in enumerate([0.1, 0.5, 0.4, 0.9, 0.2, 0.5, 0.9, 0.5]):
        finish(board, number, score)
    finish(board, 8, 1.0 * sign, "PRUNED")
    assert best_of(board) == best


def test_where_nothing_is_to_be_improved_there_is_no_best() -> None:
    board = Board("accuracy", 3, 1, noun="run")
    finish(board, 0, 0.5)
    assert board.view().best is None
    assert "of 3 runs ended" in drawn(board, 100, 30)


def test_a_trial_that_lost_its_slot_is_counted_once(clock: Clock) -> None:
    board = Board("accuracy", 2, 1, sign=1, clock=clock)
    board.start(planned(0))
    board.mark(0, 33, 0.5, 1.0)
    board.lose(0)
    assert board.view().running == ()
    board.start(planned(0))
    assert board.view().running[0].score is None
    board.mark(0, 100, 0.75, 1.0)
    board.end(0, "COMPLETE", 0.75, 3.0)
    assert board.view().counts == {"COMPLETE": 1}
    assert best_of(board) == [0]


def test_time_to_go_and_budget(clock: Clock) -> None:
    board = Board("accuracy", 10, 2, sign=1, wall_seconds=100, slot_seconds=50, clock=clock)
    finish(board, 0, 0.5)
    assert board.view().seconds_to_go is None
    finish(board, 1, 0.5)
    board.start(planned(2))
    board.mark(2, 50, 0.5, 1.0)
    clock.now += 4
    view = board.view()
    assert view.seconds_to_go == 3.0 * 7.5 / 2
    assert view.budget_seconds == (50 - 6 - 4) / 2  # the tighter one, over two slots
    clock.now += 1000
    assert board.view().budget_seconds == 0


def test_a_search_that_goes_on_shows_what_ended_before(tmp_path: Path) -> None:
    tree = {
        "name": "mine",
        "model": "any",
        "data": {"path": "builtin:docstrings"},
        "search": {
            "space": {"train.epochs": {"int": [1, 3]}, "train.batch_size": {"choice": [16, 32]}},
            "trials": 50,
            "budget": {"wall_minutes": 10, "worker_hours": 0.01},
        },
        "resources": {"workers_per_trial": 2},
    }
    study = SearchStudy(
        Experiment.from_tree(tree),
        open_storage(tmp_path / "journal"),
        recipe=default_recipe(22_000_000),
        num_layers=6,
        direction="maximize",
    )
    for score in (0.5, 0.75):
        trial = study.next_trial()
        assert trial is not None
        study.mark(trial.number, 100, score, 8.0)
        study.finish(trial.number, TrialState.COMPLETE, Outcome(score=score, train_seconds=8.0))
    study.next_trial()
    board = study.open_board("accuracy", 1)
    view = board.view()
    assert (view.counts, best_of(board), view.running) == ({"COMPLETE": 2}, [1, 0], ())
    assert view.best is not None
    assert re.fullmatch(r"epochs \d, batch \d\d", view.best[0].settings)
    assert view.planned == 3 + 4  # there are six configurations, and the recipe beside them
    assert view.seconds_to_go == 8.0 * 5
    assert view.budget_seconds == pytest.approx(36 / 2 - 16, abs=0.1)


def drawn(board: Board, width: int, height: int) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None)
    console.print(draw(board.view(), "  3:07", width, height))
    return file.getvalue()


def long_search(slots: int = 4) -> Board:
    """1,000 trials, most of which have ended."""
    board = Board("accuracy", 1000, slots, sign=1, wall_seconds=3600)
    for number in range(990):
        finish(board, number, (number % 37) / 37, "COMPLETE" if number % 3 else "PRUNED")
    for number in range(990, 990 + slots):
        board.start(planned(number))
    board.mark(min(992, 989 + slots), 33, 0.5, 0.7)
    return board


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 200])
@pytest.mark.parametrize("height", [1, 5, 8, 9, 12, 24, 60])
@pytest.mark.parametrize("slots", [1, 4, 64])
def test_it_fits_the_terminal_whatever_its_size(width: int, height: int, slots: int) -> None:
    lines = drawn(long_search(slots), width, height).splitlines()
    assert 1 <= len(lines) <= max(height - 1, 1)
    assert all(cell_len(line) <= width for line in lines)
    if height >= 8:
        assert any(line.startswith("best") for line in lines)


def test_columns_go_as_the_terminal_gets_narrower() -> None:
    board = long_search()
    wide, middle, narrow = (drawn(board, width, 30) for width in (200, 80, 60))
    assert SAID in wide
    assert "  3:07  990 of 1000 trials ended (660 COMPLETE, 330 PRUNED), 4 running, best" in wide
    assert "━" in wide
    assert "train loss" in middle
    assert "━" not in middle
    assert "train loss" not in narrow
    assert all("…" in line for line in narrow.splitlines() if line.startswith("trial "))
    row = next(line.split() for line in wide.splitlines() if line.startswith("trial 992"))
    assert row[3:7] == ["33%", "0.5000", "0.7000", "0s"]
    assert sum(line.startswith("trial") for line in wide.splitlines()) == 4 + NUM_BEST


def test_more_slots_than_lines_are_counted() -> None:
    lines = drawn(long_search(64), 100, 24).splitlines()
    shown = [line for line in lines if re.match(r"trial 99\d|trial 10", line)]
    [more] = [line for line in lines if " more" in line]
    assert int(more.split()[0]) == 64 - len(shown)


def test_wide_characters_keep_the_columns_in_line() -> None:
    board = Board("accuracy", 5, 2, sign=1)
    board.start(planned(0, "模型 学习率 3e-05, 批量 32, 冻结的层数 2, 正则化强度 0.01"))
    board.start(PlannedTrial(1, "第一次试验", "lr 1", "x", Train(), {}, 1))
    for number in (0, 1):
        board.mark(number, 10, 0.5, 1.0)
    for width in (60, 100):
        rows = [line for line in drawn(board, width, 20).splitlines() if "10%" in line]
        assert len({cell_len(row[: row.index("10%")]) for row in rows}) == 1
        assert all(cell_len(row) <= width for row in rows)


# -- on a real terminal ------------------------------------------------------------------------

HERE = Path(__file__).parents[2]
SCRIPT = """
import pickle, sys, time
from sft_ray.config import Train
from sft_ray.run_store import RunStore
from sft_ray.screen import Screen
from sft_ray.search.conductor import Conductor
from sft_ray.search.fixed_runs import FixedRun, FixedRuns
from sft_ray.search.live_view import live_view
from tests.search.test_fixed_runs import Slots, message

runs = [FixedRun("base", Train(), {}, seed) for seed in range(3)]
slots = Slots(runs, RunStore(sys.argv[1], "mine"))
screen = slots.conductor.screen = Screen()
pause = float(sys.argv[2])
screen.say("before")
with live_view(screen, slots.conductor.board):
    while slots.start() is not None:
        for index in range(4):
            time.sleep(pause)
            slots.mark(index)
    pickle.dumps((screen, slots.conductor.board))  # as Tune does
    if "raise" in sys.argv:
        raise RuntimeError("a bug")
    time.sleep(pause)
screen.say("after")
"""
PLAIN = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A process on a pseudo-terminal of its own."""

    def __init__(
        self, *arguments: str, script: str = SCRIPT, width: int = 80, **environment: str
    ) -> None:
        size = ("COLUMNS", "LINES")  # would be believed before the terminal
        shared = {name: value for name, value in os.environ.items() if name not in size}
        self.leader, follower = pty.openpty()
        self.resize(width)
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            cwd=HERE,
            env={**shared, "TERM": "xterm-256color", "PYTHONPATH": str(HERE), **environment},
            start_new_session=True,
            # A suite that a shell runs in the background is deaf to it, and so are its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(follower)
        self.seen = ""

    def resize(self, width: int, height: int = 24) -> None:
        ioctl(self.leader, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def read(self, until: str | None = None, seconds: float = 60) -> str:
        """What comes until a text is seen, or to the end."""
        begin, ends_at = len(self.seen), time.monotonic() + seconds
        while until is None or until not in self.seen[begin:]:
            ready, _, _ = select.select([self.leader], [], [], ends_at - time.monotonic())
            assert ready, f"{until} was not seen in {self.seen}"
            try:
                self.seen += os.read(self.leader, 65536).decode()
            except OSError:  # the other end is closed
                break
        return self.seen[begin:]

    def end(self) -> int:
        self.read()
        os.close(self.leader)
        return self.process.wait(60)


def assert_left_clean(terminal: Terminal) -> None:
    """The cursor is back, and the last lines of the view were erased."""
    assert terminal.seen.rindex("\x1b[?25h") > terminal.seen.rindex("\x1b[?25l")
    table = terminal.seen.rindex("ended")
    assert terminal.seen.count("\x1b[1A\x1b[2K", table) >= 3
    assert terminal.seen.rindex("\x1b[?25h") > table


def test_a_terminal_shows_the_table_below_the_lines_and_is_left_clean(tmp_path: Path) -> None:
    terminal = Terminal(str(tmp_path), "0.6")
    terminal.read("run 2     starts")
    terminal.resize(60)
    assert terminal.end() == 0
    assert_left_clean(terminal)
    text = PLAIN.sub("", terminal.seen)
    assert text.rstrip().endswith("after")
    assert re.search(r"\d:\d\d  run 0     COMPLETE accuracy 0\.6000", text)
    assert "train loss 0.500" not in text  # marks do not scroll, the table has them
    assert "0 of 3 runs ended, 1 running" in text
    assert "1 of 3 runs ended (1 COMPLETE), 1 running" in text
    before, _, after = text.partition("run 2     starts")
    row = r"run {} +33% +0\.5\d30 +{}\ds ago  base, seed {}"
    assert re.search(row.format(1, r"0\.5000 +", 1), before)
    assert re.search(row.format(2, "", 2), after)  # 60 columns have no room for the loss


@pytest.mark.parametrize("how", ["SIGINT", "raise"])
def test_a_terminal_is_left_clean_by_an_early_end(tmp_path: Path, how: str) -> None:
    terminal = Terminal(str(tmp_path), "0.05" if how == "raise" else "30", how)
    terminal.read("1 running")
    if how == "SIGINT":
        terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() != 0
    assert_left_clean(terminal)
    word = "KeyboardInterrupt" if how == "SIGINT" else "RuntimeError: a bug"
    assert PLAIN.sub("", terminal.seen).rstrip().endswith(word)


def test_no_color_is_respected(tmp_path: Path) -> None:
    terminal = Terminal(str(tmp_path), "0.2", NO_COLOR="1")
    assert terminal.end() == 0
    assert not re.search(r"\x1b\[[0-9;]*\b(3[0-9]|4[0-9]|9[0-7])\b[0-9;]*m", terminal.seen)
    assert "runs ended" in terminal.seen


def test_a_pipe_gets_plain_lines_whatever_rich_is_told(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), "0"],
        capture_output=True,
        text=True,
        cwd=HERE,
        env={**os.environ, "FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    times = re.compile(r"^ +\d+:\d\d  ")
    lines = [times.sub("T ", line) for line in done.stdout.splitlines()]
    assert len(lines) == 2 + 3 * 6
    assert lines[:7] == [
        "before",
        "T run 0     starts   base, seed 0",
        "T run 0      10%    accuracy 0.5100  train loss 0.500  epoch 0.20",
        "T run 0      33%    accuracy 0.5330  train loss 0.500  epoch 0.66",
        "T run 0      67%    accuracy 0.5670  train loss 0.500  epoch 1.34",
        "T run 0     100%    accuracy 0.6000  train loss 0.500  epoch 2.00",
        "T run 0     COMPLETE accuracy 0.6000  3.0 s, 1.88 s overhead",
    ]
    assert lines[-1] == "after"


def test_a_dumb_terminal_gets_plain_lines(tmp_path: Path) -> None:
    terminal = Terminal(str(tmp_path), "0", TERM="dumb")
    assert terminal.end() == 0
    assert "\x1b" not in terminal.seen
    assert "train loss 0.500" in terminal.seen


def test_facts_fit_a_narrow_terminal() -> None:
    script = "from sft_ray.screen import Screen; Screen().facts({'name': 'word ' * 40})"
    terminal = Terminal(script=script, width=60)
    assert terminal.end() == 0
    lines = terminal.seen.split("\r\n")
    assert [len(line) <= 60 for line in lines] == [True] * 5
    assert all(line.startswith("      word") for line in lines[1:-1])
