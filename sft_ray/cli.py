"""The command line: one verb, one straight function.  Heavy imports happen inside the verbs."""

from __future__ import annotations

import shlex
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from typer.exceptions import TyperException

from sft_ray.errors import SftError, TrialError

if TYPE_CHECKING:
    from sft_ray.config import Experiment

INTERRUPTED = 130

app = typer.Typer(
    help="Search the hyperparameters of fine-tuning BERT-type encoders on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _verbs() -> None:
    """Search the hyperparameters of fine-tuning BERT-type encoders on Ray."""


def _load(
    file: str, overrides: list[str] | None, check: Callable[[Experiment], object]
) -> Experiment:
    """The experiment of a file; if some of its keys are refused, `check` looks at the rest."""
    from sft_ray.config import Experiment
    from sft_ray.errors import ConfigError
    from sft_ray.yaml_text import read_tree

    tree = read_tree(file, overrides or [])
    try:
        return Experiment.from_tree(tree, source=file)
    except ConfigError as error:
        problems = list(error.problems)
        rest = Experiment.what_is_valid(tree)
    if rest is not None:
        try:
            check(rest)
        except SftError as error:
            problems += error.problems
    raise ConfigError(*problems)


@app.command()
def plan(
    experiment: Annotated[str, typer.Argument(help="YAML file of the experiment.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="dotted.path=value, for example search.trials=6")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster whose slots are counted, for example auto.")
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Dollars per worker and hour.")] = None,
) -> None:
    """Say what a search would cost, from a short probe, and what would be refused."""

    def check(rest: Experiment) -> object:
        from sft_ray.search.cluster import capacity_here
        from sft_ray.search.preflight import prepare_experiment

        return prepare_experiment(rest, capacity_here(address))

    parsed = _load(experiment, overrides, check)
    from sft_ray.search.planning import run_plan

    source = shlex.join([experiment, *(overrides or [])])
    run_plan(parsed, address=address, price_per_hour=price, source=source)


@app.command()
def search(
    experiment: Annotated[str, typer.Argument(help="YAML file of the experiment.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="dotted.path=value, for example search.trials=6")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Ray cluster, for example auto.  Default: one running here, else a new one."
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Set an existing run folder aside and begin again.")
    ] = False,
    extend: Annotated[
        int, typer.Option(min=0, help="Trials to add to those the run folder was made for.")
    ] = 0,
) -> None:
    """Search, or go on with an interrupted search; ends with the best checkpoint."""

    def check(rest: Experiment) -> object:
        from sft_ray.search.cluster import capacity_here
        from sft_ray.search.preflight import prepare_experiment

        return prepare_experiment(rest, capacity_here(address))

    parsed = _load(experiment, overrides, check)
    from sft_ray.search.tuner import run_search

    source = shlex.join([experiment, *(overrides or [])])
    run_search(parsed, address=address, fresh=fresh, extend=extend, source=source)


@app.command()
def train(
    experiment: Annotated[str, typer.Argument(help="YAML file of the experiment.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="dotted.path=value, for example train.learning_rate=1e-4"),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Set an existing run folder aside and begin again.")
    ] = False,
) -> None:
    """Train the experiment's one configuration, without Ray; ends with the best checkpoint."""

    def check(rest: Experiment) -> object:
        from sft_ray.training.preparation import prepare_training

        return prepare_training(rest)

    parsed = _load(experiment, overrides, check)
    from sft_ray.single_trial import run_training

    run_training(parsed, fresh=fresh)


@app.command()
def evaluate(
    model_or_run: Annotated[str, typer.Argument(help="Run folder, or a model folder or hub id.")],
    split: Annotated[str, typer.Option(help="validation or test.")] = "validation",
    experiment: Annotated[
        str | None, typer.Option(help="YAML file that says what data, for a model of no run.")
    ] = None,
) -> None:
    """Score a model on a split; every scoring of the test split is recorded in its run."""
    from sft_ray.screen import Screen
    from sft_ray.serving.evaluate import run_evaluation

    found = run_evaluation(model_or_run, split, experiment)
    screen = Screen()
    screen.facts(
        {
            "model": found.model,
            "split": f"{found.split}, {found.num_examples} examples",
            **{name: f"{value:.4f}" for name, value in found.metrics.items()},
            **({"recorded in": found.recorded_in} if found.recorded_in else {}),
        }
    )


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="Model folder, hub id, or run folder.")],
) -> None:
    """Read one input per line (text or JSON), write one JSON answer per line."""
    import json
    from io import TextIOWrapper

    from sft_ray.serving.predict import load_predictor, read_rows

    predictor = load_predictor(model)
    for stream, encoding in ((sys.stdin, "utf-8-sig"), (sys.stdout, "utf-8")):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(encoding=encoding)  # whatever the locale says
    for answer in predictor.predict(read_rows(sys.stdin, predictor.task)):
        sys.stdout.write(json.dumps(answer, ensure_ascii=False) + "\n")


@app.command()
def confirm(
    run: Annotated[str, typer.Argument(help="Folder of a finished search.")],
    top: Annotated[int, typer.Option(min=1, max=100, help="Configurations, by search score.")] = 3,
    seeds: Annotated[int, typer.Option(min=2, max=100, help="Fresh seeds for each.")] = 5,
    address: Annotated[str | None, typer.Option(help="Ray cluster, for example auto.")] = None,
) -> None:
    """Train a search's best configurations on fresh seeds; score the test split once."""
    from sft_ray.config import Confirm
    from sft_ray.search.confirm import run_confirm

    run_confirm(run, Confirm(top=top, seeds=seeds), address=address)


