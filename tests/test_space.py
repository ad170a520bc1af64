import math
import random
from collections import Counter

import pytest

from sft_ray import space as spaces
from sft_ray.config import Train, apply_values
from sft_ray.errors import ConfigError
from sft_ray.recipes import RECIPES
from sft_ray.space import Choice, Numeric, OneOf

REGULARIZATION = {
    "one_of": [{"kind": "none"}, {"kind": "l2_sp", "strength": {"log_uniform": [1e-5, 1e-1]}}]
}


def test_every_kind_of_domain_parses() -> None:
    space = spaces.parse_space(
        {
            "train.learning_rate": {
                "log_uniform": [1e-6, 1e-3],
                "prior": {"center": 2e-5, "spread": 3},
            },
            "train.warmup": {"uniform": [0, 0.2]},
            "train.epochs": {"int": [1, 5]},
            "train.batch_size": {"log_int": [8, 64]},
            "train.schedule": {"choice": ["linear", "cosine"]},
            "train.regularization": REGULARIZATION,
            "train.frozen_layers": 2,
        }
    )
    assert space["train.learning_rate"] == Numeric(
        1e-6, 1e-3, log=True, prior=spaces.Prior(2e-5, 3)
    )
    assert space["train.batch_size"] == Numeric(8, 64, log=True, integer=True)
    assert space["train.schedule"] == Choice(("linear", "cosine"))
    assert isinstance(space["train.regularization"], OneOf)
    assert space["train.frozen_layers"] == 2


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"log_unifrm": [1, 2]}, "did you mean 'log_uniform'"),
        ({"int": [3, 1]}, "`low <= high` must hold"),
        ({"log_uniform": [0, 1]}, "low end above 0"),
        ({"int": [1, 2.5]}, "whole numbers"),
        ({"uniform": [1]}, "two numbers"),
        ({"uniform": ["a", "b"]}, "two numbers"),
        ({"uniform": [0, math.inf]}, "two numbers"),
        ({"choice": []}, "at least one value"),
        ({"choice": [[1]]}, "plain values"),
        ({"one_of": [{"strength": 1}]}, "needs a `kind`"),
        ({"one_of": [{"kind": "a"}, {"kind": "a"}]}, "stands twice"),
        ({"uniform": [0, 1], "int": [0, 1]}, "a domain is one of"),
        ({"choice": [1], "prior": {"center": 1, "spread": 2}}, "a prior needs a range"),
        (
            {"uniform": [1, 2], "prior": {"center": 1, "spread": 1, "frozen_factor": 2}},
            "logarithmic range",
        ),
        ({"log_uniform": [1, 2], "prior": {"center": 1}}, "needs center and spread"),
        ({"log_uniform": [1, 2], "prior": {"center": 1, "spread": 0.5}}, "spread > 1"),
        ({"log_uniform": [1, 2], "prior": {"center": 5, "spread": 2}}, "within the range"),
    ],
)
def test_a_malformed_domain_says_what_it_needs(raw: object, message: str) -> None:
    with pytest.raises(ConfigError, match=r"search\.space\.train\.x") as caught:
        spaces.parse_space({"train.x": raw})
    assert message in str(caught.value)


def test_conditional_draws_name_their_fields_by_kind() -> None:
    space = spaces.parse_space({"train.regularization": REGULARIZATION})
    rng = random.Random(0)
    asked: Counter[str] = Counter()

    def suggest(name: str, domain: Numeric | Choice) -> object:
        asked[name] += 1
        return rng.choice(domain.options) if isinstance(domain, Choice) else domain.high

    draws = [spaces.draw(space, suggest)["train.regularization"] for _ in range(50)]
    assert {d["kind"] for d in draws} == {"none", "l2_sp"}
    assert all(("strength" in d) == (d["kind"] == "l2_sp") for d in draws)
    assert asked["train.regularization.kind"] == 50
    assert asked["train.regularization.l2_sp.strength"] == sum(d["kind"] == "l2_sp" for d in draws)
    assert spaces.parameters({"train.regularization": {"kind": "l2_sp", "strength": 0.1}}) == {
        "train.regularization.kind": "l2_sp",
        "train.regularization.l2_sp.strength": 0.1,
    }


def test_a_fixed_kind_can_have_a_searched_strength() -> None:
    raw = {"train.regularization": {"kind": "weight_decay", "strength": {"uniform": [0, 0.1]}}}
    space = spaces.parse_space(raw)
    assert spaces.domains(space)["train.regularization.weight_decay.strength"] == Numeric(0, 0.1)


def test_each_regularisation_kind_has_a_default_range() -> None:
    kinds = ["weight_decay", "l1", "l2", "l2_sp"]
    raw = {"train.regularization": {"one_of": [{"kind": kind} for kind in kinds]}}
    found = spaces.domains(spaces.parse_space(raw))
    ranges = [found[f"train.regularization.{kind}.strength"] for kind in kinds]
    assert len(set(ranges)) == 4
    assert all(isinstance(r, Numeric) and r.log for r in ranges)


@pytest.mark.parametrize("layers", [2, 6, 12, 24])
def test_the_default_space_covers_all_five_dimensions(layers: int) -> None:
    space = spaces.parse_space(spaces.default_space(layers, RECIPES["bert"]))
    assert set(space) == {
        "train.learning_rate",
        "train.batch_size",
        "train.epochs",
        "train.regularization",
        "train.frozen_layers",
    }
    assert space["train.frozen_layers"] == Numeric(0, layers, integer=True)
    assert space["train.learning_rate"].low == 4e-6
    for path, value in spaces.boundary_values(space):
        assert apply_values(Train(), {path: value}) is not None


def test_membership_respects_types_and_both_ends() -> None:
    assert 1 in Numeric(1, 3, integer=True)
    assert 3 in Numeric(1, 3, integer=True)
    assert 2.5 not in Numeric(1, 3, integer=True)
    assert True not in Numeric(0, 1)
    assert "16" not in Choice((16, 32))
    assert 16 in Choice((16, 32))
    assert 0.0 in Choice((0, 0.06))
    assert 1 in Choice((0.5, 1.0))
    assert True not in Choice((0, 1))
    assert 1 not in Choice((True, False))


def test_what_is_no_kind_stays_one_parameter() -> None:
    weights = {"neg": 1.0, "pos": 2.0}
    values = {"train.class_weights": weights, "train.regularization": {"kind": "none"}}
    assert spaces.parameters(values) == {
        "train.class_weights": weights,
        "train.regularization.kind": "none",
    }
    assert spaces.parameters({"train.class_weights": {"kind": 2.0}}) == {
        "train.class_weights": {"kind": 2.0}
    }
