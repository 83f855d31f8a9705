"""What single files hold beside a model: leftovers stay unread, what would change pictures is refused by name."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import CheckpointError
from ..models.config import ScheduleConfig
from ..warn import warn
from . import ldm
from .tensors import TensorFile

_NESTED, _TEXT = "state_dict.", "cond_stage_model."
_LEFTOVERS = (  # of training and of the original's sampling
    *("model_ema.", "alphas_cumprod", "betas", "sqrt_", "log_one_minus_alphas_cumprod", "posterior_", "logvar"),
    *("lvlb_weights", "scale_factor", "global_step", "epoch", "optimizer", "lr_scheduler", "loss.", "callbacks."),
    *("v_pred", "ztsnr"),  # which ``schedule_of`` reads
)
_CHANGING = (  # by a part of a name
    (("lora_", ".lora.", "hada_w", "lokr_", "oft_"), "of a LoRA: take it out, and give it by loras="),
    (
        ("string_to_param", "emb_params", "embedding_manager."),
        "of an embedding: take it out, and import it as a concept",
    ),
    (("control_model.",), "of a ControlNet: take it out"),
    (("ip_adapter.", "image_proj."), "of an IP-Adapter: take it out, and load it with engine.IPAdapter"),
    (("hypernetwork",), "of a hypernetwork, which is not supported: take it out"),
)
_OTHER_MODELS = {
    "cond_stage_model.model.": "Stable Diffusion 2; load its diffusers folder",
    "conditioner.": "SDXL, which is not supported",
    "model.diffusion_model.joint_blocks.": "Stable Diffusion 3, which is not supported",
    "model.diffusion_model.double_blocks.": "FLUX, which is not supported",
}
_UNUSED = ("logit_scale", "text_projection", "text_projection.weight")  # CLIP's, of its comparison with pictures


def open_single_file(file: TensorFile) -> TensorFile:
    """A file whose names, where a trainer has put them under "state_dict.", are the model's own.

    Raises:
        CheckpointError: it is of another kind of model, holds its EMA alone, or something beside the model that would
            change pictures.
    """
    if all(name.startswith(_NESTED) for name in file.entries):
        file.entries = {name.removeprefix(_NESTED): entry for name, entry in file.entries.items()}
    for prefix, what in _OTHER_MODELS.items():
        if found := next((name for name in file.entries if name.startswith(prefix)), None):
            raise CheckpointError(f"{file.path}: {found}: this is {what}")
    if not any(name.startswith(ldm.UNET_PREFIX) for name in file.entries):
        rule = f"not an SD checkpoint in the original layout: no {ldm.UNET_PREFIX}* tensors"
        ema = "; it holds their moving averages alone (model_ema.*), under names without dots"
        has_ema = any(name.startswith("model_ema.diffusion_model") for name in file.entries)
        raise CheckpointError(f"{file.path}: {rule}{ema if has_ema else ''}")
    strays = [name for name in file.entries if not name.startswith((ldm.UNET_PREFIX, ldm.VAE_PREFIX, _TEXT))]
    for name in strays:
        for parts, what in _CHANGING:
            if any(part in name for part in parts):
                raise CheckpointError(f"{file.path}: {name} is {what}")
    _warn_of(file, [name for name in strays if not name.startswith(_LEFTOVERS)])
    return file


def is_unused(name: str) -> bool:
    """Whether a tensor under the text encoder's prefix, or the VAE's, plays no part in drawing."""
    return name.endswith(tuple(f".{one}" for one in _UNUSED)) or name.startswith(f"{ldm.VAE_PREFIX}loss.")


def schedule_of(file: TensorFile) -> ScheduleConfig:
    """SD v1's, unless the file is marked as one of v-prediction, and of zero terminal SNR."""
    if "v_pred" not in file.entries:
        return ScheduleConfig()
    return ScheduleConfig(prediction_type="v_prediction", rescale_betas_zero_snr="ztsnr" in file.entries)


def _warn_of(file: TensorFile, names: Sequence[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        warn(f"{file.path}: left unread, as no part of SD v1: {', '.join(names[:3])}{more}")
