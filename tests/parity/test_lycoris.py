"""LyCORIS' forms against lycoris-lora: its own files, and the UNet that it changes."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import engine
from tests.pipelines import relative_error, save_pipeline

_TOLERANCE = 2e-5

FORMS: dict[str, dict] = {  # what makes lycoris-lora write each
    "lora": {"algo": "lora"},
    "locon": {"algo": "locon", "conv_dim": 3, "conv_alpha": 2},
    "locon with a Tucker core": {"algo": "locon", "conv_dim": 3, "conv_alpha": 2, "use_tucker": True},
    "locon, alpha over the rank's root": {"algo": "locon", "conv_dim": 3, "rs_lora": True},
    "loha": {"algo": "loha", "conv_dim": 3, "conv_alpha": 2},
    "loha with a Tucker core": {"algo": "loha", "conv_dim": 3, "use_tucker": True},
    "lokr": {"algo": "lokr", "conv_dim": 2, "factor": 3},
    "lokr of four factors": {"algo": "lokr", "conv_dim": 1, "linear_dim": 1, "factor": 6, "decompose_both": True},
    "lokr with a Tucker core": {"algo": "lokr", "conv_dim": 1, "factor": 2, "use_tucker": True},
    "lokr, whole": {"algo": "lokr", "full_matrix": True, "factor": 4, "conv_dim": 100},
    "differences": {"algo": "full", "train_norm": True},
    "dora": {"algo": "locon", "dora_wd": True, "conv_dim": 3},
    "dora over inputs": {"algo": "locon", "dora_wd": True, "wd_on_output": False, "conv_dim": 3},
    "dora of loha": {"algo": "loha", "dora_wd": True, "conv_dim": 3},
    "dora of lokr": {"algo": "lokr", "dora_wd": True, "conv_dim": 2, "factor": 4},
}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lycoris")
    return save_pipeline("narrow", folder).unet, engine.load(folder)


def write_lycoris(unet: torch.nn.Module, path: Path, prefix: str = "lora_unet", seed: int = 0, **form):
    """Change a UNet by LyCORIS with random numbers, and write its file."""
    from lycoris import LycorisNetwork, create_lycoris

    LycorisNetwork.apply_preset({"lora_prefix": prefix})
    torch.manual_seed(seed)
    network = create_lycoris(unet, form.pop("multiplier", 1.0), **{"linear_dim": 4, "linear_alpha": 2, **form})
    network.apply_to()
    for module in network.loras:
        for name, parameter in module.named_parameters():
            if name != "dora_scale":
                parameter.data += 0.3 * parameter.data.std().nan_to_num(0.0) * torch.randn_like(parameter)
                parameter.data += 0.05 * torch.randn_like(parameter)
            else:
                parameter.data *= 1 + 0.2 * torch.rand_like(parameter)
    network.save_weights(str(path), None, {})
    return network


@torch.no_grad()
def _compare(both, path: Path, weight: float, **form) -> tuple[float, float]:
    theirs, sd = both
    sample, context = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32)
    plain = theirs(sample, 481, context).sample
    theirs = copy.deepcopy(theirs)
    write_lycoris(theirs, path, multiplier=weight, **form)
    expected = theirs(sample, 481, context).sample
    actual = sd.with_loras([engine.LoRA(path, weight)]).unet(sample, 481, context)
    return relative_error(actual, expected), relative_error(plain, expected)


@pytest.mark.parametrize("weight", [1.0, 0.6])
@pytest.mark.parametrize("form", FORMS)
def test_every_form(both, tmp_path: Path, form: str, weight: float, agrees) -> None:
    error, effect = _compare(both, tmp_path / "x.safetensors", weight, **FORMS[form])
    assert effect > 0.05
    agrees(f"LyCORIS {form}, UNet", "lycoris-lora's create_lycoris", error, _TOLERANCE)


_HOLDS = {
    "lora": "lora_up.weight",
    "locon": "conv1.lora_down.weight",
    "locon with a Tucker core": "conv1.lora_mid.weight",
    "locon, alpha over the rank's root": "conv1.lora_up.weight",
    "loha": "conv1.hada_w1_a",
    "loha with a Tucker core": "conv1.hada_t1",
    "lokr": "conv1.lokr_w2_a",
    "lokr of four factors": "lokr_w1_a",
    "lokr with a Tucker core": "conv1.lokr_t2",
    "lokr, whole": "conv1.lokr_w2",
    "differences": "conv1.diff_b",
    "dora": "conv1.dora_scale",
    "dora over inputs": "conv1.dora_scale",
    "dora of loha": "conv1.hada_w1_a",
    "dora of lokr": "conv1.lokr_w1",
}


@pytest.mark.parametrize("form", FORMS)
def test_files_hold_what_their_names_say(both, tmp_path: Path, form: str) -> None:
    write_lycoris(copy.deepcopy(both[0]), tmp_path / "x.safetensors", **FORMS[form])
    keys = load_file(tmp_path / "x.safetensors").keys()
    assert any(key.endswith(_HOLDS[form]) for key in keys)
    assert ("dora" in form) == any(key.endswith(".dora_scale") for key in keys)


def test_its_own_prefix(both, tmp_path: Path) -> None:
    one, other = (tmp_path / f"{prefix}.safetensors" for prefix in ("lora_unet", "lycoris"))
    for path in (one, other):
        write_lycoris(copy.deepcopy(both[0]), path, prefix=path.stem, algo="loha")
    state, same = (both[1].with_loras([engine.LoRA(path)]).unet.state_dict() for path in (one, other))
    assert all(torch.equal(state[name], same[name]) for name in state)


def test_several_with_dora_add_up(both, tmp_path: Path) -> None:
    """Each ratio is of the weight without the others, whose changes add up."""
    theirs, sd = copy.deepcopy(both[0]), both[1]
    paths = [tmp_path / f"{i}.safetensors" for i in (0, 1)]
    for i, path in enumerate(paths):
        write_lycoris(theirs, path, multiplier=0.5 + i, seed=i, algo="locon", dora_wd=True, conv_dim=2)
    actual = sd.with_loras([engine.LoRA(path, 0.5 + i) for i, path in enumerate(paths)])
    sample, context = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32)
    with torch.no_grad():
        assert relative_error(actual.unet(sample, 3, context), theirs(sample, 3, context).sample) <= _TOLERANCE
