"""The command line: one verb, one straight function.  Heavy imports happen inside the verbs."""

from __future__ import annotations

import gc
import shlex
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from typer.exceptions import TyperException

from sft_ray.errors import SftError, TrialError, disk_problem, first_line, without_credentials

if TYPE_CHECKING:
    from sft_ray.config import Experiment

INTERRUPTED = 130
GO_ON = ("search", "train", "confirm", "ablate")  # verbs that take up what was interrupted
MOST_CHARACTERS = 680  # of a line of an error; how to mend it stands at its end


# What several verbs take.
ExperimentFile = Annotated[str, typer.Argument(help="YAML file of the experiment.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="dotted.path=value, for example search.trials=6")
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Set an existing run folder aside and begin again.")
]
Address = Annotated[
    str | None,
    typer.Option(
        help="Ray cluster, for example auto.  Default: RAY_ADDRESS, one running here, or a new one."
    ),
]
Price = Annotated[float | None, typer.Option(min=0, help="Dollars per worker and hour.")]
Model = Annotated[str, typer.Argument(help="Model folder, hub id, or run folder.")]


def examples(*commands: str) -> str:
    """The end of a verb's help; \\b keeps its lines."""
    return "\n".join(["\b", "Examples:", *(f"  {command}" for command in commands)])


app = typer.Typer(
    help="Search the hyperparameters of fine-tuning BERT-type encoders on Ray.",
    no_args_is_help=True,
    context_settings={"max_content_width": 100},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _say_version(is_asked: bool) -> None:
    if is_asked:
        from sft_ray import __version__
        from sft_ray.screen import Screen

        Screen().say(f"sft-ray {__version__}")
        raise typer.Exit


@app.callback(epilog=examples("sft-ray init reviews.csv", "sft-ray search reviews.yaml"))
def _verbs(
    version: Annotated[
        bool, typer.Option("--version", help="Say the version.", callback=_say_version)
    ] = False,
) -> None:
    """Search the hyperparameters of fine-tuning BERT-type encoders on Ray."""


@app.command(
    epilog=examples(
        "sft-ray init reviews.csv",
        "sft-ray init ratings.tsv --task regression --out ratings.yaml",
        "sft-ray init saved_dataset/ --model google-bert/bert-base-uncased",
    )
)
def init(
    data: Annotated[
        str,
        typer.Argument(
            help="File (csv, tsv, json, jsonl, parquet), save_to_disk folder, or folder of files."
        ),
    ],
    task: Annotated[
        str | None, typer.Option(help="Default: guessed, for example text-classification.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Hub id or folder, not looked at.  Default: one for the texts' script."),
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="File to write.  Default: the data's name with .yaml.")
    ] = None,
) -> None:
    """Look at data and write a commented experiment that `sft-ray search` accepts."""
    from sft_ray.screen import Screen
    from sft_ray.starter import write_experiment

    start, screen = write_experiment(data, task=task, model=model, out=out), Screen()
    screen.facts(start.facts)
    screen.say("next:")
    screen.say(f"  sft-ray search {shlex.quote(start.file)}")


def _load(
    file: str, overrides: list[str] | None, check: Callable[[Experiment], object]
) -> Experiment:
    """The experiment of a file; if some of its keys are refused, `check` looks at the rest."""
    from sft_ray.config import Experiment
    from sft_ray.config_problems import may_come_of
    from sft_ray.errors import ConfigError
    from sft_ray.yaml_text import read_tree

    tree = read_tree(file, overrides or [])
    try:
        return Experiment.from_tree(tree, source=file)
    except ConfigError as error:
        problems = list(error.problems)
        rest, deleted = Experiment.what_is_valid(tree)
    if rest is not None:
        try:
            check(rest)
        except SftError as error:
            problems += [line for line in error.problems if not may_come_of(line, deleted)]
    raise ConfigError(*problems)


def _preflight(address: str | None) -> Callable[[Experiment], object]:
    """The check of an experiment that is to run on this cluster."""

    def check(experiment: Experiment) -> object:
        from sft_ray.search.cluster import capacity_here
        from sft_ray.search.preflight import prepare_experiment

        return prepare_experiment(experiment, capacity_here(address))

    return check


@app.command(
    epilog=examples(
        "sft-ray plan my.yaml --price 1.2",
        "sft-ray plan my.yaml search.trials=64 --address auto",
    )
)
def plan(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster whose slots are counted, for example auto.")
    ] = None,
    price: Price = None,
) -> None:
    """Say what a search would cost, from a short probe, and what would be refused."""

    parsed = _load(experiment, overrides, _preflight(address))
    from sft_ray.search.planning import run_plan

    source = shlex.join([experiment, *(overrides or [])])
    run_plan(parsed, address=address, price_per_hour=price, source=source)


