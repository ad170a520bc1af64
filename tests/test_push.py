"""The hub's real client uploads what it should, to a hub on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sft_ray.errors import ConfigError
from sft_ray.serving.push import push_model
from tests.hub import FakeHub, fake_hub
from tests.models import (
    TASK,
    load_tiny,
    save_tiny,
    tiny_model_folder,
    toy_dataset,
)

TOKEN = "hf_a_secret_that_nobody_may_see"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a winner, its card, and files that nobody wants to publish."""
    folder = tmp_path_factory.mktemp("push")
    base = tiny_model_folder(folder / "base")
    dataset = toy_dataset(folder, base, train=30, validation=20)
    best = folder / "run" / "best"
    best.parent.mkdir()
    save_tiny(best, base, load_tiny(base, dataset), dataset, {}, TASK)
    (best / "README.md").write_text("---\nlibrary_name: transformers\n---\n# mine\n")
    (best / "notes.txt").write_text("private")
    (best / ".env").write_text("private")
    return folder / "run"


def push(
    run: Path, hub: FakeHub, home: Path, *options: str, token: str | None = TOKEN
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: the client reads its settings when imported."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING_FACE"))
    }
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, "-m", "sft_ray.cli", "push", str(run), "me/mine", *options]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=200, check=False
    )


def test_a_winner_becomes_a_private_repository(run: Path, tmp_path: Path) -> None:
    with fake_hub(TOKEN) as hub:
        done = push(run, hub, tmp_path)
        assert done.returncode == 0, done.stderr
        assert hub.created[0]["visibility"] == "private"
        assert set(hub.files) == {
            "README.md",
            "config.json",
            "model.safetensors",
            "sft_ray.json",
            "tokenizer.json",
            "tokenizer_config.json",
        }
        for name, content in hub.files.items():
            assert content == (run / "best" / name).read_bytes()
        assert hub.commits[0]["summary"] == "Upload a text-classification model with sft_ray"
        assert f"{hub.url}/me/mine" in done.stdout
        assert TOKEN not in done.stdout + done.stderr
        # Once more, from the token file, into the repository that is there now.
        (tmp_path / "token").write_text(TOKEN)
        again = push(run / "best", hub, tmp_path, "--message", "Again", token=None)
        assert again.returncode == 0, again.stderr
        assert hub.commits[1]["summary"] == "Again"


def test_a_refusal_is_one_line_without_the_token(run: Path, tmp_path: Path) -> None:
    wrong = "hf_another_secret"
    with fake_hub(TOKEN) as hub:
        done = push(run, hub, tmp_path, "--public", token=wrong)
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert line.startswith("push to me/mine failed: ")
        assert "401" in line
        assert wrong not in done.stdout + done.stderr
        none = push(run, hub, tmp_path, token=None)
        assert none.returncode == 2
        assert none.stderr == (
            "error: push: there is no token; set HF_TOKEN or run `hf auth login`\n"
        )
        assert not hub.files


def test_a_card_that_the_hub_refuses_is_told_in_a_line(run: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(run / "best", mine)
    (mine / "README.md").write_text("---\nbase_model: package:some/model\n---\n")
    with fake_hub(TOKEN) as hub:
        done = push(mine, hub, tmp_path)
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert 'Invalid metadata in README.md. - "base_model" with value' in line
        assert not hub.files


def test_what_is_no_model_is_refused(tmp_path: Path, run: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(ConfigError, match="no model folder or run folder"):
        push_model(str(tmp_path), "me/mine")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds no weights"):
        push_model(str(tmp_path), "me/mine")
    with pytest.raises(ConfigError, match="is no owner/name"):
        push_model(str(run), "me/mine/and/more")
