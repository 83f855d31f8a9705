"""What a step should take on a card, read from machine code before any card has run it: ``python -m benchmarks.sass``.

Writes ``benchmarks/results/sass-<triton's version>.json`` and the tables of docs/performance.md. Each launch of a step
(``launches.py``) is compiled (``compile_kernels.py``), its loops are read (``disassembly.py``), and what its first
program does is counted (``interpreted.py``). Its time is the largest of four bounds, of the multiprocessor that has
most of its programs:

- tensor cores: FLOPs of whole tiles at the rate of a large product, as measured;
- memory: its tensors once, or what its programs load and store if that is less, at the rate of a copy, as measured;
- exp: special functions (MUFU), 16 a cycle;
- issue: instructions, of four schedulers one a cycle each.

Nothing waits in this model: no latency, no barrier, no conflict, and what is in the cache comes from memory. What torch
computes is its FLOPs at a share of the measured product, or its bytes. How far off all this is is unknown until
measured.
"""

from __future__ import annotations

import argparse
import datetime
import math
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any

import torch
import triton

from benchmarks import report
from benchmarks.compile_kernels import ARCHITECTURES, Configuration, compile_launch, disassemble, key_of, resources
from benchmarks.disassembly import Code, count_families, parse
from benchmarks.interpreted import Counts, count_programs, shape_key
from benchmarks.launches import (
    SD_V1_5,
    SD_V1_5_VAE,
    Launch,
    count_kinds,
    decode_launches,
    kind_of,
    step_launches,
)
from benchmarks.machine import RESULTS, commit, write_result

_ARCHITECTURE, _DTYPE, _LATENTS = 90, "fp16", 64
_WARPS = 4  # Triton's own choice, where a launch makes none
_DCI_FRACTION = 0.2  # of the steps, as benchmarks.test_gpu takes it


@dataclass(frozen=True, slots=True)
class CardRates:
    """Of an H200, by what was measured on one in this project (products, copies, clock) or is its architecture's.

    Attributes:
        processors: multiprocessors.
        hertz: as read just after large products.
        flops: a second, of a large product.
        n_bytes: a second, of a copy.
        exps: special functions a cycle and multiprocessor.
        issues: warps' instructions a cycle and multiprocessor.
        warp_products: share of ``flops`` that single warps' products (HMMA) reach on Hopper, about (Luo et al. 2024,
            arXiv:2402.13499); assumed.
        library_share: of ``flops`` that cuDNN's convolutions and cuBLAS' products reach; assumed.
        gap_seconds: between two kernels of a graph; assumed.
    """

    processors: int = 132
    hertz: float = 1.98e9
    flops: float = 790e12
    n_bytes: float = 4.3e12
    exps: int = 16
    issues: int = 4
    warp_products: float = 0.62
    library_share: float = 0.7
    gap_seconds: float = 1e-6


H200 = CardRates()


@dataclass(frozen=True, slots=True)
class Kernel:
    """What the machine code of one configuration says; ``loop_*`` are of its main loop, all of it where it has none."""

    instructions: int
    loop_instructions: int
    loop_flops: float
    hgmma: int
    hmma: int
    mufu: int
    all_mufu: int

    @classmethod
    def of(cls, code: Code, warps: int) -> Kernel:
        loop = code.main_loop()
        within = code.within(loop)
        families = count_families(within)
        return cls(
            instructions=len(code.instructions),
            loop_instructions=0 if loop is None else len(within),
            loop_flops=0.0 if loop is None else sum(one.flops(warps) for one in within),
            hgmma=families["HGMMA"],
            hmma=families["HMMA"],
            mufu=families["MUFU"],
            all_mufu=count_families(code.instructions)["MUFU"],
        )

    def trips(self, counts: Counts) -> float:
        """How often a program goes round the main loop."""
        if self.loop_flops:
            return counts.flops / self.loop_flops
        return float(max(1, counts.iterations)) if self.loop_instructions else 0.0

    def total(self, all_of: int, in_loop: int, counts: Counts) -> float:
        """Of what a warp does, by how much there is in all of the code and in the main loop."""
        return all_of + in_loop * max(0.0, self.trips(counts) - 1) if self.loop_instructions else float(all_of)


def bounds(launch: Launch, kernel: Kernel, counts: Counts, card: CardRates = H200) -> dict[str, float]:
    """Seconds of a launch by what might hold it back."""
    most = math.ceil(launch.n_programs / card.processors)  # programs of one multiprocessor
    warps = launch.options.get("num_warps", _WARPS)
    mufu = kernel.total(kernel.all_mufu, kernel.mufu, counts) * warps * 32
    issued = kernel.total(kernel.instructions, kernel.loop_instructions, counts) * warps
    rate = card.flops * (card.warp_products if kernel.hmma > kernel.hgmma else 1.0) / card.processors
    moved = min(launch.n_bytes, (counts.loaded_bytes + counts.stored_bytes) * launch.n_programs)
    return {
        "tensor": most * counts.flops / rate,
        "memory": moved / card.n_bytes,
        "exp": most * mufu / card.exps / card.hertz,
        "issue": most * issued / card.issues / card.hertz,
    }


def library_seconds(launch: Launch, card: CardRates = H200) -> float:
    """One of torch's own: its products at a share of the card's, or its bytes."""
    return max(launch.flops / (card.flops * card.library_share), launch.n_bytes / card.n_bytes)


