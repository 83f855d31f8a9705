"""Tokens, spans, truncation and weights."""

import threading
from pathlib import Path

import pytest
import torch

import engine
from engine.text.encoder import TextEncoder


def test_tokens_and_spans(small: engine.Engine) -> None:
    tokens = small.text_encoder.tokenize("a (red:1.5) cat, zebra")
    tokenizer = small.text_encoder.tokenizer
    assert tokens.text == "a red cat, zebra"
    assert len(tokens.ids) == len(tokens.weights) == 77
    assert tokens.ids[0] == tokenizer.bos_token_id
    assert tokens.ids[len(tokens.spans) + 1 :] == (tokenizer.eos_token_id,) * (76 - len(tokens.spans))
    words = [tokens.text[start:end] for start, end in tokens.spans]
    assert words[:4] == ["a", "red", "cat", ","]
    assert "".join(words[4:]) == "zebra"
    assert [w for w in tokens.weights if w != 1.0] == [1.5]
    assert tokens.weights[2] == 1.5
    assert tokens.cut_off == ""


def test_what_is_cut_off_is_quoted(small: engine.Engine) -> None:
    prompt = "red " * 75 + "blue cat"
    assert small.text_encoder.tokenize(prompt, long_prompts="truncate").cut_off == "blue cat"
    with pytest.warns(UserWarning, match="77 tokens; this part was cut off: 'blue cat'"):
        small.encode_prompt([prompt], long_prompts="truncate")
    assert small.text_encoder.tokenize("red " * 75, long_prompts="truncate").cut_off == ""


_WEIGHTED = ["a red cat", "a (red:1.5) cat", "a (red:1.0) cat", ""]


def test_comfyui_moves_tokens_away_from_the_empty_prompt(small: engine.Engine) -> None:
    plain, weighted, neutral, empty = small.encode_prompt(_WEIGHTED, weighting="comfyui")
    assert torch.equal(neutral, plain)
    torch.testing.assert_close(weighted[2], empty[2] + 1.5 * (plain[2] - empty[2]))
    others = [i for i in range(77) if i != 2]
    assert torch.equal(weighted[others], plain[others])


def test_a1111_scales_tokens_and_restores_the_mean() -> None:
    """On a model whose embeddings have a mean, as CLIP's do; a neutral row beside it stays as it is."""
    sd = engine.load()
    plain, weighted, neutral, _ = sd.encode_prompt(_WEIGHTED)
    assert torch.equal(neutral, plain)
    assert torch.equal(weighted, sd.encode_prompt(_WEIGHTED, weighting="a1111")[1])
    scaled = plain.clone()
    scaled[2] *= 1.5
    torch.testing.assert_close(weighted, scaled * (plain.mean() / scaled.mean()))
    torch.testing.assert_close(weighted.mean(), plain.mean())
    assert not torch.allclose(weighted, scaled)


def test_a1111_where_there_is_no_mean(small: engine.Engine) -> None:
    """A last layer norm without a bias leaves none: then there is nothing to restore."""
    plain, weighted, *_ = small.encode_prompt(_WEIGHTED)
    assert plain.mean().abs() < 1e-6
    torch.testing.assert_close(weighted[2], 1.5 * plain[2])
    torch.testing.assert_close(weighted[3:], plain[3:])


def test_weights_act_chunk_by_chunk() -> None:
    """As A1111's do: the mean that is restored is a chunk's."""
    sd = engine.load()
    plain, weighted = sd.encode_prompt(["a red cat BREAK a blue boat", "a (red:1.5) cat BREAK a blue boat"])
    torch.testing.assert_close(weighted[:77], sd.encode_prompt("a (red:1.5) cat")[0])
    assert torch.equal(weighted[77:], plain[77:])
    moved = sd.encode_prompt("a red cat BREAK a (blue:1.5) boat", weighting="comfyui")[0]
    torch.testing.assert_close(moved[77:], sd.encode_prompt("a (blue:1.5) boat", weighting="comfyui")[0])
    torch.testing.assert_close(moved[:77], plain[:77])


def test_shorter_prompts_are_filled_with_empty_chunks(small: engine.Engine) -> None:
    context = small.encode_prompt(["a cat", "a cat BREAK a boat"])
    assert context.shape == (2, 154, 32)
    torch.testing.assert_close(context[0, 77:], small.encode_prompt("")[0])
    torch.testing.assert_close(context[:, :77], small.encode_prompt(["a cat"]).expand(2, -1, -1))


def test_clip_skip_must_leave_a_layer(small: engine.Engine) -> None:
    for call in (
        lambda: small.generate("a cat", clip_skip=2, steps=1),
        lambda: small.encode_prompt("a cat", clip_skip=2),
    ):
        with pytest.raises(ValueError, match="clip_skip must leave one of the text encoder's 2 layers, got 2"):
            call()
    with pytest.raises(ValueError, match="clip_skip must be an integer >= 0, got -1"):
        small.generate("a cat", clip_skip=-1)


def test_an_unknown_rule_is_refused(small: engine.Engine) -> None:
    with pytest.raises(ValueError, match="weighting must be one of a1111, comfyui, got 'compel'"):
        small.generate("a cat", weighting="compel")


def test_threads_share_the_tokenizer(small: engine.Engine) -> None:
    results: dict[int, tuple[int, ...]] = {}

    def work(i: int) -> None:
        for _ in range(30):
            results[i] = small.text_encoder.tokenize("a red cat " * (1 + i)).ids

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: small.text_encoder.tokenize("a red cat " * (1 + i)).ids for i in range(4)}


@pytest.mark.parametrize(("beyond", "fits"), [(-1, True), (0, False)])
def test_the_end_token_must_have_an_embedding(small_folder: Path, beyond: int, fits: bool) -> None:
    """However few tokens the tokenizer counts: its end token may stand behind them."""
    model = engine.load(small_folder).text_encoder.model

    class Tokenizer:
        bos_token_id, pad_token_id, eos_token_id = 0, 0, model.config.vocab_size + beyond

        def __len__(self) -> int:
            return 4

        def __call__(self, _text: str, **_options) -> dict:
            return {"input_ids": [], "offset_mapping": []}

    encoder = TextEncoder(Tokenizer(), model)
    if fits:
        assert encoder.tokenize("").ids[1] == model.config.vocab_size - 1
    else:
        with pytest.raises(ValueError, match="the tokenizer's ids must fit the text encoder's"):
            encoder.tokenize("")
