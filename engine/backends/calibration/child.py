"""The process that proves and times: what goes wrong in it, up to the loss of its CUDA context, ends nothing else.

It reads a line of JSON for each call, and writes lines: which contender it tries, and last what serves and why. The
first line it reads says which card, and the process-wide flags that products depend on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, TextIO

import torch

from .calls import Call
from .contenders import OURS, TORCHS_OWN, contenders
from .flags import set_flags
from .proof import Proof, choose


def answer(read: TextIO, write: TextIO) -> None:
    """Answer calls until there are no more, or until the card's context is lost."""

    def say(**line: Any) -> None:
        write.write(json.dumps(line) + "\n")
        write.flush()

    about = json.loads(read.readline())
    device = torch.device(about["device"])
    torch.cuda.set_device(device)
    set_flags(about["flags"])
    say(ready=True)
    for line in read:
        asked = json.loads(line)
        wrong: dict[str, str] = asked["wrong"]
        if not _prove(Call.from_json(asked), device, wrong, say):
            return


@torch.no_grad()
def _prove(call: Call, device: torch.device, wrong: dict[str, str], say: Callable[..., None]) -> bool:
    """Prove and time one call, without those that are known to be ``wrong``; False where the context is lost."""
    functions = {name: function for name, function in contenders(call).items() if name not in wrong}
    try:
        say(trying=TORCHS_OWN)
        proof = Proof(call, device)
        for name in [name for name in functions if name != TORCHS_OWN]:
            say(trying=name)
            if (reason := _reason(proof, functions[name], device)) is not None:
                wrong[name] = reason
                del functions[name]
        say(trying=OURS if OURS in functions else TORCHS_OWN)  # the likeliest cause of what happens next
        serves, why = choose(proof.times(functions, wrong), wrong)
    except Exception as error:  # whatever a launch or an allocation may raise
        lost = _is_lost(device)
        say(error=_first_line(error), lost=lost)
        return not lost
    say(serves=serves, why=why, wrong=wrong)
    return True


def _reason(proof: Proof, function: Callable[..., Any], device: torch.device) -> str | None:
    """What is wrong with a contender. Errors are, too, unless the card's context is gone with them."""
    try:
        reason = proof.is_wrong(function)
        torch.cuda.synchronize(device)
    except Exception as error:  # whatever a compiler or a launch may raise
        if _is_lost(device):
            raise
        return _first_line(error)
    return reason


def _is_lost(device: torch.device) -> bool:
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    answer(sys.stdin, sys.stdout)
