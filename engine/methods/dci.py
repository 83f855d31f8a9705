"""DCI: a concept's own branch and an auxiliary branch, mixed where each attends (ECCV 2024)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

from ..checks import check_choice, check_flag, check_number
from ..text.encoder import Tokens
from ..text.weighting import WeightedPrompt
from ..text.words import find_phrase, word_pattern
from .concept import Concept, check_concepts
from .concept_cache import Text, Texts

PRESETS: dict[str, tuple[float, float, float]] = {  # tau_t, tau_s, gain
    "calibrated": (10.0, 10.0, 500.0),
    "paper": (1.0, 1.0, 1.0),
}
# The first noun of the concept's own category that is not the concept's stands in for it in the auxiliary branch. The
# categories hold the subjects of both papers' data (DreamBooth's and Custom Diffusion's) and what lies beside them.
AUXILIARY_NOUNS: dict[str, tuple[str, ...]] = {
    "animal": (
        *("dog", "cat", "bear", "duck", "horse", "rabbit", "bird", "lion", "fox", "tiger", "wolf", "panda", "corgi"),
        *("puppy", "kitten", "tortoise", "turtle", "hamster", "cow", "sheep", "pig", "elephant", "monkey", "owl"),
        *("penguin", "fish", "frog", "goat", "deer", "zebra", "giraffe", "dragon", "dinosaur", "chicken", "squirrel"),
    ),
    "person": ("woman", "man", "girl", "boy", "person", "child", "lady", "gentleman", "baby"),
    "toy": (
        "toy",
        "plushie",
        "plushy",
        "doll",
        "stuffed animal",
        "teddy bear",
        "teddybear",
        "action figure",
        "robot",
        "puppet",
    ),
    "vessel": ("mug", "teapot", "cup", "bowl", "vase", "can", "bottle", "pot", "jar", "kettle", "glass", "plate"),
    "bag": ("backpack", "handbag", "suitcase", "bag", "purse", "basket"),
    "clothing": ("shoe", "boot", "sneaker", "hat", "shirt", "jacket", "dress", "coat", "scarf", "glove", "sock"),
    "eyewear": ("glasses", "sunglasses", "goggles"),
    "vehicle": ("car", "boat", "truck", "bicycle", "bus", "motorcycle", "train", "airplane", "ship", "bike", "van"),
    "building": ("house", "barn", "castle", "church", "tower", "temple", "cabin", "lighthouse"),
    "plant": ("tree", "flower", "cactus", "bush", "plant", "rose", "mushroom"),
    "furniture": ("chair", "table", "sofa", "bed", "lamp", "desk", "bench", "stool", "cabinet", "candle", "clock"),
    "instrument": ("guitar", "violin", "piano", "drum", "trumpet"),
    "food": ("cake", "bread", "pizza", "apple", "burger", "sandwich", "cookie", "berry", "banana"),
    "drawing": ("cartoon", "painting", "statue", "sculpture", "logo"),
}


@dataclass(frozen=True, slots=True)
class DCI:
    """Draw with two branches in the first steps: the prompt, and the prompt with another noun in the concept's place.

    Attributes:
        concept_or_noun: a class noun, as the prompt spells it, drawn with the model's own weights; an ICO concept,
            whose placeholder (and, behind it, its noun) the prompt has; or several, of which the first has the two
            branches and all lend their tokens, keys and values to both.
        auxiliary_noun: what takes its place; chosen by category where not given, and told in ``Result.settings``.
        strength: lambda, usually -2 to 2: how much the auxiliary branch takes over. One for all images, or one each.
        fraction: T_a / T, the share of the steps that mix, from the first; halves of a step round up. 0 is off.
        preset: "calibrated", or "paper" for the masks as they are printed, sums of logits.
        guidance: whether the auxiliary branch is guided away from the concept's unconditional prediction ("shared")
            or from its "own", which costs a row more.
        noise: whether the auxiliary branch starts from the concept's noise ("shared") or "independent" noise.
        token_scale, space_scale, gain: tau_t, tau_s and g; the preset's where not given.
        match_cost: shorten the schedule so that it and the mixing steps together are the steps asked for.
        masked: gate the mix by position; if not, both branches are added (ablation).
        separate_prompts: the concept branch sees only "a photo of" the concept (ablation).
        last_layer_only: mix in the last cross-attention layer alone (ablation).
    """

    concept_or_noun: str | Concept | list[Concept] | tuple[Concept, ...]
    auxiliary_noun: str | None = None
    strength: float | list[float] | tuple[float, ...] = 1.0
    fraction: float = 0.15
    preset: str = "calibrated"
    guidance: str = "shared"
    noise: str = "shared"
    token_scale: float | None = None
    space_scale: float | None = None
    gain: float | None = None
    match_cost: bool = False
    masked: bool = True
    separate_prompts: bool = False
    last_layer_only: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.concept_or_noun, str):
            if not self.concept_or_noun.strip():
                raise ValueError(f"concept_or_noun must be a word or words, got {self.concept_or_noun!r}")
        else:
            check_concepts("concept_or_noun", self.concepts, "ico")
        if self.auxiliary_noun is None and not self.noun:
            raise ValueError(f"auxiliary_noun must be given for {self.concepts[0].name!r}, which has no noun; got None")
        if self.auxiliary_noun is not None and not (
            isinstance(self.auxiliary_noun, str) and self.auxiliary_noun.strip()
        ):
            raise ValueError(f"auxiliary_noun must be a word or words, got {self.auxiliary_noun!r}")
        if self.auxiliary.lower() == self.noun.lower():
            raise ValueError(f"auxiliary_noun must differ from the concept's noun, got {self.auxiliary!r} for both")
        strengths = self.strength if isinstance(self.strength, list | tuple) else [self.strength]
        for strength in strengths:
            check_number("strength", strength, -1e6, 1e6)
        if not strengths:
            raise ValueError("strength must be a number, or a list of one per image, got an empty list")
        check_number("fraction", self.fraction, 0.0, 1.0)
        check_choice("preset", self.preset, tuple(PRESETS))
        check_choice("guidance", self.guidance, ("shared", "own"))
        check_choice("noise", self.noise, ("shared", "independent"))
        for name in ("token_scale", "space_scale", "gain"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 0.0)
        for name in ("match_cost", "masked", "separate_prompts", "last_layer_only"):
            check_flag(name, getattr(self, name))

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """The concepts whose tokens, keys and values both branches have."""
        given = self.concept_or_noun
        if isinstance(given, str):
            return ()
        return tuple(given) if isinstance(given, list | tuple) else (given,)

    @property
    def noun(self) -> str:
        """The concept's class noun."""
        return self.concept_or_noun if isinstance(self.concept_or_noun, str) else self.concepts[0].noun

    @property
    def placeholder(self) -> str:
        """What stands for the concept's tokens; "" if it has none."""
        return self.concepts[0].placeholder if self.concepts and self.concepts[0].tokens is not None else ""

    @property
    def phrase(self) -> str:
        """How a prompt names the concept in full."""
        return f"{self.placeholder} {self.noun}".strip()

    @property
    def pattern(self) -> str:
        """A regular expression for the concept's name in a prompt: its placeholder, and its noun behind that."""
        if not self.placeholder:
            return word_pattern(self.noun)
        noun = rf"(?:\s+{word_pattern(self.noun)})?" if self.noun else ""
        return word_pattern(self.placeholder) + noun

    @property
    def auxiliary(self) -> str:
        """The noun of the auxiliary branch."""
        if self.auxiliary_noun is not None:
            return self.auxiliary_noun
        noun = self.noun.lower().strip()
        for known in (noun, noun.split()[-1]):  # "golden retriever dog" is a dog
            for nouns in AUXILIARY_NOUNS.values():
                if known in nouns:
                    return next(candidate for candidate in nouns if candidate not in (known, noun))
        raise ValueError(f"auxiliary_noun must be given for a noun of no known category, got {self.noun!r}")

    @property
    def scales(self) -> tuple[float, float, float]:
        """tau_t, tau_s and g."""
        token_scale, space_scale, gain = PRESETS[self.preset]
        return (
            token_scale if self.token_scale is None else self.token_scale,
            space_scale if self.space_scale is None else self.space_scale,
            gain if self.gain is None else self.gain,
        )

    def for_image(self, image: int, n_images: int) -> DCI:
        """The same with the one strength of one of a request's images."""
        if not isinstance(self.strength, list | tuple):
            return self
        if len(self.strength) != n_images:
            raise ValueError(f"strength must be one, or one per image ({n_images}), got {len(self.strength)}")
        return replace(self, strength=self.strength[image])

    def mixing_steps(self, steps: int) -> int:
        """T_a, how many of ``steps`` steps mix: ``fraction * steps``, a half rounded up."""
        return round_half_up(self.fraction * steps)

    def shortened(self, steps: int) -> int:
        """The steps of a schedule whose mixing steps count twice and that costs about ``steps`` steps."""
        return max(1, round_half_up(steps / (1 + self.fraction))) if self.match_cost else steps

    def settings(self) -> dict[str, Any]:
        """How a result describes one image's."""
        token_scale, space_scale, gain = self.scales
        choices = ("fraction", "preset", "guidance", "noise", "match_cost")
        ablations = ("masked", "separate_prompts", "last_layer_only")
        return {
            "method": "dci",
            "noun": self.noun,
            "concepts": [concept.name for concept in self.concepts],
            "auxiliary_noun": self.auxiliary,
            "strength": self.strength,
            "token_scale": token_scale,
            "space_scale": space_scale,
            "gain": gain,
            **{name: getattr(self, name) for name in (*choices, *ablations)},
        }


