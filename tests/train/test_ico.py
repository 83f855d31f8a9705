"""Training of ICO concepts: what learns, what is kept, what is resumed, what is refused."""

from pathlib import Path

import pytest
import torch
from PIL import Image

import engine
from engine.train.ico import SCHEMES, ICOObjective, ICOOptions
from tests.train.test_infusion import _pictures


def _train(sd: engine.Engine, **options) -> engine.Concept:
    settings = {"steps": 4, "batch_size": 2, "progress": False} | options
    return engine.train_ico(sd, settings.pop("images", _pictures()), "cat", **settings)


def _objective(sd: engine.Engine, **changes) -> ICOObjective:
    return ICOObjective(sd, _pictures(), "cat", ICOOptions(**({"batch_size": 3} | changes)))


@pytest.mark.parametrize("train_kv", [True, False])
def test_only_text_side_data_learns(small: engine.Engine, train_kv: bool) -> None:
    before = {name: weight.clone() for name, weight in small.unet.state_dict().items()}
    text = {name: weight.clone() for name, weight in small.text_encoder.model.state_dict().items()}
    objective = _objective(small, train_kv=train_kv)
    objective.loss(0).backward()
    for name, parameter in objective.parameters.items():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    assert all(p.grad is None for p in objective.unet.parameters())
    assert all(p.grad is None for p in small.text_encoder.model.parameters())
    rates = {"learning_rate": 0.02, "context_learning_rate": 0.02}
    concept = _train(small, steps=30, batch_size=3, train_kv=train_kv, **rates)
    assert all(torch.equal(weight, before[name]) for name, weight in small.unet.state_dict().items())
    assert all(torch.equal(weight, text[name]) for name, weight in small.text_encoder.model.state_dict().items())
    assert len(concept.changes) == (2 * len(small.unet.cross_attentions) if train_kv else 0)
    trained, untrained, parts = objective, _objective(small, train_kv=train_kv), range(50, 60)
    with torch.no_grad():
        trained.parameters["tokens"].copy_(concept.tokens)
        for name, change in concept.changes.items():
            trained.parameters[name].copy_(change.up)
        if train_kv:  # three random tokens alone can do little to this small a model
            assert sum(trained.loss(part) for part in parts) < sum(untrained.loss(part) for part in parts)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_prompts_of_pictures(small: engine.Engine, scheme: str) -> None:
    n_before, n_after, n_tokens = SCHEMES[scheme]
    objective = _objective(small, scheme=scheme)
    text = small.text_encoder
    tokens = [objective._prompt(i) for i in range(3)]
    learned = [at for at, _ in tokens[0].learned]
    noun = n_before + n_tokens + 1
    assert learned == [i for i in range(1, n_before + n_tokens + n_after + 2) if i != noun]
    assert tokens[0].ids[noun] == text.tokenize("cat").ids[1]
    words = ["a photo of a", "a"][n_before == 1]
    start = text.model.get_input_embeddings().weight[list(text.tokenize(words).ids[1 : 1 + n_before])]
    assert torch.equal(objective.parameters["before"][0], start)
    assert len({tuple(vector.tolist()) for vector in objective.parameters["tokens"]}) == n_tokens  # distinct
    with torch.no_grad():
        objective.parameters["before"][1] += 1
        contexts = text.transform([objective._prompt(i) for i in range(3)])
    assert torch.equal(contexts[0], contexts[2])
    assert not torch.equal(contexts[0], contexts[1])


def test_tokens_can_start_from_words(small: engine.Engine) -> None:
    concept = _train(small, steps=1, initial_tokens="red cat red", learning_rate=0.0, context_learning_rate=0.0)
    ids = small.text_encoder.tokenize("red cat red").ids[1:4]
    assert torch.equal(concept.tokens, small.text_encoder.model.get_input_embeddings().weight[list(ids)])
    with pytest.raises(ValueError, match="initial_tokens must be words of 3 tokens in all, got 'red', 1 tokens"):
        _train(small, initial_tokens="red")


def test_an_untrained_concept_with_words_is_the_model(small: engine.Engine) -> None:
    concept = _train(small, steps=1, initial_tokens="red cat red", learning_rate=0.0)
    options = {"steps": 2, "seed": 0, "output": "latent", "progress": False}
    custom = small.generate("a V* cat", customization=engine.ICO([concept]), **options).latents
    assert torch.equal(custom, small.generate("a red cat red cat", **options).latents)


