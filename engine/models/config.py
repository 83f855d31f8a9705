"""Model and schedule configurations, read from the JSON files of a diffusers folder.

Every size comes from these files. A field that this engine does not implement must hold the value it has in the
SD-v1 family; any other value is rejected by name, so that no model is ever drawn with the wrong arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_UNET_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "addition_embed_type": (None,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dropout": (0, 0.0),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1, 1.0),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1, 1.0),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "upcast_attention": (False, None, True),  # of SD 2.1; SDPA forms its scores in float32 anyway
    "use_linear_projection": (False, True),  # of SD 2: the same map, in files as a matrix
}
_VAE_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "latents_mean": (None,),
    "latents_std": (None,),
    "mid_block_add_attention": (True,),
    "shift_factor": (None, 0, 0.0),
    "use_post_quant_conv": (True,),
    "use_quant_conv": (True,),
}
_BETA_SCHEDULES = ("scaled_linear", "linear", "squaredcos_cap_v2")
_SCHEDULE_FIXED: dict[str, tuple[Any, ...]] = {  # of any solver: each would change what some sampler computes
    "algorithm_type": ("dpmsolver++", "deis"),
    "disable_corrector": ([],),
    "euler_at_final": (False,),
    "final_sigmas_type": ("zero",),
    "interpolation_type": ("linear",),
    "lower_order_final": (True,),
    "predict_x0": (True,),
    "sigma_max": (None,),
    "sigma_min": (None,),
    "solver_order": (2,),
    "solver_type": ("midpoint", "bh2", "logrho"),
    "thresholding": (False,),
    "timestep_scaling": (10, 10.0),
    "timestep_type": ("discrete",),
    "use_beta_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_flow_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "variance_type": (None, "fixed_small"),
}


@dataclass(frozen=True, slots=True)
class UNetConfig:
    """Sizes of a ``UNet2DConditionModel`` of the SD-v1 family."""

    in_channels: int
    out_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    transformer_layers: int
    n_heads: tuple[int, ...]  # per block; diffusers stores head counts under the name "attention_head_dim"
    cross_attention_dim: int
    down_has_attention: tuple[bool, ...]
    norm_num_groups: int
    norm_eps: float
    sample_size: int

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], source: str = "unet/config.json") -> UNetConfig:
        """Read a diffusers ``unet/config.json``; raises ``ValueError`` naming the field that does not fit."""
        read = _Reader(config, source, _UNET_FIXED)
        down = read.names("down_block_types", ("CrossAttnDownBlock2D", "DownBlock2D"))
        up = read.names("up_block_types", ("CrossAttnUpBlock2D", "UpBlock2D"))
        has_attention = tuple(name.startswith("CrossAttn") for name in down)
        if tuple(name.startswith("CrossAttn") for name in reversed(up)) != has_attention:
            raise ValueError(f"{source}: up_block_types must mirror down_block_types, got {up} beside {down}")
        n_blocks = len(down)
        heads_key = "num_attention_heads" if config.get("num_attention_heads") is not None else "attention_head_dim"
        unet = cls(
            in_channels=read.size("in_channels", 4),
            out_channels=read.size("out_channels", 4),
            block_out_channels=read.sizes("block_out_channels", n_blocks),
            layers_per_block=read.size("layers_per_block", 2),
            transformer_layers=read.size("transformer_layers_per_block", 1),
            n_heads=read.sizes(heads_key, n_blocks, default=8),
            cross_attention_dim=read.size("cross_attention_dim"),
            down_has_attention=has_attention,
            norm_num_groups=read.size("norm_num_groups", 32),
            norm_eps=read.number("norm_eps", 1e-5),
            sample_size=read.size("sample_size", 64),
        )
        read.finish({"attention_head_dim", "num_attention_heads", "addition_embed_type_num_heads"})
        for channels, heads in zip(unet.block_out_channels, unet.n_heads, strict=True):
            _check_divides(source, "block_out_channels", channels, "norm_num_groups", unet.norm_num_groups)
            _check_divides(source, "block_out_channels", channels, heads_key, heads)
        return unet


@dataclass(frozen=True, slots=True)
class VAEConfig:
    """Sizes of an ``AutoencoderKL``; ``factor`` is the picture's size over the latent's."""

    in_channels: int
    out_channels: int
    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    scaling_factor: float

    @property
    def factor(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], source: str = "vae/config.json") -> VAEConfig:
        """Read a diffusers ``vae/config.json``; raises ``ValueError`` naming the field that does not fit."""
        read = _Reader(config, source, _VAE_FIXED)
        down = read.names("down_block_types", ("DownEncoderBlock2D",))
        up = read.names("up_block_types", ("UpDecoderBlock2D",))
        if len(up) != len(down):
            raise ValueError(f"{source}: up_block_types must be as many as down_block_types, got {up} beside {down}")
        vae = cls(
            in_channels=read.size("in_channels", 3),
            out_channels=read.size("out_channels", 3),
            latent_channels=read.size("latent_channels", 4),
            block_out_channels=read.sizes("block_out_channels", len(down)),
            layers_per_block=read.size("layers_per_block", 1),
            norm_num_groups=read.size("norm_num_groups", 32),
            scaling_factor=read.number("scaling_factor", 0.18215),
        )
        read.finish({"sample_size", "force_upcast"})  # training size, and a hint for SDXL's decoder
        for channels in vae.block_out_channels:
            _check_divides(source, "block_out_channels", channels, "norm_num_groups", vae.norm_num_groups)
        return vae


@dataclass(frozen=True, slots=True)
class ScheduleConfig:
    """The training noise schedule and how sampling timesteps are laid out on it; unless given, SD v1.5's own.

    What is None is left to each sampler, whose diffusers class has a default of its own.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = None
    steps_offset: int = 1
    set_alpha_to_one: bool | None = False
    use_karras_sigmas: bool = False
    skip_prk_steps: bool = True  # whether pndm starts without its Runge-Kutta steps
    original_inference_steps: int = 50  # of latent consistency models
    rescale_betas_zero_snr: bool = False  # whether the last timestep has no signal at all

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], source: str = "scheduler/scheduler_config.json") -> ScheduleConfig:
        """Read any diffusers ``scheduler_config.json``, or the ``config`` of a scheduler in memory.

        Means what it means to diffusers' ``from_config``: where a file is silent, as SD v1.5's own is on
        ``timestep_spacing``, every scheduler class has its default, and so do the fields that a scheduler in memory
        lists as ``_use_default_values``. Betas must be said: the classes' defaults are neither SD's nor one another's.
        ``clip_sample`` is not read: clipping is for pixels, and diffusers' pipeline turns it off for latents.

        Raises:
            ValueError: a field would change a sampler's arithmetic; the message names it.
        """
        unsaid = config.get("_use_default_values") or ()
        config = {key: value for key, value in config.items() if key not in unsaid}
        read = _Reader(config, source, _SCHEDULE_FIXED)
        betas = config.get("trained_betas")
        known = None if betas is None else 1.0  # a list of betas leaves nothing to say about them
        spacing = config.get("timestep_spacing")
        prediction_type = read.choice("prediction_type", ("epsilon", "v_prediction", "sample"), "epsilon")
        if (zero_snr := bool(config.get("rescale_betas_zero_snr", False))) and prediction_type == "epsilon":
            rule = "a model that starts from no signal cannot predict noise alone: rescale_betas_zero_snr needs"
            raise ValueError(f"{source}: {rule} prediction_type 'v_prediction' or 'sample', got 'epsilon'")
        return cls(
            num_train_timesteps=read.size("num_train_timesteps", 1000),
            beta_start=read.number("beta_start", known),
            beta_end=read.number("beta_end", known),
            beta_schedule=read.choice("beta_schedule", _BETA_SCHEDULES, known and _BETA_SCHEDULES[0]),
            trained_betas=None if betas is None else tuple(float(beta) for beta in betas),
            prediction_type=prediction_type,
            timestep_spacing=spacing and read.choice("timestep_spacing", ("leading", "linspace", "trailing")),
            steps_offset=read.size("steps_offset", 0, minimum=0),
            set_alpha_to_one=None if (to_one := config.get("set_alpha_to_one")) is None else bool(to_one),
            use_karras_sigmas=bool(config.get("use_karras_sigmas", False)),
            skip_prk_steps=bool(config.get("skip_prk_steps", False)),
            original_inference_steps=read.size("original_inference_steps", 50),
            rescale_betas_zero_snr=zero_snr,
        )


