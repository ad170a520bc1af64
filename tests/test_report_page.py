"""The page of a report: whole, self-contained, safe with any text, readable where it is shown."""

from __future__ import annotations

import html
import json
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from optuna.trial import TrialState

from sft_ray.analysis.ablation import Arm, from_tree, summarize, to_tree
from sft_ray.analysis.outcome import Outcome
from sft_ray.analysis.report.answers import answers
from sft_ray.analysis.report.page import render, write_report
from sft_ray.analysis.report.run import Run
from sft_ray.analysis.results import SearchResult
from sft_ray.analysis.rows import row_of
from sft_ray.cli import main
from sft_ray.config import Experiment
from sft_ray.run_store import (
    CONFIRMATION,
    PREDICTIONS,
    RESULTS,
    RunStore,
    delete_results,
    write_experiment,
)
from sft_ray.search.study import SearchStudy, open_storage
from sft_ray.serving.evaluate import record_test
from sft_ray.single_trial import run_training
from tests.search.test_study import RECIPE, experiment
from tests.test_results import search_run

ODD = """<script>alert(1)</script></style><img src=x onerror=alert(2)>" onload="b() {{ 7*7 }} 中"""
VOID = {"meta", "img", "br", "link", "input"}
SECTIONS = ["outcome", "progress", "curves", "hyperparameters", "confirm", "ablations", "mistakes"]
SECTIONS += ["trials", "errors", "cost", "environment", "reproduce"]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Page(HTMLParser):
    """The elements of a page; fails where one is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def sections(self) -> list[str | None]:
        return [attributes["id"] for tag, attributes in self.elements if tag == "section"]


def check_is_self_contained(page: Page) -> None:
    """Nothing that runs, nothing that is fetched."""
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "link", "iframe", "object", "base", "form"}
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
        assert "url(" not in (attributes.get("style") or "")
    policies = [a["content"] for _, a in page.elements if "http-equiv" in a]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def confirm_and_ablate(store: RunStore, label: str) -> None:
    """What `confirm` and `ablate` leave, with a label of one's own."""
    expected = {"mean": 0.8, "sd": 0.01, "low": 0.79, "high": 0.81, "n": 3}
    over = {
        "difference": 0.1,
        "low": 0.05,
        "high": 0.15,
        "p_value": 0.01,
        "n": 3,
        "detectable": 0.1,
    }
    row = {"arm": label, "trial": 1, "params": {"train.a": label}, "search_value": 0.85}
    row |= {"scores": {"1": 0.79, "2": 0.8, "3": 0.81}, "expected": expected, "flattered": 0.05}
    rows = [{**row, "behind": False, "over_default": over}]
    rows.append({**row, "arm": "default recipe", "behind": True, "over_default": None})
    rows.append({**rows[1], "arm": "failed", "expected": None, "scores": {}, "flattered": None})
    tree = {"metric": "accuracy", "configurations": rows, "test": None, "seeds": [1, 2, 3]}
    store.write_json(CONFIRMATION, tree)
    runs = [
        {"arm": arm, "seed": seed, "state": "COMPLETE", "value": base + 0.01 * seed}
        | dict.fromkeys(("train_seconds", "eval_seconds", "trained_parameters"), 3.0)
        | {"memory_bytes": None}
        for arm, base in (("base", 0.8), (label, 0.7))
        for seed in (1, 2, 3)
    ]
    summaries = summarize([Arm("base"), Arm(label, {"train.a": label})], runs, sign=1)
    ablation = {"name": label, "metric": "accuracy", **to_tree(summaries)}
    assert from_tree(json.loads(json.dumps(ablation))) == summaries
    store.write_json("ablations/depth/ablation.json", ablation)