@app.command()
def ablate(
    files: Annotated[
        list[str],
        typer.Argument(help="YAML files of ablations, and key=value, for example base=runs/mine"),
    ],
    address: Annotated[str | None, typer.Option(help="Ray cluster, for example auto.")] = None,
) -> None:
    """Vary one thing around a base over shared seeds; leaves tables and figures."""
    from sft_ray.ablation_file import Ablation
    from sft_ray.errors import ConfigError
    from sft_ray.search.ablate import run_ablations

    overrides = [text for text in files if "=" in text]
    paths = [text for text in files if "=" not in text]
    if not paths:
        raise ConfigError("ablate: give at least one ablation's YAML file")
    run_ablations([Ablation.load(path, overrides) for path in paths], address=address)


@app.command()
def verify(run: Annotated[str, typer.Argument(help="Folder of a finished run.")]) -> None:
    """Score best/ again and check files, data and versions against what was reported."""
    from sft_ray.screen import Screen
    from sft_ray.serving.verify import run_verification

    found = run_verification(run)
    screen, words = Screen(), {True: "ok", False: "FAILED", None: "note"}
    screen.facts({c.name: f"{words[c.ok]}: {c.found}" for c in found.checks})
    if not found.ok:
        raise TrialError(f"{found.location} does not hold what it reports")


@app.command()
def replay(
    run: Annotated[str, typer.Argument(help="Folder of a run.")],
    trial: Annotated[int, typer.Option(min=0, help="Number of the trial.")],
    address: Annotated[str | None, typer.Option(help="Ray cluster, for example auto.")] = None,
) -> None:
    """Train one trial again and compare its numbers."""
    from sft_ray.search.replay import run_replay

    if not run_replay(run, trial, address=address).is_identical:
        raise TrialError("the numbers are not the same; machine, versions or threads may differ")


@app.command()
def status(run: Annotated[str, typer.Argument(help="Folder of a run.")]) -> None:
    """Say how a run stands, from its folder alone, while it runs or after it died."""
    from sft_ray.analysis.status import run_status
    from sft_ray.screen import Screen

    Screen().facts(run_status(run).facts)


@app.command()
def results(
    run: Annotated[str, typer.Argument(help="Folder of a run, finished or not.")],
    top: Annotated[int | None, typer.Option(min=1, help="Only the best so many.")] = None,
    out: Annotated[
        str | None, typer.Option(help="Write all trials to this .csv or .parquet.")
    ] = None,
) -> None:
    """Show a run's trials as a table, best first."""
    from sft_ray.analysis.results import SearchResult, write_frame
    from sft_ray.analysis.tables import trial_table
    from sft_ray.screen import Screen

    found, screen = SearchResult.load(run), Screen()
    if out is not None:
        write_frame(found.frame(), out)
    for line in trial_table(found, top):
        screen.say(line)
    if out is not None:
        screen.say(f"written: {out}")


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="Folder of a run, finished or not.")],
    out: Annotated[
        str | None, typer.Option(help="File to write.  Default: report.html in the run folder.")
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Dollars per worker and hour.")] = None,
) -> None:
    """Write one HTML page about a run: outcome, pictures, tables, cost; needs no network."""
    from sft_ray.analysis.report.page import write_report
    from sft_ray.screen import Screen

    Screen().say(f"written: {write_report(run, out=out, price=price)}")


@app.command()
def doctor(
    address: Annotated[str | None, typer.Option(help="Ray cluster, for example auto.")] = None,
    storage: Annotated[
        str | None,
        typer.Option(help="Storage to try from every machine.", envvar="SFT_RAY_STORAGE"),
    ] = None,
) -> None:
    """Check every machine of a cluster, with a mend for what is wrong; exit code 1 if it is."""
    from sft_ray.search.doctor import draw, run_doctor

    checks = run_doctor(storage, address=address)
    draw(checks)
    wrong = [check.name for check in checks if check.ok is False]
    if wrong:
        raise TrialError(f"to mend: {', '.join(wrong)}")


def main(arguments: list[str] | None = None) -> None:
    """Entry point: a user's mistakes end with exit code 2 and plain lines."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of libraries; `python -W` brings them back
    try:
        code = app(args=arguments, standalone_mode=False)
    except TyperException as error:  # a misspelt verb or option
        message = error.format_message()
        asked_for_nothing = message.startswith("Usage:")  # typer's answer is the help itself
        _end(2, message if asked_for_nothing else f"error: {message}; see sft-ray --help")
    except TrialError as error:
        _end(1, str(error))
    except SftError as error:
        _end(2, *(f"error: {problem}" for problem in error.problems))
    except Exception as error:  # ours to mend
        with tempfile.NamedTemporaryFile(
            "w", prefix="sft-ray-error-", suffix=".log", delete=False, encoding="utf-8"
        ) as log:
            traceback.print_exc(file=log)
        first_line = (str(error).splitlines() or [""])[0]
        _end(
            1,
            f"internal error: {type(error).__name__}: {first_line}",
            f"the traceback is in {log.name}; what was finished is kept",
        )
    if code == INTERRUPTED:  # typer's answer to a KeyboardInterrupt
        _end(code, "interrupted; the same command goes on where it stopped")
    sys.exit(code)


def _end(code: int, *lines: str) -> NoReturn:
    from sft_ray.screen import silence

    try:
        sys.stderr.write("".join(f"{line}\n" for line in lines))
        sys.stderr.flush()
    except OSError:  # the terminal was closed
        silence(sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
