"""What following costs (FLOPs at full size, no map in memory, concepts that switch at once), and what is not shared."""

import statistics
import time
from dataclasses import replace

import psutil
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import engine
from benchmarks.systems import default_request
from engine.methods.concept_cache import Texts
from engine.models.conditioning import Batch, Conditioning, Following, Mixing, Shared
from engine.models.config import UNetConfig
from engine.models.unet import UNet2DConditionModel
from engine.sampling.plan import make_plans
from tests.pipelines import SD_V1_5_UNET, random_concept


def _flops(unet: UNet2DConditionModel, n_own: int, n_followers: int) -> int:
    """Of one denoising step on the meta device, at 512x512."""
    n_rows = n_own + n_followers
    with torch.device("meta"), torch.no_grad():
        text = unet.text_kv(torch.empty(n_own, 77, 768))
        shifts = unet.time_shifts(torch.empty(1)).expand(n_rows, -1)
        following = None
        if n_followers:
            layers = unet.cross_attentions.values()
            residuals = tuple(torch.empty(n_followers, one.n_heads, one.to_v.out_features) for one in layers)
            tokens = torch.empty(n_own, 1, dtype=torch.int64)
            following = Following(tokens, torch.empty(n_followers, dtype=torch.int64), residuals)
        with FlopCounterMode(display=False) as counter:
            unet.denoise(torch.empty(n_rows, 4, 64, 64), Conditioning(Batch(text, following), shifts))
    return counter.get_total_flops()


def test_a_following_row_costs_less_than_a_plain_one() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(UNetConfig.from_dict(SD_V1_5_UNET))
    plain = _flops(unet, 1, 0)
    assert plain == pytest.approx(800e9, rel=0.01)  # 803.3 GFLOP less the text's keys and values
    follower = _flops(unet, 1, 3) - _flops(unet, 1, 2)
    assert follower <= 0.97 * plain
    leader = _flops(unet, 1, 1) - follower
    assert leader <= 1.002 * plain  # the columns cost next to nothing