class _Reader:
    """Reads typed fields of one config file and reports the ones it does not know."""

    def __init__(self, config: Mapping[str, Any], source: str, fixed: Mapping[str, tuple[Any, ...]]) -> None:
        self.config, self.source, self.seen = config, source, set(fixed)
        for key, allowed in fixed.items():
            if key in config and allowed and config[key] not in allowed:
                rule = " or ".join(repr(value) for value in allowed)
                raise ValueError(f"{source}: {key} must be {rule} (SD-v1 family), got {config[key]!r}")

    def _get(self, key: str, default: Any) -> Any:
        self.seen.add(key)
        value = self.config.get(key)
        if value is None:
            value = default
        if value is None:
            raise ValueError(f"{self.source}: {key} is missing")
        return value

    def size(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        value = self._get(key, default)
        if isinstance(value, list | tuple) and len(set(value)) == 1:  # one size written once per block
            value = value[0]
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ValueError(f"{self.source}: {key} must be an integer >= {minimum}, got {value!r}")
        return value

    def sizes(self, key: str, count: int, default: int | None = None) -> tuple[int, ...]:
        value = self._get(key, default)
        values = (value,) * count if isinstance(value, int) else tuple(value)
        if len(values) != count or not all(isinstance(v, int) and v > 0 for v in values):
            raise ValueError(f"{self.source}: {key} must hold {count} positive integers, got {value!r}")
        return values

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"{self.source}: {key} must be a positive number, got {value!r}")
        return float(value)

    def choice(self, key: str, choices: tuple[str, ...], default: Any = None) -> str:
        value = self._get(key, default)
        if value not in choices:
            raise ValueError(f"{self.source}: {key} must be one of {', '.join(choices)}, got {value!r}")
        return value

    def names(self, key: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
        values = self._get(key, None)
        if not values or any(value not in allowed for value in values):
            raise ValueError(f"{self.source}: {key} must hold only {', '.join(allowed)}, got {values!r}")
        return tuple(values)

    def finish(self, ignored: set[str]) -> None:
        """Reject fields nobody read, unless they are off; names that start with "_" are diffusers' own notes."""
        unread = set(self.config) - self.seen - ignored
        for key in sorted(unread):
            if not key.startswith("_") and self.config[key] not in (None, False):
                raise ValueError(f"{self.source}: {key} = {self.config[key]!r} is not part of the SD-v1 family")


def _check_divides(source: str, name: str, value: int, divisor_name: str, divisor: int) -> None:
    if value % divisor:
        raise ValueError(f"{source}: {name} must be multiples of {divisor_name} = {divisor}, got {value}")
