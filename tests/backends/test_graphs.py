"""Steps replayed from fixed buffers. Without a GPU a trace stands in for the captured graph.

Like a captured graph, a trace runs the same operations on the same memory again: whatever the step reads from anywhere
but its buffers, and whatever it decided in Python, is frozen in it. And no step that waits for a value has a trace.
"""

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import engine
from benchmarks.systems import default_request
from engine.backends.graphs import Graphs, run_eagerly, signature
from engine.engine import Engine
from engine.methods.concept_cache import Texts
from engine.sampling.join import make_phase
from engine.sampling.plan import make_plans
from engine.sampling.samplers import make_table
from engine.sampling.step import State, guided_step
from tests.controlnets import hint, random_controlnet
from tests.ip_adapters import picture, random_adapter
from tests.pipelines import random_concept


def _trace(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    with torch.no_grad():
        trace = make_fx(function)()
        results = function()
    tensors = results if isinstance(results, tuple) else (results,)

    def replay() -> None:
        again = trace()
        for target, source in zip(tensors, again if isinstance(again, tuple | list) else (again,), strict=True):
            target.copy_(source)

    return replay, results


@pytest.fixture
def plain(small_folder: Any) -> Engine:
    return engine.load(small_folder, backend="torch")


@pytest.fixture
def graphed(plain: Engine) -> Engine:
    parts = (plain.name, plain.unet, plain.vae, plain.text_encoder, plain.schedule, plain.backend)
    return Engine(*parts, Graphs(lambda: _trace))


def _draw(sd: Engine, prompt: str = "a cat", **options: Any) -> torch.Tensor:
    options = {"steps": 4, "seed": 0, "output": "latent", "progress": False} | options
    return sd.generate(prompt, **options).latents


def test_what_changes_in_value_captures_nothing(plain: Engine, graphed: Engine) -> None:
    graphs = graphed.graphs
    assert graphs is not None
    for change in (
        {},
        {"prompt": "a red dog"},
        {"negative_prompt": "blurry", "guidance_scale": 3.0},
        {"seed": 7},
        {"steps": 60},
        {"steps": 2},
        {"image": torch.zeros(64, 64, 3).numpy(), "strength": 0.5, "height": 64, "width": 64},
    ):
        changes = {"height": 64, "width": 64} | change
        torch.testing.assert_close(_draw(graphed, **changes), _draw(plain, **changes), rtol=1e-4, atol=1e-4)
        assert len(graphs) == 1, changes


def test_masks_are_values(plain: Engine, graphed: Engine) -> None:
    """Another mask, picture or strength is drawn by the same graph, which one without a mask has not."""
    picture = np.random.default_rng(0).random((16, 16, 3)).astype(np.float32)
    for columns, strength in ((4, 1.0), (9, 1.0), (9, 0.5)):
        mask = np.zeros((16, 16), np.float32)
        mask[:, :columns] = 1
        options = {"image": picture, "mask": mask, "strength": strength, "steps": 4}
        torch.testing.assert_close(_draw(graphed, **options), _draw(plain, **options), rtol=1e-4, atol=1e-4)
    assert len(graphed.graphs) == 1
    _draw(graphed)
    assert len(graphed.graphs) == 2


def test_concepts_switch_without_a_capture(plain: Engine, graphed: Engine) -> None:
    drawn = []
    for seed in (0, 1, 0):
        custom = {"customization": engine.Infusion([random_concept(plain, seed)])}
        drawn.append(_draw(graphed, **custom))
        torch.testing.assert_close(drawn[-1], _draw(plain, **custom), rtol=1e-4, atol=1e-4)
    assert len(graphed.graphs) == 1
    assert torch.equal(drawn[0], drawn[2])
    assert (drawn[0] - drawn[1]).abs().max() > 1e-3


def test_dci_has_a_graph_a_phase_and_strengths_are_values(plain: Engine, graphed: Engine) -> None:
    drawn = []
    for strength in (-1.0, 2.0):
        custom = {"customization": engine.DCI("cat", "dog", strength=strength, fraction=0.5)}
        drawn.append(_draw(graphed, **custom))
        torch.testing.assert_close(drawn[-1], _draw(plain, **custom), rtol=1e-4, atol=1e-4)
    assert len(graphed.graphs) == 2
    assert not torch.equal(*drawn)


def test_hints_and_weights_of_a_net_are_values(
    plain: Engine, graphed: Engine, small_folder: Any, tmp_path: Any
) -> None:
    """A graph for the steps with the net and one for those without; another net has one of its own."""
    nets = [random_controlnet(plain, tmp_path / str(seed), small_folder, seed) for seed in range(2)]
    drawn = []
    for seed, weight in ((0, 1.0), (1, 1.0), (1, 0.3)):
        control = {"control": engine.Control(nets[0], hint(seed), weight, end=0.5), "steps": 4 + seed}
        drawn.append(_draw(graphed, **control))
        torch.testing.assert_close(drawn[-1], _draw(plain, **control), rtol=1e-4, atol=1e-4)
    assert len(graphed.graphs) == 2
    assert (drawn[1] - drawn[2]).abs().max() > 1e-3
    control = {"control": engine.Control(nets[1], hint())}
    torch.testing.assert_close(_draw(graphed, **control), _draw(plain, **control), rtol=1e-4, atol=1e-4)
    assert len(graphed.graphs) == 3


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m", "unipc", "lcm"])
def test_samplers(plain: Engine, graphed: Engine, sampler: str) -> None:
    for steps in (3, 5):
        options = {"sampler": sampler, "steps": steps}
        torch.testing.assert_close(_draw(graphed, **options), _draw(plain, **options), rtol=1e-4, atol=1e-4)
    assert len(graphed.graphs) == 1


def test_pictures_to_draw_like_switch_without_a_capture(plain: Engine, graphed: Engine) -> None:
    adapter, drawn = random_adapter(plain, "plus"), []
    for seed, scale in ((0, 1.0), (1, 1.0), (0, 0.5)):
        like = {"image_prompts": engine.ImagePrompt(adapter, picture(seed), scale)}
        drawn.append(_draw(graphed, **like))
        torch.testing.assert_close(drawn[-1], _draw(plain, **like), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(drawn[0], drawn[1], rtol=1e-2)
    assert not torch.allclose(drawn[0], drawn[2], rtol=1e-2)
    assert len(graphed.graphs) == 1


def test_sizes_rows_and_samplers_have_graphs_of_their_own(graphed: Engine) -> None:
    for options in ({}, {"height": 64, "width": 32}, {"images_per_prompt": 2}, {"guidance_scale": 1.0}):
        _draw(graphed, **options)
    _draw(graphed, sampler="dpmpp_2m")
    assert len(graphed.graphs) == 5


def test_pictures_are_decoded_by_a_graph(plain: Engine, graphed: Engine) -> None:
    for change in ({}, {"seed": 3}, {"images_per_prompt": 2, "vae_slicing": True}):
        options = {"steps": 1, "output": "numpy", "progress": False, "seed": 0} | change
        ours, theirs = (sd.generate("a cat", **options).images for sd in (graphed, plain))
        assert abs(ours - theirs).max() < 1e-4
    names = [captured.name for captured in graphed.graphs.captured]
    assert [name.split(",")[0] for name in names].count("VAE decoder") == 1


def test_rows_at_different_steps_share_a_graph(plain: Engine) -> None:
    table = make_table("dpmpp_2m", plain.schedule, 6)
    request = default_request(plain, "a cat", images_per_prompt=2, seed=0)
    (plan,) = make_plans(request, 6, Texts(plain.text_encoder), plain.concepts, plain.device)
    with torch.no_grad():
        phase = make_phase(plan.rows, table.coefficients, plain.unet.time_shifts(table.timesteps))
        x, graphs = torch.randn(2, 4, 8, 8), Graphs(lambda: _trace)
        history = torch.randn(1, 2, 4, 8, 8)

        def step(one: Any, state: State) -> Any:
            return guided_step(plain.unet, one, state)

        for positions in ([0, 0], [1, 4], [5, 2]):
            state = State(x, history, torch.tensor(positions), None)
            together, kept, _ = graphs("step", step, phase, state)
            for i, position in enumerate(positions):
                alone = run_eagerly("step", step, phase, replace(state, positions=torch.full((2,), position)))
                torch.testing.assert_close(together[i], alone[0][i], rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(kept[:, i], alone[1][:, i], rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1


def test_requests_may_interleave(plain: Engine, graphed: Engine) -> None:
    expected = {prompt: _draw(plain, prompt) for prompt in ("a cat", "a dog", "a boat")}
    nested: list[torch.Tensor] = []

    def draw_another(step: int, _total: int, _latents: torch.Tensor) -> None:
        if step == 1:
            nested.append(_draw(graphed, "a dog"))

    outer = _draw(graphed, callback=draw_another)
    torch.testing.assert_close(outer, expected["a cat"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(nested[0], expected["a dog"], rtol=1e-4, atol=1e-4)
    drawn: dict[str, torch.Tensor] = {}
    threads = [threading.Thread(target=lambda p=p: drawn.update({p: _draw(graphed, p)})) for p in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for prompt, latents in expected.items():
        torch.testing.assert_close(drawn[prompt], latents, rtol=1e-4, atol=1e-4)


def test_steps_that_record_run_eagerly(graphed: Engine) -> None:
    out = graphed.generate("a cat", steps=2, attention_words=["cat"], output="latent", progress=False)
    assert out.attention is not None
    assert len(graphed.graphs) == 0


def test_warmup_reports_what_it_prepared(plain: Engine, graphed: Engine) -> None:
    arguments = {"steps": 2, "customization": engine.DCI("cat", "dog", fraction=0.5), "seed": 0}
    first = graphed.warmup("a cat", **arguments)
    names = [captured.name for captured in first.captured]
    assert names == ["step of 3 rows, latents 8x8", "step of 2 rows, latents 8x8", "VAE decoder, latents 8x8"]
    assert all(0 < captured.seconds <= first.seconds for captured in first.captured)
    assert graphed.warmup("a cat", **arguments).captured == ()
    assert plain.warmup("a cat", steps=1).captured == ()


def test_the_least_recently_used_graph_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.backends.graphs._MAX_GRAPHS", 2)
    graphs = Graphs(lambda: partial(_trace))  # a pool of its own for each

    def double(_constants: None, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    for size in (1, 2, 1, 3, 1, 2):
        x = torch.full((size,), float(size))
        assert torch.equal(graphs("double", double, None, x), 2 * x)
    assert len(graphs) == 2
    assert len(graphs.captured) == 4  # 1, 2, 3, and 2 again
    graphs.clear()
    assert len(graphs) == 0


def test_a_signature_is_shapes_and_plain_values() -> None:
    x, y = torch.zeros(2, 3), torch.ones(2, 3)
    assert signature((x, None, 1)) == signature((y, None, 1))
    for other in ((x[:1], None, 1), (x.double(), None, 1), (x, 0, 1), (x, None, 2)):
        assert signature((x, None, 1)) != signature(other)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_graphs_need_a_gpu(small_folder: Any) -> None:
    with pytest.raises(RuntimeError, match="graphs need a CUDA device, got cpu"):
        engine.load(small_folder, graphs=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_captured_graphs(small_folder: Any, backend: str) -> None:
    eager, captured = (engine.load(small_folder, device="cuda", backend=backend, graphs=on) for on in (False, True))
    for seed in (0, 1):
        for custom in (None, engine.Infusion([random_concept(eager, seed)]), engine.DCI("cat", "dog", fraction=0.5)):
            drawn = [_draw(sd, customization=custom, seed=seed).float() for sd in (eager, captured)]
            assert float((drawn[0] - drawn[1]).norm() / drawn[0].norm()) < 1e-2
    assert len(captured.graphs.captured) == 4  # plain, Infusion, and DCI's first phase; its second is plain
