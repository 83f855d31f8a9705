"""Make the tinyworld's CLIP tokenizer: ``python -m benchmarks.tinyworld.make_tokenizer --out FOLDER``.

Byte-level BPE in CLIP's format, with merges learned from captions. Every byte is in the vocabulary, so that any text
can be spelled; the grammar's words are one token each, which the script checks.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers, trainers
from transformers import CLIPTokenizer

from benchmarks.tinyworld.captions import VOCABULARY_WORDS, caption
from benchmarks.tinyworld.data import scene_at

_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"


def make_tokenizer(vocabulary_size: int = 1000, captions: int = 4000) -> CLIPTokenizer:
    """Learn merges from captions and lay the vocabulary out as CLIP does: bytes, bytes at a word's end, merges."""
    rng = random.Random(0)
    texts = [caption(scene_at(index), rng) for index in range(captions)] + [" ".join(VOCABULARY_WORDS)] * 50
    learner = CLIPTokenizer().backend_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - 2,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    merges: list[Any] = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    pieces = [*alphabet, *(f"{byte}</w>" for byte in alphabet)]
    pieces += [piece for piece in ("".join(pair) for pair in merges) if piece not in pieces]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, _BEGIN, _END])}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)
    for word in VOCABULARY_WORDS:
        if len(tokenizer(word, add_special_tokens=False)["input_ids"]) != 1:
            raise RuntimeError(f"{word!r} is not one token; raise vocabulary_size above {vocabulary_size}")
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(arguments.out)
    print(f"{len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