def odd_run(folder: Path) -> RunStore:
    """A search with a confirmation, an ablation, and texts that try to be markup."""
    store, _ = search_run(folder)
    tree = store.read_json(RESULTS)
    tree["trials"][2] |= {"state": "FAIL", "reason": ODD, "value": None}
    tree["trials"][3]["params"]["train.optimizer"] = ODD
    tree["metric"] = f"accuracy{ODD}"
    tree["environment"] = {"platform": ODD, "packages": {ODD: "1"}}
    store.write_json(RESULTS, tree)
    answers = [
        {
            "text": f"a sentence {ODD}",
            "label": label,
            "predicted_label": ODD,
            "predicted_probability": 0.5,
        }
        for label in ("a", ODD)
    ]
    pq.write_table(pa.Table.from_pylist(answers), Path(store.location) / PREDICTIONS)
    store.write_text("errors.log", ODD)
    confirm_and_ablate(store, ODD)
    return store


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    return odd_run(tmp_path_factory.mktemp("odd"))


def test_a_page_has_every_section_and_fetches_nothing(odd: RunStore) -> None:
    page = Page(render(Run.load(odd.location)))
    assert page.sections == SECTIONS
    check_is_self_contained(page)
    links = [a["href"] for tag, a in page.elements if tag == "a"]
    assert links == [f"#{name}" for name in SECTIONS]


def test_text_stays_text(odd: RunStore) -> None:
    text = render(Run.load(odd.location))
    assert "<script" not in text
    assert "49" not in re.findall(r"onload[^<]{0,40}", html.unescape(text))
    assert text.count("</style>") == 1
    page = Page(text)
    assert page.text.count(ODD) >= 8  # metric, reason, label, example, arm, log, …
    titles = [a["aria-label"] or "" for tag, a in page.elements if "aria-label" in a]
    assert any(ODD in title for title in titles)


def test_a_run_without_confirmation_says_so(tmp_path: Path) -> None:
    store, study = search_run(tmp_path)
    page = Page(render(Run.load(store.location)))
    assert "The best of many noisy scores flatters." in page.text
    assert f"sft-ray confirm {store.location}" in page.text
    assert f"{study.best_score():.4f}" in page.text
    assert "confirm" not in page.sections
    assert "No result yet" not in page.text


@pytest.mark.parametrize("is_named", [True, False])
def test_a_page_says_how_often_the_test_split_was_scored(tmp_path: Path, is_named: bool) -> None:
    store, _ = search_run(tmp_path)
    tree = store.read_json(RESULTS)
    expected = {"mean": 0.8, "sd": 0.01, "low": 0.79, "high": 0.81, "n": 3}
    test = {"metrics": {"accuracy": 0.75}, "num_examples": 40}
    tree["best"] |= {"expected": expected, "test": test if is_named else None}
    store.write_json(RESULTS, tree)

    def said() -> str:
        return Page(render(Run.load(store.location))).text

    if not is_named:
        assert "No test split was scored." in said()
    for words in ("scored once", "scored 2 times in this run"):
        record_test(store, store.location, test["metrics"], 40)
        assert (f"40 examples, {words} " if is_named else f"The test split was {words}.") in said()
    assert "No test split was scored." not in said()


def test_the_page_says_where_the_seconds_of_the_start_went(tmp_path: Path) -> None:
    store, _ = search_run(tmp_path)
    tree = store.read_json(RESULTS) | {"wall_seconds": 90.0, "startup_seconds": 9.0}
    store.write_json(RESULTS, tree)
    plain = Page(render(Run.load(store.location))).text
    assert "The search took 1 min 30 s by the clock. Its first slot was ready after 9 s. " in plain
    tree["startup_parts"] = {"checks": 2.0, "ray": 7.0}
    store.write_json(RESULTS, tree)
    page = Page(render(Run.load(store.location))).text
    assert "Its first slot was ready after 9 s: checks 2.0 s, Ray 7.0 s. " in page


def test_an_unfinished_run_says_so_at_the_top(tmp_path: Path) -> None:
    store, _ = search_run(tmp_path)
    delete_results(store)
    page = Page(render(Run.load(store.location)))
    assert page.sections[0] == "outcome"
    assert page.text.index("No result yet. It stopped") < page.text.index("How sure")
    check_is_self_contained(page)


