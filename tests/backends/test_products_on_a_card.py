"""The fused products in half precision on a card that is not there: descriptors, and what is folded of weights."""

from typing import Any

import pytest
import torch
from torch import Tensor

import engine
from engine.backends.graphs import CudaCapture, Graphs
from engine.backends.ops import TORCH, TRITON
from tests.backends.test_on_a_card import _arguments, _draw, _on
from tests.fake_cuda import Card

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there"),
    pytest.mark.usefixtures("card"),
]


@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("op", ["layer_norm_linear", "layer_norm_geglu", "linear_add"])
def test_products_in_half_precision(card: Card, op: str, tma: bool) -> None:
    """Through descriptors, which carry their tensors to the card, and with what is folded of a weight once."""
    card.interpreted = True
    arguments = [x.half() if isinstance(x, Tensor) else x for x in _arguments(op)]
    exact = getattr(TORCH, op)(*(x.double() if isinstance(x, Tensor) else x for x in arguments))
    given = _on("cuda:1", arguments)
    results = [getattr(TRITON, op)(*given, tma=tma).cpu() for _ in range(2)]
    assert torch.equal(*results)
    torch.testing.assert_close(results[0].double(), exact, rtol=2e-3, atol=2e-3)
    once = ["_product_kernel"] if op == "linear_add" else ["_layer_norm_stats_kernel", "_product_kernel"]
    assert [launch.kernel for launch in card.launches] == 2 * once
    assert {launch.device for launch in card.launches} == {1}


def test_a_weight_is_not_folded_while_a_graph_is_captured(card: Card) -> None:
    """Its memory would be the graph's, and its making work of every replay."""
    given = [x.half().to("cuda:0") if isinstance(x, Tensor) else x for x in _arguments("layer_norm_linear")]
    graphs = Graphs(lambda: CudaCapture(torch.device("cuda:0")))
    x = graphs("product", lambda given, x: TRITON.layer_norm_linear(x, *given[1:]), tuple(given), given[0])
    operations = [name for name, _ in card.operations]
    assert operations.count("aten.log2") == 1
    assert graphs.failed is None
    torch.testing.assert_close(x.cpu(), TORCH.layer_norm_linear(*_on("cpu", given)), rtol=2e-3, atol=2e-3)


def test_what_is_folded_on_one_stream_is_there_for_others(card: Card) -> None:
    """Which do not wait for one another."""
    card.interpreted = True
    given = [x.half().to("cuda:0") if isinstance(x, Tensor) else x for x in _arguments("layer_norm_linear")]
    torch.cuda.synchronize()
    results = []
    for _ in range(2):
        with torch.cuda.stream(torch.cuda.Stream()):
            results.append(TRITON.layer_norm_linear(*given))
    torch.cuda.synchronize()
    assert torch.equal(*(x.cpu() for x in results))


def test_weights_are_folded_once_and_before_any_capture(small_folder: Any, card: Card) -> None:
    sd = engine.load(small_folder, device="cuda:0", dtype="float16", backend="triton")
    for seed in (0, 1):
        _draw(sd, seed=seed)
    assert sd.graphs is not None
    assert sd.graphs.failed is None
    norms = sum(isinstance(module, torch.nn.LayerNorm) for module in sd.unet.modules())
    assert [name for name, _ in card.operations].count("aten.log2") == norms > 0
    assert {"_layer_norm_stats_kernel", "_product_kernel"} <= {one.kernel for one in card.launches if one.replayed}
