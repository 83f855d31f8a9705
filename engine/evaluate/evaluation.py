"""Evaluate concepts on a user's own model: pictures of a data set's prompts, and both papers' measures of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..loading import checkpoint_of, model_digest
from ..methods.concept import Concept
from ..read_picture import read_picture
from ..serve.bulk import Paint, Row, Status, make_row, run_bulk
from .bootstrap import estimate
from .divergence import Divergence
from .dreambench import Subject, fill
from .encoders import PictureEncoder, TextEncoder
from .similarity import image_alignment, pairwise_distance, text_alignment
from .sums import Compute, Part, compute_here, distances, divide_pairs, read_latents

_OTHER_SEED = 10**6  # first of the base's other pictures, which the Wasserstein distance is from
_DIVERGENCE_PAIRS = 32


@dataclass(frozen=True, slots=True)
class Protocol:
    """How much is drawn, and how.

    Attributes:
        n_prompts: of each subject's, the first.
        n_images: per prompt, with seeds from 0.
        dci: whether ICO concepts are drawn with DCI's second branch.
        drawing: keywords of ``generate``.
    """

    n_prompts: int
    n_images: int
    dci: bool
    drawing: Mapping[str, Any]


_DRAWING = {"sampler": "ddim", "steps": 50, "guidance_scale": 8.0}
PROTOCOLS = {  # arXiv:2404.14007, section 4: 20 prompts and 50 pictures; DreamBench's own: 25 and 4
    "infusion": Protocol(20, 50, False, _DRAWING),
    "dci": Protocol(25, 4, True, _DRAWING),
}


@dataclass(frozen=True, slots=True)
class Subjected:
    """A concept, its file and the subject that it was learned from."""

    path: Path
    concept: Concept
    subject: Subject

    @property
    def word(self) -> str:
        """What stands before the noun in prompts: the placeholder, or nothing."""
        return self.concept.placeholder if self.concept.tokens is not None else ""


def match(paths: Sequence[Path], subjects: Mapping[str, Subject], named: Sequence[str] = ()) -> list[Subjected]:
    """Each concept file with its subject: the one of its stem, or as named, one name per file.

    Raises:
        ValueError: there is no such subject, or names are not one per file.
        ConceptFileError: a file is no concept.
    """
    if named and len(named) != len(paths):
        raise ValueError(f"subject must be one per concept ({len(paths)}), got {len(named)}")
    found = []
    for path, name in zip(paths, named or [path.stem for path in paths], strict=True):
        if name not in subjects:
            rule = (
                f"the subject of {path} must be one of the data set's ({', '.join(subjects)}); name it with --subject"
            )
            raise ValueError(f"{rule}, got {name!r}")
        found.append(Subjected(path, Concept.load(path), subjects[name]))
    return found


@dataclass(frozen=True, slots=True)
class Drawn:
    """Pictures of one kind, by prompt: rows in the order of prompts, all seeds of one in turn."""

    rows: list[Row]
    folder: Path

    @property
    def images(self) -> list[Image.Image]:
        return [read_picture(row.files(self.folder)[-1]) for row in self.rows]

    @property
    def latents(self) -> list[Path]:
        return [row.files(self.folder)[0] for row in self.rows]


def evaluate(
    concepts: Sequence[Subjected],
    loading: Mapping[str, Any],
    out: Path,
    protocol: Protocol,
    clip: TextEncoder,
    dino: PictureEncoder | None = None,
    strengths: Sequence[float] = (1.0,),
    *,
    batch_size: int = 8,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda batches, _n: batches,
    paint: Paint | None = None,
    compute: Compute = compute_here,
) -> dict[str, Any]:
    """Draw and measure; a rerun draws what is missing.

    Args:
        concepts: see ``match``.
        loading: arguments of ``engine.load``.
        out: pictures go to its ``pictures``.
        protocol: how much is drawn.
        clip: for CLIP-T, CLIP-I and diversity.
        dino: for DINO; None leaves it out.
        strengths: of Infusion, or of DCI's second branch where the protocol draws with it; one record each.
        batch_size, progress, paint: see ``serve.bulk.run_bulk``.
        compute: takes the parts of which both distances are the sum, as ``ray_sums.compute`` does in actors.

    Returns:
        JSON-serialisable: settings, and a record per concept and strength.

    Raises:
        ValueError: a picture could not be drawn; the message gives the first row and its error.
    """
    model, take = model_digest(loading), lambda parts: compute(parts, loading)
    plans = [_plan(one, protocol, strengths, model) for one in concepts]
    wanted = {row.key: row for plan in plans for rows in plan.values() for row in rows}
    folder = out / "pictures"
    found = run_bulk(list(wanted.values()), folder, loading, batch_size=batch_size, progress=progress, paint=paint)
    statuses = {status.key: status for status in found}
    _check(statuses, wanted)
    records, drawings = [], [{kind: Drawn(rows, folder) for kind, rows in plan.items()} for plan in plans]
    divergences = _divergences(concepts, [drawn["base"] for drawn in drawings], take)
    for one, plan, drawn, divergence in zip(concepts, plans, drawings, divergences, strict=True):
        files = {kind: pictures.latents for kind, pictures in drawn.items()}
        moved = distances(files, [("other", f"strength {strength:g}", "base") for strength in strengths], take)
        for strength, distance in zip(strengths, moved, strict=True):
            measured = _measure(one, drawn, drawn[f"strength {strength:g}"], protocol, clip, dino)
            seconds = [statuses[row.key].seconds for row in plan[f"strength {strength:g}"]]
            records.append(
                {
                    "concept": one.path.stem,
                    "subject": one.subject.name,
                    "noun": one.concept.noun,
                    "method": _method(one, protocol),
                    "strength": strength,
                    "bytes": one.path.stat().st_size,
                    "seconds_per_picture": round(float(np.mean(seconds)), 4) if any(seconds) else None,
                    **measured,
                    "wasserstein": distance,
                    "fisher": divergence,
                    "files": [row.files(folder)[-1].name for row in plan[f"strength {strength:g}"]],
                    "base_files": [row.files(folder)[-1].name for row in plan["base"]],
                    "references": [str(path) for path in one.subject.pictures],
                }
            )
    settings = {
        "model": checkpoint_of(loading).name,
        "loras": [lora.settings() for lora in loading.get("loras", ())],
        "clip": clip.name,
        "dino": None if dino is None else dino.name,
        "prompts": protocol.n_prompts,
        "images_per_prompt": protocol.n_images,
        **protocol.drawing,
    }
    return {"settings": settings, "records": records}


def _method(one: Subjected, protocol: Protocol) -> str:
    return "dci" if protocol.dci and one.concept.method == "ico" else one.concept.method


def _plan(one: Subjected, protocol: Protocol, strengths: Sequence[float], model: str) -> dict[str, list[Row]]:
    """The rows of the concept at each strength, of the base under the plain noun, and of the base with other seeds."""
    noun, prompts = one.concept.noun, one.subject.prompts[: protocol.n_prompts]
    if len(prompts) < protocol.n_prompts:
        raise ValueError(f"the protocol's prompts must be at most the {len(prompts)} of {one.subject.name!r}")
    method = _method(one, protocol)
    if method == "ico" and tuple(strengths) != (1.0,):
        raise ValueError(f"strengths belong to Infusion and DCI, got {list(strengths)} for {one.path.name}")

    def rows(word: str, first_seed: int, **more: Any) -> list[Row]:
        return [
            make_row(
                {
                    "prompt": fill(prompt, word, noun),
                    "seed": first_seed + i,
                    "latents": True,
                    **protocol.drawing,
                    **more,
                },
                model,
            )
            for prompt in prompts
            for i in range(protocol.n_images)
        ]

    plan = {"base": rows("", 0), "other": rows("", _OTHER_SEED)}
    for strength in strengths:
        asked: dict[str, Any] = {"concepts": [str(one.path.absolute())]}
        if method == "infusion":
            asked["concept_strength"] = strength
        if method == "dci":
            asked |= {"dci": one.concept.placeholder, "dci_strength": strength}
        plan[f"strength {strength:g}"] = rows(one.word, 0, **asked)
    return plan


def _check(statuses: Mapping[str, Status], wanted: Mapping[str, Row]) -> None:
    wrong = [status for status in statuses.values() if status.status == "error"]
    if wrong:
        prompt = wanted[wrong[0].key].prompt
        raise ValueError(f"{len(wrong)} of {len(wanted)} pictures could not be drawn; {prompt!r}: {wrong[0].error}")


def _measure(
    one: Subjected,
    drawn: Mapping[str, Drawn],
    custom: Drawn,
    protocol: Protocol,
    clip: TextEncoder,
    dino: PictureEncoder | None,
) -> dict[str, Any]:
    images = custom.images
    groups = [i for i in range(protocol.n_prompts) for _ in range(protocol.n_images)]
    plain = [row.prompt for row in drawn["base"].rows]  # the placeholder is no word that CLIP knows
    references = [read_picture(path) for path in one.subject.pictures]
    embedded, texts = clip.pictures(images), clip.texts(plain)
    values = {
        "clip_t": text_alignment(embedded, texts),
        "clip_i": image_alignment(embedded, clip.pictures(references)),
    }
    if dino is not None:
        values["dino"] = image_alignment(dino.pictures(images), dino.pictures(references))
    measured: dict[str, Any] = {name: estimate(found.tolist(), groups).record() for name, found in values.items()}
    base = clip.pictures(drawn["base"].images)
    measured["base_clip_t"] = estimate(text_alignment(base, texts).tolist(), groups).record()
    if protocol.n_images > 1:
        for name, embeddings in (("diversity", embedded), ("base_diversity", base)):
            measured[name] = estimate(pairwise_distance(embeddings, groups)).record()
    return measured


def _divergences(
    concepts: Sequence[Subjected], bases: Sequence[Drawn], take: Callable[[Sequence[Part]], list[Any]]
) -> list[dict[str, Any]]:
    """From the base, on its own pictures of the plain noun: what concepts do where nobody asked for them.

    Infusion's is its customised pipeline's; its foundation's is zero by construction. All parts are taken together, so
    that whoever takes them loads the model once.
    """
    parts = []
    for one, base in zip(concepts, bases, strict=True):
        chosen = np.linspace(0, len(base.rows) - 1, min(_DIVERGENCE_PAIRS, len(base.rows))).round().astype(int)
        parts.append(divide_pairs(one.path, [base.latents[i] for i in chosen], [base.rows[i].prompt for i in chosen]))
    sums, records = iter(take([part for own in parts for part in own])), []
    for one, base, own in zip(concepts, bases, parts, strict=True):
        is_infusion = one.concept.method == "infusion"
        found = torch.cat([next(sums) for _ in own], dim=1)
        records.append(
            {
                "of": "customised pipeline" if is_infusion else "keys and values",
                **Divergence.of(found, read_latents(base.latents[:1]).numel()).record(),
                "foundation": 0.0 if is_infusion else None,
            }
        )
    return records


def write_record(result: Mapping[str, Any], out: Path) -> Path:
    """``report.json``."""
    path = out / "report.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
