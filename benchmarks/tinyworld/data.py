"""Pictures of the tinyworld as tensors, addressed by index, so that a run can stop and continue anywhere."""

import random

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.tinyworld.scene import Scene, draw, sample_scene, with_patterns

TRAIN_SEED, HELD_OUT_SEED = 0, 1_000_000_007


def scene_at(index: int, seed: int = TRAIN_SEED, *, patterned: bool = False) -> Scene:
    """Scene ``index`` of the endless sequence that ``seed`` names; with patterns on some of its objects if asked."""
    scene = sample_scene(random.Random(f"{seed}:{index}"))
    return with_patterns(scene, random.Random(f"pattern:{seed}:{index}")) if patterned else scene


def to_tensor(images: list[Image.Image]) -> Tensor:
    """Pictures as (B, 3, H, W) float32 in [-1, 1]."""
    pixels = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pictures: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] as PIL pictures."""
    pixels = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).numpy()]


def pictures_at(indices: range, seed: int = TRAIN_SEED, *, patterned: bool = False) -> Tensor:
    """The pictures of scenes ``indices`` as one tensor."""
    return to_tensor([draw(scene_at(index, seed, patterned=patterned)) for index in indices])