def predict(launches: Iterable[Launch], kernels: dict[Any, Kernel], counts: dict[Any, Counts]) -> dict[str, Any]:
    """A step's time by kind, and how many kernels it has."""
    launches = list(launches)
    seconds = dict.fromkeys(count_kinds(()), 0.0)
    for one in launches:
        found = bounds(one, kernels[key_of(one)], counts[shape_key(one)]) if one.is_ours else {"": library_seconds(one)}
        seconds[kind_of(one.kernel)] += max(found.values())
    gaps = len(launches) * H200.gap_seconds
    return {
        "kernels": count_kinds(one.kernel for one in launches),
        "ms": {kind: round(1e3 * one, 4) for kind, one in seconds.items()},
        "gaps_ms": round(1e3 * gaps, 3),
        "predicted_ms": round(1e3 * (sum(seconds.values()) + gaps), 3),
    }


def cases(dtype: torch.dtype = torch.float16) -> dict[str, list[Launch]]:
    """What is predicted, by the names that the GPU's table has."""
    return {
        "guided_step": step_launches(SD_V1_5, dtype, "plain"),
        "infusion_parallel_1": step_launches(SD_V1_5, dtype, "infusion"),
        "dci_mixing_step": step_launches(SD_V1_5, dtype, "dci"),
        "vae_decode": decode_launches(SD_V1_5_VAE, dtype, (_LATENTS, _LATENTS)),
    }


_ASKED: list[tuple[Launch, int]] = []


def _analyse(number: int) -> tuple[dict[str, int], Kernel | None]:
    launch, architecture = _ASKED[number]
    compiled = compile_launch(launch, architecture)
    warps = launch.options.get("num_warps", _WARPS)
    kernel = Kernel.of(parse(disassemble(compiled)), warps) if architecture == _ARCHITECTURE else None
    return resources(compiled), kernel


def analyse(asked: list[tuple[Launch, int]]) -> dict[Any, dict[int, Any]]:
    """What each configuration takes, by its key and architecture, and on Hopper what its code says."""
    _ASKED[:] = {(key_of(launch), architecture): (launch, architecture) for launch, architecture in asked}.values()
    torch.set_num_threads(1)  # forked processes have no other threads
    with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
        found = list(pool.map(_analyse, range(len(_ASKED))))
    by_key: dict[Any, dict[int, Any]] = {}
    for (launch, architecture), one in zip(_ASKED, found, strict=True):
        by_key.setdefault(key_of(launch), {})[architecture] = one
    return by_key


def kernel_rows(
    launches: list[Launch], analysed: dict[Any, dict[int, Any]], counts: dict[Any, Counts]
) -> list[dict[str, Any]]:
    """A line for each configuration that the launches have, the longest first."""
    rows = []
    for key in dict.fromkeys(key_of(one) for one in launches if one.is_ours):
        mine = [one for one in launches if one.is_ours and key_of(one) == key]
        one, kernel = Configuration(_DTYPE, mine[0]), analysed[key][_ARCHITECTURE][1]
        found = [bounds(one, kernel, counts[shape_key(one)]) for one in mine]
        i = max(range(len(mine)), key=lambda i: max(found[i].values()))
        work = counts[shape_key(mine[i])]
        rows.append(
            {
                "kernel": one.launch.kernel,
                "constants": one.constants,
                "numbers": one.numbers,
                "launches": len(mine),
                "usage": {str(a): analysed[key][a][0] for a in sorted(analysed[key])},
                "loop": {name: getattr(kernel, name) for name in ("loop_instructions", "hgmma", "hmma", "mufu")},
                "trips": round(kernel.trips(work), 2),
                "tile_flops": work.flops,
                "tile_bytes": work.loaded_bytes + work.stored_bytes,
                "programs": mine[i].n_programs,
                "bounds_us": {name: round(1e6 * seconds, 3) for name, seconds in found[i].items()},
                "step_us": round(1e6 * sum(max(one.values()) for one in found), 2),
            }
        )
    return sorted(rows, key=lambda row: -row["step_us"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architectures", type=int, nargs="*", default=ARCHITECTURES, choices=ARCHITECTURES)
    arguments = parser.parse_args()
    found = cases()
    everything = [one for launches in found.values() for one in launches if one.is_ours]
    distinct = {shape_key(one): one for one in everything}
    counts = dict(zip(distinct, count_programs(list(distinct.values())), strict=True))
    others = [one for one in arguments.architectures if one != _ARCHITECTURE]
    asked = [(one, _ARCHITECTURE) for one in everything]
    analysed = analyse([*asked, *((one, a) for one in found["guided_step"] if one.is_ours for a in others)])
    kernels = {key: each[_ARCHITECTURE][1] for key, each in analysed.items()}
    steps = {name: predict(launches, kernels, counts) for name, launches in found.items()}
    dci, plain = (steps[name]["predicted_ms"] for name in ("dci_mixing_step", "guided_step"))
    content = {
        "triton": triton.__version__,
        "dtype": _DTYPE,
        "card": asdict(H200),
        "steps": steps,
        "dci_average_ms": round(_DCI_FRACTION * dci + (1 - _DCI_FRACTION) * plain, 3),
        "kernels": kernel_rows(found["guided_step"], analysed, counts),
    }
    path = RESULTS / f"sass-{triton.__version__}.json"
    about = {"date": datetime.date.today().isoformat(), "commit": commit(), "versions": {"triton": triton.__version__}}
    write_result(path, about, {"sass": content})
    print(report.tables()["sass"])
    report.main([])


if __name__ == "__main__":
    main()
