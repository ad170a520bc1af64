"""What was published for each family becomes default ranges and priors that fit a search."""

import math
from typing import Any

import pytest

from sft_ray import space as spaces
from sft_ray.config import Experiment, Train, apply_values
from sft_ray.errors import ConfigError
from sft_ray.recipes import (
    BY_MODEL_TYPE,
    FROZEN_FACTOR,
    RECIPES,
    Recipe,
    default_recipe,
    learning_rate_range,
    prior_of,
    recipe_of,
)
from sft_ray.space import Numeric, Prior
from sft_ray.training.families import FAMILIES


def parsed(path: str, raw: dict[str, Any]) -> Numeric:
    domain = spaces.parse_space({path: raw})[path]
    assert isinstance(domain, Numeric)
    return domain


@pytest.mark.parametrize(
    ("model_type", "millions", "name"),
    [
        ("bert", 86, "bert"),
        ("bert", 304, "bert"),  # nothing else is published for the large one
        ("bert", 10.8, "bert-small"),
        ("bert", 29.999999, "bert-small"),
        ("bert", 30, "bert"),
        ("distilbert", 43, "bert"),
        ("roberta", 86, "roberta"),
        ("roberta", 304, "roberta"),
        ("roberta", 5, "bert-small"),  # its authors say nothing of small ones
        ("xlm-roberta", 86, "roberta"),  # and 192 in its vocabulary
        ("camembert", 86, "roberta"),
        ("mpnet", 86, "roberta"),
        ("electra", 9.7, "electra-small"),
        ("electra", 85, "electra"),
        ("electra", 303, "electra"),
        ("deberta", 100, "deberta"),
        ("deberta-v2", 86, "deberta"),  # of mDeBERTa too, which has 279 with its vocabulary
        ("deberta-v2", 249.999999, "deberta"),
        ("deberta-v2", 250, "deberta-large"),
        ("deberta-v2", 304, "deberta-large"),
        ("modernbert", 110, "modernbert"),
        ("modernbert", 343, "modernbert"),
        ("ernie", 86, "encoder"),
        ("never-heard-of", 343, "encoder"),
        ("never-heard-of", 4, "bert-small"),
    ],
)
def test_a_model_gets_the_recipe_of_its_family_and_size(
    model_type: str, millions: float, name: str
) -> None:
    assert recipe_of(model_type, round(millions * 1e6)) is RECIPES[name]


def test_families_with_a_recipe_are_families_that_can_be_trained() -> None:
    assert set(BY_MODEL_TYPE) <= set(FAMILIES)
    assert set(BY_MODEL_TYPE.values()) <= set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_recipe_is_a_range_with_a_source(recipe: Recipe) -> None:
    assert 1e-6 < recipe.learning_rates[0] < recipe.learning_rates[1] < 1e-3
    assert 1 <= recipe.epochs[0] <= recipe.epochs[1]
    assert recipe.source


@pytest.mark.parametrize(
    ("name", "path", "center", "spread"),
    [
        # The middle of a logarithmic range is its geometric mean; its ends are one deviation off,
        # and a deviation is a factor of 2 at least.
        ("bert", "train.learning_rate", 3.2e-5, 2.0),
        ("electra", "train.learning_rate", 6.7e-5, 2.2),
        ("modernbert", "train.learning_rate", 2.8e-5, 2.8),
        ("bert-small", "train.learning_rate", 9.5e-5, 3.2),
        # The middle of a linear one is the mean; a deviation is an epoch at least.
        ("bert", "train.epochs", 3.0, 1.0),
        ("bert-small", "train.epochs", 4.0, 1.0),
        ("roberta", "train.epochs", 6.5, 3.5),
    ],
)
def test_a_prior_is_centred_in_the_published_range(
    name: str, path: str, center: float, spread: float
) -> None:
    depth = {"frozen_factor": FROZEN_FACTOR} if path == "train.learning_rate" else {}
    assert prior_of(RECIPES[name], path) == {"center": center, "spread": spread, **depth}


def test_a_recipe_has_no_word_on_other_fields() -> None:
    for path in ("train.batch_size", "train.frozen_layers", "train.regularization", "epochs"):
        assert prior_of(RECIPES["bert"], path) is None


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_default_range_is_five_times_wider_at_each_end(recipe: Recipe) -> None:
    low, high = learning_rate_range(recipe)
    assert low == pytest.approx(recipe.learning_rates[0] / 5, rel=0.05)  # two digits
    assert high == pytest.approx(recipe.learning_rates[1] * 5, rel=0.05)
    domain = parsed("train.learning_rate", spaces.default_space(6, recipe)["train.learning_rate"])
    assert (domain.low, domain.high, domain.log) == (low, high, True)
    assert domain.prior is not None
    assert domain.prior.center in domain