def test_rows_of_one_picture_share_what_no_text_reaches() -> None:
    with torch.device("meta"), torch.no_grad():
        unet = UNet2DConditionModel(UNetConfig.from_dict(SD_V1_5_UNET))
        shifts = unet.time_shifts(torch.empty(1)).expand(2, -1)
        text, index = unet.text_kv(torch.empty(2, 77, 768)), torch.empty(2, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            unet.denoise(torch.empty(1, 4, 64, 64), Conditioning(Batch(text, shared=Shared(index, index[:1])), shifts))
    assert counter.get_total_flops() <= 0.975 * _flops(unet, 2, 0)


@pytest.mark.parametrize("first_block", ["DownBlock2D", "CrossAttnDownBlock2D"])
def test_shared_rows_get_what_each_gets_alone(first_block: str) -> None:
    """Also where a whole stage, its skips among it, comes before the first cross-attention."""
    torch.manual_seed(0)
    down = (first_block, "CrossAttnDownBlock2D", "DownBlock2D")
    up = tuple(name.replace("Down", "Up") for name in reversed(down))
    sizes = {"block_out_channels": [16, 16, 32], "layers_per_block": 1, "attention_head_dim": 2, "norm_num_groups": 8}
    config = {**SD_V1_5_UNET, **sizes, "down_block_types": down, "up_block_types": up, "cross_attention_dim": 12}
    unet = UNet2DConditionModel(UNetConfig.from_dict(config)).double()
    latents, context = torch.randn(2, 4, 8, 8).double(), torch.randn(5, 7, 12).double()
    rows, firsts, timesteps = torch.tensor([1, 0, 0, 1, 0]), torch.tensor([1, 0]), torch.tensor([7, 300])
    with torch.no_grad():
        shifts, text = unet.time_shifts(timesteps[rows]), unet.text_kv(context)
        shared = unet.denoise(latents, Conditioning(Batch(text, shared=Shared(rows, firsts)), shifts))
        alone = unet.denoise(latents[rows], Conditioning(Batch(text), shifts))
    torch.testing.assert_close(shared, alone)


class _Pointwise(TorchDispatchMode):
    """Counts an operation for every number that anything but a product computes, and five for a softmax's."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and func not in flop_registry and not func.is_view:
            self.total += out.numel() * (5 if "softmax" in str(func) else 1)
        return out


def _mixing_flops(unet: UNet2DConditionModel, masked: bool) -> int:
    """Everything that a step of DCI computes on the reference path: two branches and the unconditional row."""
    with torch.device("meta"), torch.no_grad():
        text = unet.text_kv(torch.empty(3, 77, 768))
        shifts = unet.time_shifts(torch.empty(1)).expand(3, -1)
        layers = frozenset(range(len(unet.cross_attentions)))
        chosen, lengths = torch.empty(2, 77, dtype=torch.bool), torch.empty(2, dtype=torch.int64)
        mixing = Mixing(chosen, lengths, torch.empty(1, 4), False, masked, layers)
        with FlopCounterMode(display=False) as products, _Pointwise() as pointwise:
            unet.denoise(torch.empty(3, 4, 64, 64), Conditioning(Batch(text, mixing=mixing), shifts))
    return products.get_total_flops() + pointwise.total


def test_masks_cost_next_to_nothing() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(UNetConfig.from_dict(SD_V1_5_UNET))
    plain, masked = (_mixing_flops(unet, masked) for masked in (False, True))
    assert plain > 3 * 790e9
    assert plain < masked <= 1.02 * plain


class _Shapes(TorchDispatchMode):
    """Records the shape of everything that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.shapes.add(tuple(x.shape))
        return out


def test_no_map_is_written(small: engine.Engine) -> None:
    with _Shapes() as seen:
        small.generate(
            "a cat",
            customization=engine.Infusion([random_concept(small)]),
            steps=1,
            seed=0,
            output="latent",
            progress=False,
        )
    n_positions = {64, 16}  # of the small model's layers
    maps = [shape for shape in seen.shapes if len(shape) >= 2 and shape[-1] in (77, 80) and shape[-2] in n_positions]
    assert not maps
    assert any(shape[-1] == 3 and 64 in shape for shape in seen.shapes)  # one token's columns, over three heads


class _KnownTexts(Texts):
    """The texts of a request whose keys and values are known."""

    def encode(self, _texts, _weighting):
        return None


def test_concepts_switch_at_once(small: engine.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    concepts = [random_concept(small, seed) for seed in range(1000)]
    texts, known = _KnownTexts(small.text_encoder), small.unet.text_kv(small.encode_prompt(["", "a cat"]))
    monkeypatch.setattr(small.concepts, "text_kv", lambda _texts, _context: known)
    request = default_request(small, "a cat", customization=engine.Infusion(concepts[:1]))
    for concept in concepts:
        small.concepts.residuals(concept)
    make_plans(request, 1, texts, small.concepts, small.device)
    resident_bytes = psutil.Process().memory_info().rss
    seconds = []
    for concept in concepts:
        request = replace(request, customizations=(engine.Infusion([concept]),))
        start = time.perf_counter()
        make_plans(request, 1, texts, small.concepts, small.device)
        seconds.append(time.perf_counter() - start)
    assert statistics.median(seconds) < 1e-3
    assert psutil.Process().memory_info().rss - resident_bytes < 4e6


def test_images_that_differ_in_the_negative_prompt_alone_share_no_trajectory(small: engine.Engine) -> None:
    negatives = ["", "a dog"]
    options = {"seed": [1, 1], "steps": 2, "output": "latent", "progress": False}
    both = small.generate(["a cat"] * 2, negative_prompt=negatives, **options).latents
    assert not torch.equal(both[0], both[1])
    for i, negative in enumerate(negatives):
        alone = small.generate("a cat", negative_prompt=negative, **options | {"seed": 1}).latents[0]
        assert torch.allclose(both[i], alone, atol=1e-5)