@dataclass(frozen=True, slots=True)
class Branches:
    """The two texts of one image, and what of them makes up the masks.

    Attributes:
        texts: of the concept and the auxiliary branch.
        chosen: per branch, positions of the tokens whose attention is its mask; see ``Tokens.positions``.
        lengths: per branch, how many tokens the prompt has.
    """

    texts: tuple[Text, Text]
    chosen: tuple[list[int], list[int]]
    lengths: tuple[int, int]


def make_branches(prompt: str, dci: DCI, texts: Texts) -> Branches:
    """Write the auxiliary prompt and choose the tokens of both masks.

    Raises:
        ValueError: the concept is absent from the prompt, there more than once, or cut off.
    """
    given = texts.text(prompt, dci.concepts)
    whole = texts.tokens(given)
    find_phrase(whole, dci.pattern, dci.phrase)  # checks the whole prompt, whichever branch sees it
    _check_noun_follows(whole, dci)
    own = texts.text(_with_article("a photo of a", dci.phrase), dci.concepts) if dci.separate_prompts else given
    other = Text(replace_phrase(given.prompt, dci), dci.concepts)
    concept, auxiliary = texts.tokens(own), texts.tokens(other)
    noun = find_phrase(concept, dci.pattern, dci.phrase)
    stand_in = _stand_in(auxiliary, whole, dci)
    others = [at for at in auxiliary.positions if at not in stand_in]
    return Branches((own, other), (noun, others), (len(concept.spans), len(auxiliary.spans)))