@pytest.mark.parametrize("model_type", [*FAMILIES, "never-heard-of"])
@pytest.mark.parametrize("millions", [4, 22, 86, 304])
def test_the_default_recipe_lies_in_the_default_space_of_every_model(
    model_type: str, millions: int
) -> None:
    size = millions * 1_000_000
    space = spaces.parse_space(spaces.default_space(6, recipe_of(model_type, size)))
    known = spaces.domains(space)
    for name, value in spaces.parameters(default_recipe(size)).items():
        if name != "train.warmup":  # fixed by default
            assert value in known[name], name
    assert apply_values(Train(), default_recipe(size)).warmup == 0.06


def test_the_default_recipe_has_two_learning_rates() -> None:
    assert default_recipe(29_999_999)["train.learning_rate"] == 1e-4
    assert default_recipe(30_000_000)["train.learning_rate"] == 2e-5


def test_a_prior_can_be_named() -> None:
    for name, recipe in RECIPES.items():
        rate = parsed("train.learning_rate", {"log_uniform": [1e-6, 1e-3], "prior": name})
        written = prior_of(recipe, "train.learning_rate")
        assert written is not None
        assert rate.prior == Prior(written["center"], written["spread"], FROZEN_FACTOR)
    epochs = parsed("train.epochs", {"int": [1, 10], "prior": "roberta"})
    assert epochs.prior == Prior(6.5, 3.5)


@pytest.mark.parametrize(
    ("path", "raw", "center"),
    [
        ("train.learning_rate", {"log_uniform": [1e-4, 1e-3]}, 1e-4),
        ("train.learning_rate", {"log_uniform": [1e-6, 1e-5]}, 1e-5),
        ("train.epochs", {"int": [5, 8]}, 5),
        ("train.epochs", {"int": [1, 2]}, 2),
    ],
)
def test_a_named_prior_moves_to_the_nearest_value_of_the_range(
    path: str, raw: dict[str, Any], center: float
) -> None:
    prior = parsed(path, {**raw, "prior": "bert"}).prior
    own = prior_of(RECIPES["bert"], path)
    assert prior is not None
    assert own is not None
    assert (prior.center, prior.spread) == (center, own["spread"])


@pytest.mark.parametrize(
    ("path", "domain", "prior", "message"),
    [
        ("train.learning_rate", "log_uniform", "robrta", "no recipe 'robrta'; did you mean 'rob"),
        ("train.learning_rate", "log_uniform", "gpt", "no recipe 'gpt'; known: bert, bert-small,"),
        ("train.warmup", "uniform", "bert", "train.learning_rate and train.epochs only"),
        ("train.learning_rate", "log_uniform", 3, "or the name of a recipe, got 3"),
        ("train.learning_rate", "log_uniform", ["bert"], "or the name of a recipe, got ['bert']"),
    ],
)
def test_a_prior_that_cannot_be_is_refused_in_one_line(
    path: str, domain: str, prior: object, message: str
) -> None:
    space = {path: {domain: [1e-6, 1e-3], "prior": prior}}
    tree = {"name": "x", "model": "m", "data": {"path": "d"}, "search": {"space": space}}
    with pytest.raises(ConfigError) as caught:
        Experiment.from_tree(tree)
    (line,) = caught.value.problems
    assert f"search.space.{path}.prior: " in line
    assert message in line


def test_a_named_prior_is_kept_by_name_in_the_written_experiment() -> None:
    space = {"train.learning_rate": {"log_uniform": [1e-6, 1e-3], "prior": "deberta"}}
    tree = {"name": "x", "model": "m", "data": {"path": "d"}, "search": {"space": space}}
    experiment = Experiment.from_tree(tree)
    assert experiment.to_tree()["search"]["space"] == space
    assert Experiment.from_tree(experiment.to_tree()) == experiment
    prior = spaces.domains(experiment.search.domains)["train.learning_rate"].prior
    assert prior.center == pytest.approx(math.sqrt(1.5e-5 * 4e-5), rel=0.05)