@app.command(
    epilog=examples(
        "sft-ray search my.yaml",
        "sft-ray search my.yaml name=short search.trials=6 train.max_grad_norm=0.5",
        "sft-ray search my.yaml --extend 20",
        "sft-ray search my.yaml --address auto",
    )
)
def search(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Ray cluster, for example auto.  Default: one running here, else a new one."
        ),
    ] = None,
    fresh: Fresh = False,
    extend: Annotated[
        int, typer.Option(min=0, help="Trials to add to those the run folder was made for.")
    ] = 0,
) -> None:
    """Search, or go on with an interrupted search; ends with the best checkpoint."""

    parsed = _load(experiment, overrides, _preflight(address))
    from sft_ray.search.tuner import run_search

    source = shlex.join([experiment, *(overrides or [])])
    run_search(parsed, address=address, fresh=fresh, extend=extend, source=source)


@app.command(epilog=examples("sft-ray train my.yaml train.learning_rate=1e-4 train.epochs=4"))
def train(
    experiment: ExperimentFile,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="dotted.path=value, for example train.learning_rate=1e-4"),
    ] = None,
    fresh: Fresh = False,
) -> None:
    """Train the experiment's one configuration, without Ray; ends with the best checkpoint."""

    def check(rest: Experiment) -> object:
        from sft_ray.training.preparation import prepare_training

        return prepare_training(rest)

    parsed = _load(experiment, overrides, check)
    from sft_ray.single_trial import run_training

    run_training(parsed, fresh=fresh)


@app.command(
    epilog=examples(
        "sft-ray evaluate runs/my --split test",
        "sft-ray evaluate some/model --experiment my.yaml",
    )
)
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


@app.command(
    epilog=examples(
        "echo 'your text' | sft-ray predict runs/my",
        "sft-ray predict runs/my < inputs.jsonl > answers.jsonl",
        "sft-ray predict runs/my --explain < inputs.txt",
    )
)
def predict(
    model: Model,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say how much each token spoke for the answer.")
    ] = False,
) -> None:
    """Read one input per line (text or JSON), write one JSON answer per line."""
    import json
    from io import TextIOWrapper

    from sft_ray.serving.explain import explained
    from sft_ray.serving.predict import load_predictor, read_rows

    predictor = load_predictor(model)
    for stream, encoding in ((sys.stdin, "utf-8-sig"), (sys.stdout, "utf-8")):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(encoding=encoding)  # whatever the locale says
    rows = read_rows(sys.stdin, predictor.task)
    for answer in explained(predictor, rows) if explain else predictor.predict(rows):
        sys.stdout.write(json.dumps(answer, ensure_ascii=False) + "\n")


@app.command(
    epilog=examples("sft-ray export runs/my --onnx", "sft-ray export my/model --onnx --out my-onnx")
)
def export(
    model: Model,
    onnx: Annotated[bool, typer.Option("--onnx", help="As an ONNX graph; the one format.")] = False,
    out: Annotated[
        str | None, typer.Option(help="Folder to write.  Default: onnx in the run folder.")
    ] = None,
) -> None:
    """Write a model for other runtimes, after comparing its answers with ours."""
    from sft_ray.errors import ConfigError
    from sft_ray.screen import Screen

    if not onnx:
        raise ConfigError("export: say --onnx, the one format there is")
    from sft_ray.serving.export import export_onnx

    found = export_onnx(model, out)
    Screen().facts(
        {
            "inputs": f"{', '.join(found.inputs)}: int64, batch x length, both free",
            "outputs": f"{', '.join(found.outputs)}: float32",
            "agreement": f"{found.num_compared} texts, largest difference of an output "
            f"{found.largest_difference:.2g}",
            "written": found.folder,
        }
    )


