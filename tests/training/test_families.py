"""Freezing means the same in every family, and training few vocabulary rows changes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from sft_ray.config import Data, Experiment, Regularization
from sft_ray.errors import ConfigError
from sft_ray.serving.predict import load_predictor
from sft_ray.training.data import open_dataset, prepare
from sft_ray.training.examples import Dataset, LabelSet
from sft_ray.training.families import FAMILIES, reads_segments
from sft_ray.training.forward import evaluate
from sft_ray.training.model import Pretrained, load_pretrained
from sft_ray.training.model_facts import inspect_model
from sft_ray.training.preparation import prepare_training
from sft_ray.training.setup import load_setup
from sft_ray.training.world import World
from tests.models import (
    CPU,
    NEVER_IN_TOY_ROWS,
    PAD,
    TASK,
    TOKEN_ID,
    load_tiny,
    run_fit,
    save_tiny,
    tiny_config,
    tiny_model_folder,
    toy_dataset,
    toy_rows,
    write_csv,
)

LAYERS = {"distilbert": "transformer.layer.", "modernbert": "layers."}
ABOVE_THE_LAYERS = ("pooler.", "final_norm.")
DEPTHS = (0, 1, 2, "all")


def below(family: str, depth: int) -> tuple[str, ...]:
    """Prefixes of what `depth` frozen layers freeze, written out by hand."""
    if depth == 0:
        return ()
    feeding = ["embeddings.", "embeddings_project."]
    feeding += ["encoder.rel_embeddings.", "encoder.LayerNorm.", "encoder.conv."]
    feeding += ["encoder.relative_attention_bias."]
    layers = LAYERS.get(family, "encoder.layer.")
    return (*feeding, *(f"{layers}{i}." for i in range(depth)))


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp(family), family)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Dataset:
    """One step of training; the tokenizer, and so the encoding, is the same for all families."""
    return toy_dataset(tmp_path_factory.mktemp("few"), tiny_bert, train=24, validation=24)


@pytest.fixture
def pretrained(folder: Path, few: Dataset) -> Pretrained:
    return load_tiny(folder, few)


def frozen_names(pretrained: Pretrained, family: str, k: int | str) -> set[str]:
    depth = 2 if k == "all" else int(k)
    prefix = pretrained.model.base_model_prefix + "."
    return {
        name
        for name, _ in pretrained.model.named_parameters()
        if name.startswith(prefix) and name.removeprefix(prefix).startswith(below(family, depth))
    }


def logits_of(pretrained: Pretrained, dataset: Dataset) -> np.ndarray:
    return evaluate(pretrained.model, TASK, dataset.validation, PAD, World())


def test_a_model_is_known_before_its_weights_are_read(folder: Path, family: str) -> None:
    facts = inspect_model(str(folder))
    assert (facts.model_type, facts.num_layers) == (family, 2)
    encoder = transformers.AutoModel.from_pretrained(folder)
    assert facts.num_parameters == sum(p.numel() for p in encoder.parameters())


def test_a_model_is_counted_in_the_header_of_its_weights_heads_left_out(
    folder: Path, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transformers.AutoConfig.from_pretrained(folder)
    whole = transformers.AutoModelForTokenClassification.from_config(config)
    whole.save_pretrained(tmp_path / "whole")
    own = sum(p.numel() for p in whole.base_model.parameters())
    words = whole.base_model.get_input_embeddings().weight.numel()
    with monkeypatch.context() as none:
        none.setattr(transformers.AutoModel, "from_config", None)
        facts = inspect_model(str(tmp_path / "whole"))
        assert facts.num_parameters == own
        assert facts.layer_parameters == own - words
    # A configuration of something else is asked itself.
    changed = json.loads((tmp_path / "whole" / "config.json").read_text())
    size = changed["vocab_size"]
    (tmp_path / "whole" / "config.json").write_text(json.dumps(changed | {"vocab_size": 2 * size}))
    again = inspect_model(str(tmp_path / "whole")).num_parameters
    assert again >= own + words  # with the pooler, which a tagger has no use for


def test_a_text_of_the_longest_length_fits_into_the_model(folder: Path, pretrained) -> None:
    longest = inspect_model(str(folder)).max_length
    assert longest >= 78
    input_ids = torch.full((1, longest), TOKEN_ID["cat"])
    with torch.no_grad():
        logits = pretrained.model(input_ids=input_ids, attention_mask=input_ids > 0).logits
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("k", DEPTHS)
def test_exactly_the_trunk_below_k_is_frozen(pretrained, family: str, k: int | str) -> None:
    pretrained.reset(k)
    expected = frozen_names(pretrained, family, k)
    frozen = {n for n, p in pretrained.model.named_parameters() if not p.requires_grad}
    assert frozen == expected
    assert (k == 0) == (not frozen)
    if k in (2, "all"):
        prefix = pretrained.model.base_model_prefix + "."
        left = [n.removeprefix(prefix) for n in pretrained.trainable() if n.startswith(prefix)]
        assert all(name.startswith(ABOVE_THE_LAYERS) for name in left), left


def test_only_trained_weights_are_held_beside_the_pristine_ones(pretrained, few: Dataset) -> None:
    before = {name: weights.clone() for name, weights in pretrained.pristine.items()}
    for k in (2, 0, 1, "all"):
        run_fit(pretrained, few, frozen_layers=k, epochs=1, batch_size=16)
        for name, parameter in pretrained.model.named_parameters():
            shares = parameter.data_ptr() == pretrained.pristine[name].data_ptr()
            assert shares == (not parameter.requires_grad), name
            assert torch.equal(pretrained.pristine[name], before[name]), name


@pytest.mark.parametrize("k", DEPTHS)
def test_frozen_modules_evaluate_while_all_others_train(pretrained, family, k) -> None:
    pretrained.reset(k)
    pretrained.model.eval()
    pretrained.train()
    frozen = tuple(below(family, 2 if k == "all" else int(k)))
    for name, module in pretrained.model.base_model.named_modules():
        if frozen and f"{name}.".startswith(frozen):
            assert not module.training, name
        else:
            assert module.training, name


@pytest.mark.parametrize("k", DEPTHS)
def test_a_step_moves_every_trained_weight_and_no_frozen_one(pretrained, family, few, k) -> None:
    reports = run_fit(
        pretrained,
        few,
        rungs=(),
        frozen_layers=k,
        epochs=1,
        warmup=0.0,
        learning_rate=1e-2,
        regularization=Regularization(kind="l2", strength=1e-3),
    )
    assert [(r.percent, r.step, r.fault) for r in reports] == [(100, 1, None)]
    frozen = frozen_names(pretrained, family, k)
    for name, parameter in pretrained.model.named_parameters():
        unchanged = torch.equal(parameter, pretrained.pristine[name])
        assert unchanged == (name in frozen), name


def test_more_frozen_layers_than_there_are_is_refused(pretrained) -> None:
    with pytest.raises(ConfigError, match=r"the model has 2 layers, got 3 \+ 0"):
        pretrained.reset(3)


def test_leaving_out_unused_vocabulary_rows_changes_no_logit(folder, few) -> None:
    whole, part = load_tiny(folder, few, rows="all"), load_tiny(folder, few)
    sizes = [len(p.model.get_input_embeddings().weight) for p in (whole, part)]
    assert sizes[1] <= sizes[0] - len(NEVER_IN_TOY_ROWS)
    np.testing.assert_allclose(logits_of(part, few), logits_of(whole, few), atol=1e-6, rtol=0)


@pytest.mark.parametrize("k", [0, 1])
def test_a_saved_model_gives_the_same_logits_when_read_back(
    pretrained, folder, few, tmp_path: Path, k: int
) -> None:
    run_fit(pretrained, few, rungs=(), frozen_layers=k, epochs=2, learning_rate=1e-2)
    expected = logits_of(pretrained, few)
    trained = {n: p.detach().clone() for n, p in pretrained.trainable().items()}
    pretrained.reset(0)
    assert np.abs(logits_of(pretrained, few) - expected).max() > 1e-4
    save_tiny(tmp_path, folder, pretrained, few, trained)
    assert not [f.name for f in tmp_path.iterdir() if f.suffix in (".bin", ".pkl", ".pt")]
    back, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert list(back.config.id2label.values()) == list(few.label_names)
    assert back.get_input_embeddings().num_embeddings == len(TOKEN_ID)
    read_back = logits_of(Pretrained(back, frozenset(), None, 0), few)
    np.testing.assert_allclose(read_back, expected, atol=1e-6, rtol=0)


def test_pairs_of_texts_train_in_every_family(folder: Path, tmp_path: Path) -> None:
    second = [text for text, _ in toy_rows(24, seed=2)]
    rows = [(text, second[i], label) for i, (text, label) in enumerate(toy_rows(24, seed=1))]
    file = write_csv(tmp_path / "pairs.csv", rows, ("first", "second", "label"))
    columns = {"text": "first", "text_pair": "second"}
    data = Data(train=str(file), validation=str(file), columns=columns, max_length=40)
    dataset = open_dataset(prepare(data, TASK, str(folder), None, seed=17))
    assert dataset.train.segments is not None
    reports = run_fit(load_tiny(folder, dataset), dataset, rungs=(), epochs=1)
    assert [(r.percent, r.fault) for r in reports] == [(100, None)]


def reload(folder: Path) -> Pretrained:
    return load_pretrained(str(folder), TASK, LabelSet(("a", "b")), seed=1, device=CPU)


def test_a_checkpoint_that_lacks_weights_of_the_encoder_is_refused(folder, tmp_path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    wrapped = {f"module.{name}": tensor for name, tensor in weights.items()}
    save_file(wrapped, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks (\d+) of the encoder's \1 weights"):
        reload(tmp_path)
    save_file(weights, file, metadata={"format": "pt"})
    reload(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vocab_size"] += 8
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"lacks 1 of .*, for example .*embed.*; save the model"):
        reload(tmp_path)


def test_an_encoder_may_come_from_under_any_other_head(folder: Path, tmp_path: Path) -> None:
    for head in ("MaskedLM", "TokenClassification", "QuestionAnswering"):
        auto_model = getattr(transformers, f"AutoModelFor{head}")
        auto_model.from_pretrained(folder).save_pretrained(tmp_path / head)
        depths = reload(tmp_path / head).depths()
        assert max(depths.values()) == 3


def test_a_second_segment_never_reaches_a_model_that_knows_one(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "base", "roberta", type_vocab_size=1)
    rows = [(text, text, label) for text, label in toy_rows(24, seed=1)]
    file = str(write_csv(tmp_path / "pairs.csv", rows, ("text", "text_pair", "label")))
    data = Data(train=file, validation=file, max_length=40)
    experiment = Experiment(name="pairs", model=str(folder), data=data)
    prepared = prepare_training(experiment)
    assert prepared.dataset.train.segments is not None
    setup = load_setup(experiment, prepared.dataset_folder, World())
    assert setup.trunk_cache.dataset is setup.dataset
    outputs = evaluate(setup.pretrained.model, TASK, setup.dataset.validation, PAD, World())
    (tmp_path / "mine").mkdir()
    save_tiny(tmp_path / "mine", folder, setup.pretrained, setup.dataset, {})
    answers = load_predictor(str(tmp_path / "mine")).predict(
        {"text": text, "text_pair": pair} for text, pair, _ in rows
    )
    names = [setup.dataset.label_names[i] for i in outputs.argmax(axis=1)]
    assert [answer["label"] for answer in answers] == names
    assert reads_segments(reload(tiny_model_folder(tmp_path / "bert")).model)


FLAGS = {
    "output_attentions": True,
    "output_hidden_states": True,
    "return_dict": False,
    "chunk_size_feed_forward": 4,
}


def change_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_config_that_asks_for_more_outputs_trains_as_without(folder, few, tmp_path) -> None:
    shutil.copytree(folder, tmp_path / "asks")
    change_config(tmp_path / "asks", **FLAGS)
    losses = []
    for model in (folder, tmp_path / "asks"):
        pretrained = load_tiny(model, few)
        *_, last = run_fit(pretrained, few, rungs=(), epochs=1)
        losses.append((last.train_loss, last.metrics))
    assert losses[0] == losses[1]
    saved = tmp_path / "saved"
    saved.mkdir()
    save_tiny(saved, folder, pretrained, few, last.best.weights)
    back = transformers.AutoModelForSequenceClassification.from_pretrained(saved)
    assert logits_of(Pretrained(back, frozenset(), None, 0), few) == pytest.approx(
        last.best.outputs, abs=1e-6
    )
    rows = [{"text": text} for text, _ in toy_rows(9)]
    answers = list(load_predictor(str(saved)).predict(rows))
    change_config(saved, **FLAGS)  # as a model from elsewhere may have it
    for as_trained in (True, False):
        again = load_predictor(str(saved), as_trained=as_trained).predict(rows)
        assert [answer["label"] for answer in again] == [answer["label"] for answer in answers]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"is_decoder": True}, "configured as a decoder"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantized"),
    ],
)
def test_encoders_that_cannot_be_trained_as_they_are_saved(tmp_path, changes, said) -> None:
    folder = tiny_model_folder(tmp_path)
    change_config(folder, **changes)
    with pytest.raises(ConfigError, match=said):
        inspect_model(str(folder))


def test_deberta_convolution_belongs_to_the_frozen_trunk(tmp_path: Path, few: Dataset) -> None:
    folder = tiny_model_folder(tmp_path, "deberta-v2", conv_kernel_size=3, conv_act="gelu")
    pretrained = load_tiny(folder, few)
    pretrained.reset(1)
    assert any(".encoder.conv." in f".{name}" for name in pretrained.pristine)
    assert not [name for name in pretrained.trainable() if ".conv." in name]


@pytest.mark.parametrize("model_type", ["albert", "gpt2"])
def test_models_without_separate_encoder_layers_are_refused(tmp_path, model_type: str) -> None:
    config = {"albert": tiny_config("albert"), "gpt2": transformers.GPT2Config(n_layer=2)}
    config[model_type].save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as refusal:
        inspect_model(str(tmp_path))
    assert f"{model_type!r}" in str(refusal.value)
    assert ", ".join(FAMILIES) in str(refusal.value)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    tiny_config("bert").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"no weights can be loaded from .*safetensors"):
        load_pretrained(str(tmp_path), TASK, LabelSet(("a", "b")), seed=1, device=CPU)


@pytest.mark.parametrize("changed", ["config.json", "model.safetensors"])
def test_a_folder_is_known_by_its_configuration_and_weights(
    tiny_model: Path, tmp_path: Path, changed: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    first = inspect_model(str(folder)).fingerprint
    assert first == inspect_model(str(tiny_model)).fingerprint
    (folder / "notes.txt").write_text("of no weight")
    (folder / "model-of-another.safetensors").symlink_to(folder / "nowhere")
    assert inspect_model(str(folder)).fingerprint == first
    if changed == "config.json":
        tree = json.loads((folder / changed).read_text())
        (folder / changed).write_text(json.dumps({**tree, "hidden_dropout_prob": 0.3}))
    else:
        weights = load_file(folder / changed)
        save_file({name: -tensor for name, tensor in weights.items()}, folder / changed)
    assert inspect_model(str(folder)).fingerprint not in (None, first)