def test_a_run_of_failures_alone_has_a_page(tmp_path: Path) -> None:
    exp, store = experiment(trials=3), RunStore(str(tmp_path), "x")
    store.pull_journal()
    write_experiment(store, exp)
    for journal in (None, ""):  # not even a trial
        if journal is not None:
            store.write_text("study.journal", journal)
        empty = Page(render(Run.load(store.location)))
        assert "No trial has reached the end of its schedule." in empty.text
    study = SearchStudy(
        exp, open_storage(store.journal), recipe=RECIPE, num_layers=6, direction="maximize"
    )
    while (planned := study.next_trial()) is not None:
        study.finish(planned.number, TrialState.FAIL, Outcome(reason="no space left"))
    for trial in study.trials:
        store.write_json(f"trials/{trial.number}/trial.json", row_of(trial, 17))
    page = Page(render(Run.load(store.location)))
    assert "and every one failed" in page.text
    assert "no space left" in page.text
    assert page.sections == ["outcome", "trials", "errors", "cost", "reproduce"]


def test_a_single_training_has_a_page(
    tiny_experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tiny_experiment.to_tree()
    train = {"learning_rate": 5e-3, "epochs": 2}
    tree |= {"search": {}, "train": train, "storage": str(tmp_path), "resources": {}}
    tree |= {"resources": {"slots": 2, "trunk_cache_gb": 1}, "tracking": ["wandb"]}
    run = run_training(Experiment.from_tree(tree)).location
    said = capsys.readouterr().out
    assert re.search(r"not used +tracking, resources.slots: of searches alone\n", said), said
    with pytest.raises(SystemExit) as ended:
        main(["report", run, "--price", "3.6"])
    assert not ended.value.code
    assert f"written: {run}/report.html" in capsys.readouterr().out
    page = Page((Path(run) / "report.html").read_text(encoding="utf-8"))
    assert "one training with one seed" in page.text
    assert "sft-ray train" in page.text
    assert "sft-ray confirm" not in page.text
    assert "$" in page.text
    assert re.search(r"Padding: \d+\.\d % of what training computed\.", page.text)
    sections = ["outcome", "curves", "mistakes", "cost", "environment", "reproduce"]
    assert page.sections == sections
    with pytest.raises(SystemExit) as ended:
        main(["verify", run])
    assert not ended.value.code  # a report breaks no checksum


def many_trials(folder: Path, number: int) -> Run:
    """A finished run of very many invented trials, three of four of them stopped early."""
    chance = random.Random(0)
    rows = []
    for i in range(number):
        rate, depth = 10 ** chance.uniform(-6, -2), chance.randrange(13)
        kind = chance.choice(["none", "l2_sp", "weight_decay"])
        score = 0.9 - 0.05 * depth * chance.random() + chance.gauss(0, 0.02)
        last = chance.choice([10, 33, 33, 100]) if i else 100
        params = {"train.learning_rate": rate, "train.frozen_layers": depth}
        params |= {"train.batch_size": chance.choice([16, 32]), "train.regularization.kind": kind}
        if kind != "none":
            params[f"train.regularization.{kind}.strength"] = 10 ** chance.uniform(-4, -1)
        rows.append(
            {
                "number": i,
                "state": "COMPLETE" if last == 100 else "PRUNED",
                "role": "sampled",
                "reason": None if last == 100 else f"rung {last}",
                "params": params,
                "value": score,
                "metrics": {"accuracy": score},
                "schedule_percent": last,
                "curve": [[p, score * p / 100] for p in (10, 33, 50, 67, 83, 100) if p <= last],
                "examples_per_second": 100.0 + 50 * depth,
                "train_seconds": 60.0,
            }
        )
    best = max((row for row in rows if row["state"] == "COMPLETE"), key=lambda row: row["value"])
    tree: dict[str, Any] = {"metric": "accuracy", "direction": "maximize", "trials": rows}
    tree["best"] = {"trial": best["number"], "params": best["params"], "validation": {}}
    store = RunStore(str(folder), "x")
    return Run(store, experiment(), SearchResult(store.location, tree))


@pytest.mark.parametrize("number", [3, 1000, 5000])
def test_a_page_stays_small(tmp_path: Path, number: int) -> None:
    text = render(many_trials(tmp_path, number))
    assert len(text.encode()) < 5_000_000
    page = Page(text)
    check_is_self_contained(page)
    rows = text[text.index('<section id="trials">') :].partition("</section>")[0].count("<tr")
    assert rows == 1 + min(number, 50)
    assert (f"{number - 50} more trials" in page.text) == (number > 50)
    assert (" of 5,000 trials are drawn." in page.text) == (number == 5000)


def test_out_names_another_file(odd: RunStore, tmp_path: Path) -> None:
    target = tmp_path / "mine.html"
    assert write_report(odd.location, out=str(target)) == str(target)
    assert not (Path(odd.location) / "report.html").exists()
    uri = f"file://{Path(odd.location).absolute()}"
    assert write_report(uri) == f"{uri}/report.html"
    written = Path(odd.location) / "report.html"
    for path in (target, written):
        assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    written.unlink()


def test_a_page_for_others_holds_no_sentence_of_the_data(odd: RunStore, tmp_path: Path) -> None:
    run = Run.load(odd.location)
    found = answers(run)
    assert found is not None
    sentences = {text for one in found.hardest for text in one.shown.values()}
    assert all(text in Page(render(run)).text for text in sentences)
    target = tmp_path / "others.html"
    with pytest.raises(SystemExit) as end:
        main(["report", odd.location, "--out", str(target), "--no-texts"])
    assert not end.value.code
    page = Page(target.read_text(encoding="utf-8"))
    assert page.sections == SECTIONS
    assert not any(text in page.text for text in sentences)


# -- in a browser --------------------------------------------------------------------------------

MEASURE = """<body><script>
const pages = PAGES, widths = WIDTHS, found = [];
let left = pages.length * widths.length;
for (const page of pages) for (const width of widths) {
  const frame = document.createElement("iframe");
  frame.style = `width:${width}px;height:900px;border:0`;
  frame.onload = () => {
    const root = frame.contentDocument.documentElement;
    found.push([width, root.scrollWidth, frame.contentDocument.querySelectorAll("section").length]);
    if (--left === 0) document.body.innerHTML = "<pre>" + JSON.stringify(found) + "</pre>";
  };
  frame.srcdoc = page;
  document.body.append(frame);
}
</script>"""


def browse(*arguments: str, profile: Path) -> str:
    """Run a headless browser that asks for nothing."""
    assert CHROMIUM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    options += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    options += [f"--user-data-dir={profile}", "--hide-scrollbars"]
    done = subprocess.run(
        [CHROMIUM, *options, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_nothing_sticks_out_on_a_phone_or_a_desk(odd: RunStore, tmp_path: Path) -> None:
    """The body never scrolls sideways at 400 and 1280 pixels, and pictures of it can be taken."""
    pages = [render(Run.load(odd.location)), render(many_trials(tmp_path, 1000))]
    sources = json.dumps(pages).replace("</", "<\\/")
    measure = tmp_path / "measure.html"
    script = MEASURE.replace("PAGES", sources).replace("WIDTHS", "[400, 1280]")
    measure.write_text(f"<!doctype html><meta charset=utf-8>{script}", encoding="utf-8")
    dump = ["--virtual-time-budget=20000", "--dump-dom", measure.as_uri()]
    answer = browse(*dump, profile=tmp_path / "profile")
    found = json.loads(re.findall(r"<pre>(\[\[.*\]\])</pre>", answer)[0])
    assert len(found) == 4
    for width, needed, sections in found:
        assert needed <= width
        assert sections >= 6
    report = tmp_path / "report.html"
    report.write_text(pages[0], encoding="utf-8")
    for width in (500, 1280):  # a headless window is no narrower
        picture = tmp_path / f"{width}.png"
        size = [f"--window-size={width},2000", f"--screenshot={picture}", report.as_uri()]
        browse(*size, profile=tmp_path / "profile")
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size > 20_000