@app.command(
    epilog=examples(
        "sft-ray serve runs/my",
        "sft-ray serve runs/my --port 8080 --replicas 4",
        """curl -d '{"text": "your text"}' http://127.0.0.1:8000/predict""",
    )
)
def serve(
    model: Model,
    host: Annotated[
        str, typer.Option(help="Address to listen on; there is no authentication.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    replicas: Annotated[
        int, typer.Option(min=1, help="Processes with the model, a CPU or GPU each.")
    ] = 1,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Of one request.")] = 1_000_000,
    max_characters: Annotated[int, typer.Option(min=1, help="Of one input.")] = 20_000,
    timeout_seconds: Annotated[
        float, typer.Option(min=0.1, help="Of one request; who waits longer is told 408.")
    ] = 60.0,
    address: Annotated[
        str, typer.Option(help="Ray cluster, for example auto.  Default: one of its own.")
    ] = "local",
) -> None:
    """Answer POST /predict and GET /healthz over HTTP until Ctrl-C."""
    from sft_ray.screen import Screen
    from sft_ray.search.cluster import capacity, connected
    from sft_ray.serving.requests import Limits
    from sft_ray.serving.serve import Service, check_room, check_service, run_service

    limits = Limits(body_bytes=max_body_bytes, characters=max_characters)
    service = Service(model, host, port, replicas, limits, timeout_seconds)
    screen = Screen()
    check_service(service)
    with connected(address):
        check_room(service, capacity())
        run_service(service, lambda url: screen.say(f"serving {model} on {url}; Ctrl-C ends it"))
    screen.say("ended")


@app.command(
    epilog=examples(
        "sft-ray push runs/my owner/name",
        "sft-ray push runs/my/best owner/name --public --message 'Confirmed on five seeds'",
    )
)
def push(
    model: Annotated[str, typer.Argument(help="Run folder, or model folder.")],
    repo: Annotated[str, typer.Argument(help="Repository on the hub, owner/name.")],
    public: Annotated[
        bool, typer.Option("--public", help="A new repository is private without this.")
    ] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
) -> None:
    """Upload a model to a hub repository; the token is HF_TOKEN or that of `hf auth login`."""
    from sft_ray.screen import Screen
    from sft_ray.serving.push import push_model

    found = push_model(model, repo, public=public, message=message)
    Screen().facts({"files": ", ".join(found.files), "pushed": found.url})


@app.command(epilog=examples("sft-ray confirm runs/my --top 3 --seeds 5"))
def confirm(
    run: Annotated[str, typer.Argument(help="Folder of a finished search.")],
    top: Annotated[
        int | None,
        typer.Option(
            min=1, max=100, help="Configurations, by search score.  Default: the run's own, or 3."
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(min=2, max=100, help="Fresh seeds for each.  Default: the run's own, or 5."),
    ] = None,
    address: Address = None,
) -> None:
    """Train a search's best configurations on fresh seeds; score the test split once."""
    from sft_ray.config import Confirm
    from sft_ray.run_store import open_run, read_experiment
    from sft_ray.search.confirm import run_confirm

    store = open_run(run)
    plan = read_experiment(store).confirm or Confirm()
    asked = {key: n for key, n in (("top", top), ("seeds", seeds)) if n is not None}
    run_confirm(store, plan.model_copy(update=asked), address=address)


@app.command(
    epilog=examples("sft-ray ablate experiments/ablations/frozen_layers.yaml base=runs/my")
)
def ablate(
    files: Annotated[
        list[str],
        typer.Argument(help="YAML files of ablations, and key=value, for example base=runs/mine"),
    ],
    address: Address = None,
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


@app.command(epilog=examples("sft-ray verify runs/my"))
def verify(run: Annotated[str, typer.Argument(help="Folder of a finished run.")]) -> None:
    """Score best/ again and check files, data and versions against what was reported."""
    from sft_ray.screen import Screen
    from sft_ray.serving.verify import run_verification

    found = run_verification(run)
    screen, words = Screen(), {True: "ok", False: "FAILED", None: "note"}
    screen.facts({c.name: f"{words[c.ok]}: {c.found}" for c in found.checks})
    if not found.ok:
        raise TrialError(f"{found.location} does not hold what it reports")


@app.command(epilog=examples("sft-ray replay runs/my --trial 7"))
def replay(
    run: Annotated[str, typer.Argument(help="Folder of a run.")],
    trial: Annotated[int, typer.Option(min=0, help="Number of the trial.")],
    address: Address = None,
) -> None:
    """Train one trial again and compare its numbers."""
    from sft_ray.search.replay import run_replay

    if not run_replay(run, trial, address=address).is_identical:
        raise TrialError(
            "the numbers are not the same; machine, versions or threads may differ, and a GPU adds "
            "in no fixed order"
        )


@app.command(epilog=examples("sft-ray status runs/my"))
def status(run: Annotated[str, typer.Argument(help="Folder of a run.")]) -> None:
    """Say how a run stands, from its folder alone, while it runs or after it died."""
    from sft_ray.analysis.status import run_status
    from sft_ray.screen import Screen

    Screen().facts(run_status(run).facts)


@app.command(
    epilog=examples(
        "sft-ray results runs/my --top 10",
        "sft-ray results runs/my --out trials.csv",
    )
)
def results(
    run: Annotated[str, typer.Argument(help="Folder of a run, finished or not.")],
    top: Annotated[int | None, typer.Option(min=1, help="Only the best so many.")] = None,
    out: Annotated[
        str | None, typer.Option(help="Write all trials to this .csv or .parquet.")
    ] = None,
) -> None:
    """Show a run's trials as a table, best first."""
    from sft_ray.analysis.results import SearchResult, reading, write_frame
    from sft_ray.analysis.tables import padding_line, trial_table
    from sft_ray.screen import Screen

    found, screen = SearchResult.load(run), Screen()
    with reading(found.location):
        lines, frame = trial_table(found, top), found.frame()
        lines += [f"{name}: {words}" for name, words in padding_line(found.trials).items()]
    if out is not None:
        write_frame(frame, out)
    for line in lines:
        screen.say(line)
    if out is not None:
        screen.say(f"written: {out}")


@app.command(
    epilog=examples(
        "sft-ray report runs/my",
        "sft-ray report runs/my --out my.html --price 1.2",
        "sft-ray report runs/my --out for_others.html --no-texts",
    )
)
def report(
    run: Annotated[str, typer.Argument(help="Folder of a run, finished or not.")],
    out: Annotated[
        str | None, typer.Option(help="File to write.  Default: report.html in the run folder.")
    ] = None,
    price: Price = None,
    texts: Annotated[
        bool, typer.Option(help="Show the hardest examples, which are sentences of the data.")
    ] = True,
) -> None:
    """Write one HTML page about a run: outcome, pictures, tables, cost; needs no network."""
    from sft_ray.analysis.report.page import write_report
    from sft_ray.screen import Screen

    Screen().say(f"written: {write_report(run, out=out, price=price, texts=texts)}")


@app.command(
    epilog=examples(
        "sft-ray doctor", "sft-ray doctor --address auto --storage s3://my-bucket/sft_ray"
    )
)
def doctor(
    address: Address = None,
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
    gc.set_threshold(100_000, 20, 100)  # imports only add; a fifth of their time goes to it else
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of libraries; `python -W` brings them back
    try:
        code = app(args=arguments, prog_name="sft-ray", standalone_mode=False)
    except TyperException as error:  # a misspelt verb or option
        message = error.format_message()
        if message.startswith("Usage:"):  # typer's answer to nothing is the help itself
            _end(2, *message.splitlines())
        name = message.removeprefix("No such option: --").rstrip(".")
        is_override = name != message.rstrip(".") and "." in name
        mend = f"an override has no dashes: {name}=…" if is_override else ""
        _end(2, f"error: {message.rstrip('.')}; {mend or 'see sft-ray --help'}")
    except TrialError as error:
        _end(1, str(error))
    except SftError as error:
        _end(2, *(f"error: {problem}" for problem in error.problems))
    except Exception as error:
        if problem := disk_problem(error):
            _end(2, f"error: {problem}")
        # Ours to mend.
        with tempfile.NamedTemporaryFile(
            "w", prefix="sft-ray-error-", suffix=".log", delete=False, encoding="utf-8"
        ) as log:
            traceback.print_exc(file=log)
        _end(
            1,
            f"internal error: {type(error).__name__}: {first_line(error)}",
            f"the traceback is in {log.name}; what was finished is kept",
        )
    if code == INTERRUPTED:  # typer's answer to a KeyboardInterrupt
        verb = next((word for word in arguments or sys.argv[1:] if not word.startswith("-")), "")
        goes_on = "; the same command goes on where it stopped" if verb in GO_ON else ""
        _end(code, f"interrupted{goes_on}")
    sys.exit(code)


def _end(code: int, *lines: str) -> NoReturn:
    from sft_ray.screen import silence

    try:
        sys.stderr.write("".join(f"{_plain(line)}\n" for line in lines))
        sys.stderr.flush()
    except OSError:  # the terminal was closed
        silence(sys.stderr)
    sys.exit(code)


def _plain(line: str) -> str:
    """A line of bounded length, whatever it quotes: nothing in it moves the cursor or is secret."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in without_credentials(line))
    if len(shown) <= MOST_CHARACTERS:
        return shown
    return f"{shown[: MOST_CHARACTERS - 200]} … {shown[-180:]}"


if __name__ == "__main__":
    main()
