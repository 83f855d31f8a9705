"""Whether an implementation is right, how fast each is, and which serves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .calls import Call, outputs, reference
from .contenders import OURS, TORCHS_OWN
from .inputs import copies, guarding, is_guarded, make_inputs

_MARGIN = 0.97  # of another's time, that one must be below to be faster
_QUERIES = 512  # at a time, of the exact attention, whose map is in memory
_ROUNDS = 9
_REPLAY_SECONDS = 2e-4  # of one graph, at least: events tell times apart from about a microsecond on
_CALLS = (4, 20)  # in one graph
_MOST_BYTES = 1 << 30  # of all copies of the inputs


class Proof:
    """What a call's contenders are held against: inputs, the exact results, and what eager code errs by.

    Args:
        call: what is called.
        device: the card.
    """

    def __init__(self, call: Call, device: torch.device) -> None:
        self.call, self.inputs, self.device = call, make_inputs(call, device), device
        self.exact = _exact(call.op, self.inputs)
        eager = list(outputs(reference(call.op)(*copies(self.inputs))))
        self.allowed = [
            2 * _error(x, exact) + torch.finfo(x.dtype).eps * float(exact.abs().max())
            for x, exact in zip(eager, self.exact, strict=True)
        ]

    def is_wrong(self, function: Callable[..., Any]) -> str | None:
        """What is wrong with an implementation, None where nothing is.

        It may err twice as much as eager code in the same dtype, against float64; must read and write within its
        tensors; and must give the same bits again.
        """
        runs = []
        for _ in range(2):
            arguments = copies(self.inputs)
            with guarding() as made:
                results = list(outputs(function(*arguments)))
            if not all(map(is_guarded, [*(x for x in arguments if isinstance(x, Tensor)), *made])):
                return "it writes outside of its tensors"
            runs.append(results)
        for x, exact, allowed in zip(runs[0], self.exact, self.allowed, strict=True):
            if x.shape != exact.shape:
                return f"its result is {tuple(x.shape)}, not {tuple(exact.shape)}"
            if not bool(torch.isfinite(x).all()):
                return "its result has NaN or infinity, where the exact one has none"
            if (error := _error(x, exact)) > allowed:
                return f"its error is {error:.2g}, of at most {allowed:.2g}"
        if not all(torch.equal(*both) for both in zip(*runs, strict=True)):
            return "it gives other bits the second time"
        return None

    def times(self, functions: Mapping[str, Callable[..., Any]], wrong: dict[str, str]) -> dict[str, list[float]]:
        """Seconds of a call in each of some rounds, in graphs that take turns, on inputs that the cache has lost.

        What cannot be captured goes to ``wrong``.
        """
        n = _copies_past_the_cache(self.call.nbytes, self.device)
        sets, graphs = [copies(self.inputs) for _ in range(n)], {}
        for name, function in functions.items():
            try:
                graphs[name] = _capture(function, sets, self.device)
            except RuntimeError as error:
                if name == TORCHS_OWN:
                    raise
                wrong[name] = f"it cannot be captured: {error}"
        seconds: dict[str, list[float]] = {name: [] for name in graphs}
        for _ in range(_ROUNDS):
            for name, (graph, n_calls) in graphs.items():
                seconds[name].append(_timed(graph.replay) / n_calls)
        return seconds


def _exact(op: str, inputs: Sequence[Any]) -> list[Tensor]:
    """The results in float64, attention's by some queries at a time."""
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    if op != "attention":
        return list(outputs(reference(op)(*wide)))
    q, *rest = wide
    return [torch.cat([reference(op)(part, *rest) for part in q.split(_QUERIES, dim=1)], dim=1)]


def _error(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).abs().max()) if x.numel() else 0.0


def _copies_past_the_cache(nbytes: int, device: torch.device) -> int:
    """How many copies of so many bytes are larger than twice the second-level cache."""
    nbytes = max(1, nbytes)
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or (64 << 20)
    return max(1, min(-(-2 * cache // nbytes), _CALLS[1], _MOST_BYTES // nbytes))


def _capture(function: Callable[..., Any], sets: Sequence[list[Any]], device: torch.device) -> tuple[Any, int]:
    """A graph of some calls, one after the other on other memory, and how many."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for one_set in sets:  # what is made once for a weight is made now
            function(*one_set)
        one = _timed(lambda: function(*sets[0]))
        fewest, most = _CALLS
        n_calls = max(fewest, min(most, int(_REPLAY_SECONDS / max(one, 1e-9)) + 1), len(sets))
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for i in range(n_calls):
            function(*sets[i % len(sets)])
    graph.replay()
    return graph, n_calls


def _timed(run: Callable[[], Any]) -> float:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def choose(seconds: Mapping[str, Sequence[float]], wrong: Mapping[str, str]) -> tuple[str, str]:
    """Which contender serves, and why.

    torch's own does, unless another is faster by a margin, in its slow rounds too; and what is not ours comes before
    what is, again by the margin: ties go to what is tested more widely.

    Args:
        seconds: of those that are right, torch's own among them.
        wrong: what is wrong with the others.
    """
    best = TORCHS_OWN
    ours = [name for name in seconds if name.startswith(OURS)]
    for name in sorted(seconds, key=lambda name: (name in ours, median(seconds[name]))):
        if median(seconds[name]) < _MARGIN * median(seconds[best]) and _slow(seconds[name]) < median(seconds[best]):
            best = name
    if best != TORCHS_OWN:
        runner_up = min((name for name in seconds if name != best), key=lambda name: median(seconds[name]))
        ratio = median(seconds[runner_up]) / median(seconds[best])
        return best, f"{_microseconds(seconds[best])}, {ratio:.2f} times as fast as {runner_up}"
    if OURS in wrong:
        return best, f"ours is not used: {wrong[OURS]}"
    if ours:
        fastest = min((seconds[name] for name in ours), key=median)
        return best, f"{_microseconds(seconds[best])}; ours takes {_microseconds(fastest)}"
    return best, "ours has no kernel for it"


def _slow(seconds: Sequence[float]) -> float:
    """The slowest tenth's."""
    return sorted(seconds)[int(0.9 * (len(seconds) - 1))]


def _microseconds(seconds: Sequence[float]) -> str:
    return f"{1e6 * median(seconds):.1f} us"