def test_a_run_that_was_stopped_goes_on_to_the_bit(small: engine.Engine, tmp_path: Path) -> None:
    whole = _train(small, steps=6, prior_images=2)
    for stop in (1, 3):
        options = {"folder": tmp_path, "sample_every": 0, "prior_images": 2}
        _train(small, steps=6, callback=lambda step, total, loss, at=stop: step != at, **options)
    resumed = _train(small, steps=6, folder=tmp_path, sample_every=3, prior_images=2)
    assert torch.equal(resumed.tokens, whole.tokens)
    assert all(torch.equal(resumed.changes[name].up, change.up) for name, change in whole.changes.items())
    assert Image.open(tmp_path / "sample-000006.png").size == (4 * 16, 2 * 16)
    with pytest.raises(ValueError, match=r"written with scheme='dci'"):
        _train(small, steps=8, folder=tmp_path, scheme="ico", prior_images=2)


def test_class_pictures_add_their_own_loss(small: engine.Engine) -> None:
    plain = _objective(small)
    prior, twice = _objective(small, prior_images=2), _objective(small, prior_images=2, prior_weight=2.0)
    assert prior.prior is not None
    assert prior.prior.shape == (2, 4, 8, 8)
    assert plain.prior is None
    assert twice.loss(0) > prior.loss(0) > 0


def test_checkpointing_changes_nothing(small: engine.Engine) -> None:
    plain, recomputed = _train(small), _train(small, gradient_checkpointing=True)
    torch.testing.assert_close(recomputed.tokens, plain.tokens)
    for name, change in plain.changes.items():
        torch.testing.assert_close(recomputed.changes[name].up, change.up)


def test_bad_arguments_are_refused(small: engine.Engine) -> None:
    for options, message in (
        ({"scheme": "long"}, "scheme must be one of ico, dci, got 'long'"),
        ({"prior_images": -1}, "prior_images must be an integer >= 0"),
        ({"placeholder": "a b"}, "placeholder must be a text without spaces"),
        ({"sample_prompts": ["x"]}, "sample_prompts needs a folder"),
        ({"context_learning_rate": float("nan")}, "context_learning_rate must be a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            _train(small, **options)
    with pytest.raises(ValueError, match=r"sample_prompts must contain 'V\*', got 'a cat'"):
        _objective(small, sample_prompts=["a cat"], folder="runs")


def test_a_loss_that_is_not_finite_stops(small: engine.Engine, tmp_path: Path) -> None:
    rates = {"learning_rate": 1e36, "context_learning_rate": 1e36}
    with pytest.raises(engine.NonFiniteError, match=f"infinite at step .* the last good state is in {tmp_path}"):
        _train(small, **rates, folder=tmp_path, checkpoint_every=1, sample_every=0)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert all(torch.isfinite(parameter).all() for parameter in state["parameters"].values())


@pytest.mark.parametrize(("scheme", "sizes"), [("ico", (4, 2, 2)), ("dci", (1, 1, 3))])
def test_schemes_have_the_papers_sizes(small: engine.Engine, scheme: str, sizes: tuple[int, int, int]) -> None:
    parameters = _objective(small, scheme=scheme).parameters
    assert (parameters["before"].shape[1], parameters["after"].shape[1], len(parameters["tokens"])) == sizes


def test_tokens_start_as_rare_words_of_the_vocabulary(small: engine.Engine) -> None:
    text = small.text_encoder
    weight = text.model.get_input_embeddings().weight
    special = set(text.tokenizer.all_special_ids)
    names = {i: token for token, i in text.tokenizer.get_vocab().items()}
    found = set()
    for seed in range(12):
        for vector in _objective(small, seed=seed, scheme="dci").parameters["tokens"].detach():
            (token,) = (weight == vector).all(dim=1).nonzero().flatten().tolist()
            found.add(token)
    assert len(found) > 3
    assert all(names[i].endswith("</w>") and i not in special for i in found)


def test_defaults_are_the_papers() -> None:
    options = ICOOptions()
    assert (options.steps, options.batch_size, options.accumulation_steps) == (900, 6, 1)
    assert (options.learning_rate, options.context_learning_rate, options.prior_weight) == (6e-5, 6e-4, 1.0)
