import pytest

from sft_ray.screen import Screen, count, duration, short_params


@pytest.mark.parametrize(
    ("seconds", "text"), [(48.4, "48 s"), (192, "3 min 12 s"), (7500, "2 h 5 min")]
)
def test_durations_read_naturally(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_parameters_are_said_in_short() -> None:
    params = {
        "train.learning_rate": 3e-5,
        "train.batch_size": 32,
        "train.regularization.kind": "l2_sp",
        "train.regularization.l2_sp.strength": 0.0123,
        "train.frozen_layers": 2,
        "train.schedule": "cosine",
    }
    said = "lr 3e-05, batch 32, l2_sp 0.012, frozen 2, schedule cosine"
    assert short_params(params) == said
    assert short_params({"train.regularization.kind": "none"}) == "no penalty"


def test_facts_are_aligned_and_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    Screen().facts({"a": "x", "longer": "word " * 40})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a       x"
    assert all(len(line) <= 100 for line in lines)
    assert all(line.startswith(" " * 8) for line in lines[2:])
    Screen(quiet=True).say("nothing")
    assert capsys.readouterr().out == ""


def test_counts_agree_with_their_nouns() -> None:
    assert (count(1, "slot"), count(2, "slot"), count(0.5, "GPU")) == (
        "1 slot",
        "2 slots",
        "0.5 GPUs",
    )
