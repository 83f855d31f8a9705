"""The wiring of the GPU path, on a card that is not there: what runs where, in which order, and from which memory."""

import threading
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import engine
from engine.backends import graphs as graphs_module
from engine.backends.cudnn import convolve
from engine.backends.graphs import CudaCapture, Graphs, beside, empty_cache
from engine.backends.ops import TORCH, TRITON
from engine.kernels.attention import attention
from engine.train.denoising import autocast
from tests.fake_cuda import Card
from tests.pipelines import random_concept, relative_error

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there"),
    pytest.mark.usefixtures("card"),
]

_KERNELS = {  # by op, what it launches
    "attention": ["_attention_fwd_kernel"],
    "cross_attention": ["_cross_attention_fwd_kernel"],
    "residual_apply": ["_residual_apply_fwd_kernel"],
    "dbim": ["_dbim_space_kernel", "_dbim_mix_kernel"],
    "group_norm": ["_group_norm_kernel"],
    "group_norm_silu": ["_group_norm_kernel"],
    "residual_add": ["_residual_add_fwd_kernel"],
    "layer_norm_linear": ["_product_kernel"],
    "layer_norm_geglu": ["_product_kernel"],
    "linear_add": ["_product_kernel"],
}


def _draw(sd: engine.Engine, prompt: str = "a cat", **options: Any) -> Tensor:
    options = {"steps": 2, "seed": 0, "output": "latent", "progress": False} | options
    return sd.generate(prompt, **options).latents.cpu()


def _arguments(op: str) -> list[Any]:
    torch.manual_seed(0)
    x, text, picture = torch.randn(2, 4, 8), torch.randn(2, 5, 8), torch.randn(2, 8, 2, 2)
    picture = picture.contiguous(memory_format=torch.channels_last)
    weight, bias, index = torch.randn(8, 8), torch.randn(8), torch.tensor([[1], [2]])
    chosen = torch.tensor([[False, True, False, False, False]] * 2)
    return {
        "attention": [x, text, text, 2],
        "cross_attention": [x, text, text, index, 2],
        "residual_apply": [x, x.clone(), torch.rand(2, 4, 2), torch.tensor([1, 0]), torch.randn(2, 2, 8)],
        "dbim": [x, text, text, chosen, torch.tensor([3, 3]), torch.tensor([[1.0, 10, 10, 500]]), 2, False],
        "group_norm": [picture, bias, bias, 4, 1e-5],
        "group_norm_silu": [picture, bias[None], bias, bias, 4, 1e-5],
        "residual_add": [picture, picture.clone(), bias],
        "layer_norm_linear": [x, bias, bias, 1e-5, weight],
        "layer_norm_geglu": [x, bias, bias, 1e-5, weight, bias],
        "linear_add": [x, weight, bias, x.clone(), None, None],
    }[op]


def _on(device: str, arguments: list[Any]) -> list[Any]:
    return [x.to(device) if isinstance(x, Tensor) else x for x in arguments]


@pytest.mark.parametrize("op", _KERNELS)
def test_every_operation_launches_its_kernels_on_its_tensors_device(card: Card, op: str) -> None:
    """The current device is another one."""
    arguments = _arguments(op)
    result = getattr(TRITON, op)(*_on("cuda:1", arguments))
    exact = getattr(TORCH, op)(*arguments)
    pairs = [(result, exact)] if isinstance(result, Tensor) else list(zip(result, exact, strict=True))
    for ours, theirs in pairs:
        assert ours.device == torch.device("cuda:1")
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-5)
    assert [launch.kernel for launch in card.launches] == _KERNELS[op]
    assert {launch.device for launch in card.launches} == {1}


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_what_takes_two_launches_launches_both(card: Card, device: str) -> None:
    x = torch.randn(1, 8, 48, 48).contiguous(memory_format=torch.channels_last)
    arguments = [x, torch.ones(8), torch.zeros(8), 2, 1e-5]
    result = TRITON.group_norm(*_on(device, arguments))
    torch.testing.assert_close(result.cpu(), TORCH.group_norm(*arguments), rtol=1e-4, atol=1e-5)
    q, k, v = torch.randn(1, 40, 32), torch.randn(1, 150, 32), torch.randn(1, 150, 32)
    result = attention(*_on(device, [q, k, v]), 2, is_split=True)
    torch.testing.assert_close(result.cpu(), TORCH.attention(q, k, v, 2), rtol=1e-4, atol=1e-5)
    norms, attentions = ["_group_norm_stats_kernel", "_group_norm_apply_kernel"], ["_attention_fwd_kernel"]
    assert [one.kernel for one in card.launches] == [*norms, *attentions, "_attention_combine_kernel"]
    assert {one.device for one in card.launches} == {int(device[-1])}


