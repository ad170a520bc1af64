"""How the authors of encoder families fine-tune them: the source of default spaces and priors.

Ranges are those the publications searched or recommend for GLUE-like tasks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

YARDSTICK = "default recipe"  # role of the trial that every other is measured against
# Of layers, see `ModelFacts.layer_parameters`: MiniLM's twelve have 21 M, DistilBERT's 43 M, a base
# size 85 M, a large one 303 M.
SMALL_LAYER_PARAMETERS = 30_000_000
LARGE_LAYER_PARAMETERS = 250_000_000
WIDENING = 5.0  # a default range is this factor wider than the published one, at each end
LEAST_SPREAD = 2.0  # factor; a published range may be a single point
# How much higher the best learning rate is with all layers frozen than with none; from our own
# recorded runs (benchmarks/RESULTS.md).
FROZEN_FACTOR = 2.5


@dataclass(frozen=True)
class Recipe:
    """What was published for a family and size.

    Attributes:
        learning_rates: lowest and highest.
        epochs: fewest and most.
    """

    learning_rates: tuple[float, float]
    epochs: tuple[int, int]
    source: str


RECIPES = {
    "bert": Recipe((2e-5, 5e-5), (2, 4), "Devlin et al. 2019, appendix A.3"),
    "bert-small": Recipe((3e-5, 3e-4), (4, 4), "Turc et al. 2019, BERT miniatures"),
    "minilm": Recipe((2e-5, 5e-5), (3, 5), "Wang et al. 2020, appendix B"),
    "roberta": Recipe((1e-5, 3e-5), (3, 10), "Liu et al. 2019, section 5.1 and table 10"),
    "electra": Recipe((3e-5, 1.5e-4), (3, 10), "Clark et al. 2020, appendix B"),
    "electra-small": Recipe((1e-4, 3e-4), (3, 10), "Clark et al. 2020, appendix B"),
    "deberta": Recipe((1.5e-5, 4e-5), (3, 8), "He et al. 2021, appendix, and their GLUE scripts"),
    "deberta-large": Recipe((5e-6, 1e-5), (2, 8), "He et al. 2021, appendix, GLUE scripts"),
    "modernbert": Recipe((1e-5, 8e-5), (1, 10), "Warner et al. 2024, appendix E.1"),
    "encoder": Recipe((1e-5, 5e-5), (2, 4), "RoBERTa's lowest to BERT's highest; BERT's epochs"),
}
BY_MODEL_TYPE = {
    "bert": "bert",
    "distilbert": "bert",
    "roberta": "roberta",
    "xlm-roberta": "roberta",
    "camembert": "roberta",
    "mpnet": "roberta",
    "electra": "electra",
    "deberta": "deberta",
    "deberta-v2": "deberta",
    "modernbert": "modernbert",
}


def recipe_of(model_type: str, layer_parameters: int) -> Recipe:
    """The recipe of a family, in the model's size where its authors tell sizes apart.

    Small encoders whose family says nothing of them take what was published for small BERTs.
    """
    family = BY_MODEL_TYPE.get(model_type, "encoder")
    size = ""
    if layer_parameters < SMALL_LAYER_PARAMETERS:
        size = "-small"
    elif layer_parameters >= LARGE_LAYER_PARAMETERS:
        size = "-large"
    known = RECIPES.get(family + size)
    if known is None and size == "-small":
        known = RECIPES["bert-small"]
    return known or RECIPES[family]


def prior_of(recipe: Recipe, path: str) -> dict[str, float] | None:
    """Middle and standard deviation of a searched field; None if the recipe is silent on it."""
    if path == "train.learning_rate":
        low, high = recipe.learning_rates
        spread = max(LEAST_SPREAD, math.sqrt(high / low))
        return {
            "center": _rounded(math.sqrt(low * high)),
            "spread": _rounded(spread),
            "frozen_factor": FROZEN_FACTOR,
        }
    if path == "train.epochs":
        low, high = recipe.epochs
        return {"center": (low + high) / 2, "spread": max(1.0, (high - low) / 2)}
    return None


def learning_rate_range(recipe: Recipe) -> list[float]:
    """The published range, widened."""
    low, high = recipe.learning_rates
    return [_rounded(low / WIDENING), _rounded(high * WIDENING)]


def default_recipe(layer_parameters: int) -> dict[str, Any]:
    """The published recipe for encoders: the yardstick every search is measured against.

    Devlin et al. 2019 (2e-5, 3 epochs, batch 32, weight decay 0.01) with the warm-up of Liu et
    al. 2019 (0.06); small encoders use 1e-4, which is in the middle of Turc et al. 2019.
    """
    return {
        "train.learning_rate": 1e-4 if layer_parameters < SMALL_LAYER_PARAMETERS else 2e-5,
        "train.epochs": 3,
        "train.batch_size": 32,
        "train.warmup": 0.06,
        "train.regularization": {"kind": "weight_decay", "strength": 0.01},
        "train.frozen_layers": 0,
    }


def _rounded(value: float) -> float:
    return float(f"{value:.2g}")