def replace_phrase(prompt: WeightedPrompt, dci: DCI) -> WeightedPrompt:
    """The prompt with the auxiliary noun in the concept's place, and the article that goes with it.

    It works on parsed text, so that weighting marks within the concept's name do not hide it; the auxiliary noun gets
    the mean weight of the characters that it replaces.
    """
    found = re.search(rf"(?:(?<!\w)(an?)(?=\s))?(\s*){dci.pattern}", prompt.text, re.IGNORECASE)
    assert found is not None  # find_phrase found it
    article, stand_in = found.group(1), dci.auxiliary
    if article is None:
        return prompt.replaced(found.end(2), found.end(), stand_in)
    fitting = "an" if stand_in[0].lower() in "aeiou" else "a"
    swapped = prompt.replaced(found.end(2), found.end(), stand_in)
    return swapped.replaced(*found.span(1), fitting.capitalize() if article[0].isupper() else fitting)


def round_half_up(number: float) -> int:
    """The nearest integer, halves up; a half that floating point left just below itself is one too."""
    return math.floor(round(number, 9) + 0.5)


def _with_article(text: str, noun: str) -> str:
    return f"{text}n {noun}" if noun[0].lower() in "aeiou" else f"{text} {noun}"


def _check_noun_follows(whole: Tokens, dci: DCI) -> None:
    """A noun that does not follow its placeholder would stay in the auxiliary prompt."""
    rest = re.sub(dci.pattern, "", whole.text, flags=re.IGNORECASE)
    if dci.placeholder and dci.noun and re.search(word_pattern(dci.noun), rest, re.IGNORECASE):
        raise ValueError(f"the prompt must have {dci.noun!r} right behind the placeholder, got {whole.text!r}")


def _stand_in(auxiliary: Tokens, whole: Tokens, dci: DCI) -> set[int]:
    """Positions of the auxiliary noun where it took the concept's place, should the prompt have it elsewhere too."""
    words = re.finditer(f"({word_pattern(dci.auxiliary)})|{dci.pattern}", whole.text, re.IGNORECASE)
    occurrence = [word.group(1) is None for word in words].index(True)
    return set(find_phrase(auxiliary, word_pattern(dci.auxiliary), dci.auxiliary, occurrence))
