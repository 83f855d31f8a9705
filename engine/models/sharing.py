"""A network with other values of some weights, which shares all else with the one it is made of."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor, nn


def with_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a network in which some parameters, by their names in its state dict, have other values.

    All other parameters are shared, and so are whole modules below which nothing differs, with what they keep.
    """
    modules, differing = dict(network.named_modules()), defaultdict[str, dict[str, Tensor]](dict)
    for name, weight in weights.items():
        owner = name
        while owner not in modules:  # a packed weight is its layer's, which unpacks it in the state dict
            owner = owner.rpartition(".")[0]
        differing[owner][name[len(owner) + 1 :]] = weight
    above = {owner[:end] for owner in differing for end in (0, *_ends(owner))}
    below = tuple(f"{owner}." for owner in differing)  # where a packed weight is
    shared = [module for name, module in modules.items() if name not in above and not name.startswith(below)]
    shared += [module.ops for module in modules.values() if hasattr(module, "ops")]
    memo = {id(one): one for one in (*shared, *network.parameters(), *network.buffers())}
    other = copy.deepcopy(network, memo)
    for owner, own in differing.items():
        module = other.get_submodule(owner)
        module.load_state_dict(module.state_dict(keep_vars=True) | own, strict=True, assign=True)
    return other.requires_grad_(False)


def _ends(name: str) -> list[int]:
    """Where the names of the modules above one, and its own, end in its name."""
    return [at for at, letter in enumerate(name) if letter == "."] + [len(name)]
