"""The page itself: sections into one HTML file that asks for nothing from outside."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sft_ray.analysis.report import facts
from sft_ray.analysis.report.blocks import Section
from sft_ray.analysis.report.run import Run
from sft_ray.analysis.report.sections import course, ending, mistakes, outcome, seeds, settings
from sft_ray.errors import ResourceError
from sft_ray.location import check_ending
from sft_ray.run_store import REPORT

PAGE_TYPES = (".html", ".htm")
HERE = Path(__file__).parent


def write_report(
    location: str, *, out: str | None = None, price: float | None = None, texts: bool = True
) -> str:
    """Write the report of a run, finished or not; return where it is.

    Args:
        location: path or URI of the run folder.
        out: file to write; default: `report.html` in the run folder.
        price: dollars for one worker and hour.
        texts: show sentences of the data.

    Raises:
        SftError: there is no run, a file of it is damaged, or the page cannot be written, for one
            under another ending.
    """
    if out is not None:
        check_ending(out, PAGE_TYPES, "a report")
    run = Run.load(location)
    text = render(run, price, texts)
    try:
        if out is None:
            run.store.write_text(REPORT, text)
            return run.store.path_of(REPORT)
        Path(out).write_text(text, encoding="utf-8")
    except OSError as error:
        place = out or run.store.path_of(REPORT)
        raise ResourceError(f"{place} cannot be written: {error.strerror or error}") from None
    return out


def render(run: Run, price: float | None = None, texts: bool = True) -> str:
    """The whole page."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    experiment = run.experiment
    data = experiment.data.path or PurePosixPath(str(experiment.data.train)).name
    page = environment.get_template("page.html").render(
        name=experiment.name,
        facts=[experiment.task, experiment.model, data, f"seed {experiment.seed}"],
        version=run.environment.get("sft_ray", ""),
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),  # noqa: S704 - our own
        sections=_sections(run, price, texts),
    )
    return page.lstrip()  # what the macros leave


def _sections(run: Run, price: float | None, texts: bool) -> list[Section]:
    """In the order of a reader's questions; those that have nothing to say are left out."""
    spent = facts.spending(run)
    all_of_them = [
        Section("outcome", "Outcome", outcome.outcome(run, spent, price)),
        Section("progress", "Progress", course.progress(run)),
        Section("curves", "Learning curves", course.curves(run)),
        Section("hyperparameters", "Hyperparameters", settings.hyperparameters(run)),
        Section("pareto", "Pareto set", course.pareto(run)),
        Section("confirm", "Confirmation on fresh seeds", seeds.confirmation(run)),
        Section("ablations", "Ablations", seeds.ablations(run)),
        Section("mistakes", "The winner's mistakes", mistakes.mistakes(run, texts)),
        Section("trials", "Trials", course.trials(run)),
        Section("errors", "Early ends and errors", ending.failures(run)),
        Section("cost", "Cost", ending.cost(run, spent, price)),
        Section("environment", "Environment", ending.environment(run)),
        Section("reproduce", "Reproduce", ending.reproduce(run)),
    ]
    return [section for section in all_of_them if section.blocks]