@pytest.mark.parametrize("op", ["group_norm_silu", "layer_norm_linear", "cross_attention"])
def test_launchers_give_kernels_what_they_need(card: Card, op: str) -> None:
    card.interpreted = True
    arguments = _arguments(op)
    result, exact = getattr(TRITON, op)(*_on("cuda:0", arguments)), getattr(TORCH, op)(*arguments)
    first = result if isinstance(result, Tensor) else result[0]
    torch.testing.assert_close(first.cpu(), exact if isinstance(exact, Tensor) else exact[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_backend_triton_replays_our_kernels(small_folder: Any, card: Card, device: str) -> None:
    plain = engine.load(small_folder, device="cpu", backend="torch")
    sd = engine.load(small_folder, device=device, dtype="float32", backend="triton")
    for custom in (None, engine.Infusion([random_concept(plain)]), engine.DCI("cat", "dog", fraction=0.5)):
        before = card.replays
        for seed in (0, 1):
            ours, exact = (_draw(one, customization=custom, seed=seed) for one in (sd, plain))
            assert relative_error(ours, exact) < 1e-4
        assert card.replays >= before + 4
    assert sd.graphs is not None
    assert sd.graphs.failed is None
    assert set(chain(*_KERNELS.values())) <= {launch.kernel for launch in card.launches if launch.replayed}
    assert {launch.device for launch in card.launches} == {int(device[-1])}


def test_the_device_is_the_one_that_was_current_at_load(small_folder: Any, card: Card) -> None:
    with torch.cuda.device(1):
        sd = engine.load(small_folder, device="cuda", dtype="float32", backend="triton")
    assert sd.device == torch.device("cuda:1")
    _draw(sd)
    assert {launch.device for launch in card.launches} == {1}


def test_an_empty_capture_is_found_and_eager_code_serves(small_folder: Any, card: Card) -> None:
    plain = engine.load(small_folder, device="cpu", backend="torch")
    sd = engine.load(small_folder, device="cuda:0", dtype="float32", backend="triton")
    card.empty_captures = True
    with pytest.warns(RuntimeWarning, match="without CUDA graphs from now on; step of 2 rows.*left results out"):
        out = sd.generate("a cat", steps=2, seed=0, output="latent", progress=False)
    assert relative_error(out.latents.cpu(), _draw(plain)) < 1e-4
    assert card.kernels()["_attention_fwd_kernel"] > 0
    assert "left results out" in out.settings["graphs"]


def test_a_capture_that_is_refused_is_told() -> None:
    graphs = Graphs(lambda: CudaCapture(torch.device("cuda:0")))

    def waits(_: None, x: Tensor) -> Tensor:
        return x * float(x.sum())

    x = torch.full((2,), 3.0, device="cuda:0")
    with pytest.warns(RuntimeWarning, match="operation not permitted when stream is capturing"):
        assert graphs("waits", waits, None, x).tolist() == [18.0, 18.0]
    assert graphs("waits", waits, None, x).tolist() == [18.0, 18.0]
    assert len(graphs) == 0


def test_a_replay_that_reads_what_is_gone_is_found() -> None:
    graphs, seen = Graphs(lambda: CudaCapture(torch.device("cuda:0"))), []

    def frozen(_: None, x: Tensor) -> Tensor:
        seen.append(x.clone())
        return seen[min(len(seen) - 1, 3)] + 0 * x  # that of the fourth call, which captured

    with pytest.warns(RuntimeWarning, match="gave other results than eager code"):
        graphs("frozen", lambda c, x: frozen(c, x) if len(seen) < 4 else 2 * x, None, torch.ones(3, device="cuda:0"))


def _double(constants: Tensor, x: Tensor) -> Tensor:
    return (x @ constants) * 2


def test_threads_on_streams_of_their_own_wait_for_one_another() -> None:
    graphs = Graphs(lambda: CudaCapture(torch.device("cuda:0")))
    constants = [torch.eye(4, device="cuda:0"), 2 * torch.eye(4, device="cuda:0")]
    wrong: list[Any] = []

    def run(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            for i in range(5):
                x = torch.full((4, 4), float(i), device="cuda:0")
                result = graphs("double", _double, constants[number], x)
                if not torch.equal(result.cpu(), torch.full((4, 4), 2.0 * i * (number + 1))):
                    wrong.append((number, i, result))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(graphs) == 1


def test_what_comes_before_a_capture_and_after_it_waits() -> None:
    """Inputs are still being written when the capture warms up, and results are read by whoever called."""
    capture = CudaCapture(torch.device("cuda:0"))
    x = torch.ones(4, 4, device="cuda:0")
    y = x @ x
    replay, result = capture(lambda: y + 1)
    y.fill_(2.0)
    replay()
    assert result.cpu().eq(3).all()


def test_the_schedulers_stream_waits_for_what_was_there() -> None:
    x = torch.ones(4, device="cuda:0") * 2
    with beside(torch.device("cuda:0")):
        assert torch.cuda.current_stream() != torch.cuda.default_stream()
        y = x + 1
        torch.cuda.current_stream().synchronize()
    assert y.cpu().eq(3).all()


def test_a_second_gpu_captures_on_a_stream_of_its_own(card: Card) -> None:
    for index in (0, 1):
        device = torch.device("cuda", index)
        graphs, eye = Graphs(lambda device=device: CudaCapture(device)), torch.eye(4, device=device)
        for factor in (1.0, 2.0):
            x = torch.full((4, 4), factor, device=device)
            assert graphs("double", _double, eye, x).cpu().eq(2 * factor).all()
        assert graphs.failed is None
    assert {graph.device for graph in card.graphs} == {1}  # the first is dropped


def test_two_engines_graphs_share_no_workspace() -> None:
    """Though torch has handed out all its streams, and the second one's is the first one's again."""
    device = torch.device("cuda:0")
    first = CudaCapture(device)
    while (second := CudaCapture(device)).stream != first.stream:
        pass
    x = torch.ones(4, 4, device=device)
    replays = [capture(lambda: x @ x)[0] for capture in (first, second)]
    torch.cuda.synchronize()
    for replay in replays:
        with torch.cuda.stream(torch.cuda.Stream()):
            replay()
    with torch.cuda.stream(second.stream):  # as eager code on a stream that torch hands out again
        x @ x


def test_inference_mode_leaves_buffers_that_others_may_write() -> None:
    graphs = Graphs(lambda: CudaCapture(torch.device("cuda:0")))
    eye = torch.eye(4, device="cuda:0")
    for mode, factor in ((True, 1.0), (False, 2.0), (True, 3.0)):
        with torch.inference_mode(mode):
            x = torch.full((4, 4), factor, device="cuda:0")
            result = graphs("double", _double, eye, x)
        assert not result.requires_grad
        assert result.cpu().eq(2 * factor).all()
    assert len(graphs) == 1


def test_inference_mode_without_a_card() -> None:
    def capture(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        results = function()

        def replay() -> None:
            results.copy_(function())

        return replay, results

    graphs = Graphs(lambda: capture)
    for mode, value in ((True, 1.0), (False, 2.0)):
        with torch.inference_mode(mode):
            x = torch.full((2,), value)
            assert graphs("double", lambda _, x: 2 * x, None, x).tolist() == [2 * value, 2 * value]


def test_memory_comes_back_with_the_pool_that_was_used_longest_ago(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs_module, "_MAX_GRAPHS", 8)  # two in a pool
    graphs = Graphs(lambda: CudaCapture(torch.device("cuda:0")))

    def run(size: int) -> None:
        graphs("square", lambda _, x: x * x, None, torch.ones(size, device="cuda:0"))

    for size in (*range(1, 9), 1):  # four pools, of which the first was used again
        run(size)
    assert sorted(card.live_graphs.values()) == [2, 2, 2, 2]
    run(9)
    assert len(graphs) == 7
    assert sorted(card.live_graphs.values()) == [0, 1, 2, 2, 2]
    captured = len(graphs.captured)
    for size in (1, 2, 5, 6, 7, 8, 9):
        run(size)
    assert len(graphs.captured) == captured
    graphs.clear()
    assert set(card.live_graphs.values()) == {0}


def test_the_cache_is_not_emptied_while_another_thread_captures() -> None:
    capture, thread = CudaCapture(torch.device("cuda:0")), threading.Thread(target=empty_cache)
    calls: list[int] = []

    def function() -> Tensor:
        calls.append(len(calls))
        if len(calls) == 4:  # three to warm up, and then the capture
            thread.start()
            thread.join(0.05)
            assert thread.is_alive()
        return torch.ones(1, device="cuda:0")

    capture(function)
    thread.join(5)
    assert not thread.is_alive()


def test_no_module_empties_the_cache_by_itself() -> None:
    files = [file for file in Path(engine.__file__).parent.rglob("*.py") if "cuda.empty_cache()" in file.read_text()]
    assert [file.name for file in files] == ["graphs.py"]


@pytest.mark.parametrize(
    ("dtype", "graphs", "flags"),
    [
        ("float32", True, (True, False, False)),  # benchmark, deterministic, TF32
        ("float32", False, (False, False, False)),
        ("float16", True, (True, False, False)),
        ("float16", False, (False, False, True)),  # which does nothing but tell the two apart
    ],
)
def test_convolutions_are_told_by_the_call(
    small_folder: Any, card: Card, monkeypatch: pytest.MonkeyPatch, dtype: str, graphs: bool, flags: tuple
) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    cudnn: Any = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.benchmark
    sd = engine.load(small_folder, device="cuda:0", dtype=dtype, backend="torch", graphs=graphs)
    x = torch.randn(1, 4, 8, 8).to("cuda:0", sd.dtype)
    sd.vae.decode(x)
    sd.vae.encode(torch.randn(1, 3, 16, 16).to("cuda:0", sd.dtype))
    sd.unet(x, 5, torch.randn(1, 77, 32).to("cuda:0", sd.dtype))
    assert len(card.convolutions) > 10
    assert set(card.convolutions) == {(sd.dtype, *flags)}
    assert (cudnn.allow_tf32, cudnn.benchmark) == before


def test_deterministic_torch_does_not_benchmark(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    x, weight = torch.randn(1, 3, 4, 4).to("cuda:0"), torch.randn(2, 3, 3, 3).to("cuda:0")
    y = convolve(x, weight, None, benchmark=True)
    assert card.convolutions == [(torch.float32, False, True, False)]
    torch.testing.assert_close(y.cpu(), torch.nn.functional.conv2d(x.cpu(), weight.cpu(), padding=1))


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_training_multiplies_in_bfloat16(small_folder: Any, card: Card, dtype: str) -> None:
    sd = engine.load(small_folder, device="cuda:0", dtype=dtype, backend="torch", graphs=False)
    x = torch.ones(2, 32, device="cuda:0").to(sd.dtype)
    with torch.no_grad(), autocast(sd):
        y = next(iter(sd.unet.cross_attentions.values())).to_k(x)
    assert y.dtype == torch.bfloat16
    products = [dtypes for name, dtypes in card.operations if name in ("aten.mm", "aten.addmm")]
    assert set(products[-1]) == {torch.bfloat16}
