"""LoRAs and learned tokens of a pipeline: which are loaded, which act, and the Engine and customisations they make."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..engine import Engine
from ..methods.concept import Concept
from ..methods.foreign import import_textual_inversion
from ..methods.ico import ICO
from ..methods.lora import LoRA
from ..text.words import word_pattern


@dataclass(slots=True)
class LoRAs:
    """LoRAs by their names, with diffusers' rules: what is loaded last acts alone, until ``choose`` says otherwise.

    Attributes:
        files: by adapter name.
        active: the weight of each that acts.
        fused: those that act whatever is chosen, with their weights.
        enabled: whether the active ones act.
    """

    files: dict[str, Path] = field(default_factory=dict)
    active: dict[str, float] = field(default_factory=dict)
    fused: dict[str, float] = field(default_factory=dict)
    enabled: bool = True
    _made: tuple[Any, Engine] | None = None

    def load(self, path: str | Path, weight_name: str | None, name: str | None) -> None:
        file = Path(path) if weight_name is None else Path(path) / weight_name
        name = f"default_{len(self.files)}" if name is None else name
        if name in self.files:
            raise ValueError(f"adapter_name must be a new one, got {name!r}, which is loaded already")
        self.files[name], self.active = Path(LoRA(file).path), {name: 1.0}

    def choose(self, names: str | Sequence[str], weights: float | Sequence[float | None] | None) -> None:
        wanted = [names] if isinstance(names, str) else list(names)
        factors: list[Any] = list(weights) if isinstance(weights, list | tuple) else [weights] * len(wanted)
        if len(factors) != len(wanted):
            raise ValueError(
                f"adapter_weights must be one number or one per adapter ({len(wanted)}), got {len(factors)}"
            )
        self._check_known(wanted)
        self.active = {
            name: 1.0 if factor is None else float(factor) for name, factor in zip(wanted, factors, strict=True)
        }

    def fuse(self, scale: float, names: Sequence[str] | None) -> None:
        wanted = list(self.active) if names is None else list(names)
        self._check_known(wanted)
        if not wanted:
            raise ValueError("fuse_lora needs a LoRA: call load_lora_weights first, got none")
        for name in wanted:
            self.fused[name] = scale * self.active.get(name, 1.0)
            if name in self.active:  # which stays so where it is unfused, as in diffusers
                self.active[name] = self.fused[name]

    def unload(self) -> None:
        """Take away what is not fused."""
        self.files = {name: file for name, file in self.files.items() if name in self.fused}
        self.active = {}

    def engine(self, base: Engine, scale: float) -> Engine:
        """The Engine with what acts; ``scale`` is a factor on what is not fused. The last one made is kept."""
        weights = dict(self.fused)
        for name, factor in self.active.items() if self.enabled else ():
            if name not in self.fused:  # whose layers are merged, and do not act a second time
                weights[name] = factor * scale
        weights = {name: factor for name, factor in weights.items() if factor}
        if not weights:
            return base
        key = (id(base), tuple(weights.items()), tuple(self.files[name] for name in weights))
        if self._made is None or self._made[0] != key:
            self._made = key, base.with_loras([LoRA(self.files[name], factor) for name, factor in weights.items()])
        return self._made[1]

    def _check_known(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.files:
                raise ValueError(f"adapter names must be of loaded LoRAs ({', '.join(self.files)}), got {name!r}")


@dataclass(slots=True)
class LearnedTokens:
    """Textual inversions by the token that prompts write for them."""

    concepts: dict[str, Concept] = field(default_factory=dict)

    def load(self, path: str | Path, token: str | None, weight_name: str | None) -> None:
        file = Path(path) if weight_name is None else Path(path) / weight_name
        if file.is_dir():
            found = sorted(file.glob("*.safetensors"))
            if len(found) != 1:
                raise ValueError(f"{file}: give weight_name for a folder with {len(found)} .safetensors files")
            (file,) = found
        concept = import_textual_inversion(file, placeholder=token)
        if concept.placeholder in self.concepts:
            raise ValueError(f"token must be a new one, got {concept.placeholder!r}, which is loaded already")
        self.concepts[concept.placeholder] = concept

    def customizations(self, prompts: Sequence[str], negatives: Sequence[str]) -> list[ICO | None] | None:
        """What each prompt's tokens make of it; None where no prompt has any."""
        made = [self._of(*pair) for pair in zip(prompts, negatives, strict=True)]
        return made if any(one is not None for one in made) else None

    def _of(self, prompt: str, negative: str) -> ICO | None:
        there = [concept for token, concept in self.concepts.items() if _has(prompt, token)]
        for token in self.concepts:
            if _has(negative, token) and not _has(prompt, token):
                rule = "a learned token of the negative prompt must be in the prompt, too"
                raise ValueError(f"{rule}; for others use engine.load(embeddings=), got {token!r}")
        return ICO(there) if there else None


def _has(text: str, token: str) -> bool:
    return re.search(word_pattern(token), text, re.IGNORECASE) is not None


def lora_scale(cross_attention_kwargs: Mapping[str, Any] | None) -> float:
    """The factor on LoRAs that a call asks for; raises ``ValueError`` for anything else it asks."""
    given = dict(cross_attention_kwargs or {})
    scale = given.pop("scale", 1.0)
    if given:
        rule = "cross_attention_kwargs must hold scale alone, the factor on LoRAs"
        raise ValueError(f"{rule}: attention is not to be exchanged here, got {', '.join(given)}")
    return float(scale)
