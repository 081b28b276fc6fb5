"""What an export decides from a model and a recipe before anything is captured, and what it refuses."""

from __future__ import annotations

from pocketune.errors import ModelError, RecipeError
from pocketune.models import unet
from pocketune.models.load import ModelFolder
from pocketune.recipe import Recipe
from pocketune.sampling.batches import NoiseSchedule
from pocketune.train import ZO_ADAM_EPSILON
from pocketune_export import manifest as m
from pocketune_export.training import BETA1, BETA2, EPSILON


def check_exportable(recipe: Recipe) -> None:
    """Refuse what the runtime on a device does not do.

    Raises:
        RecipeError: with the reason.
    """
    reasons = {
        "method": (recipe.method == "token", "its graphs train the denoiser"),
        "timestep_low": (recipe.timestep_low != 0, "devices draw from all timesteps"),
        "timestep_high": (recipe.timestep_high != 1000, "devices draw from all timesteps"),
        "gradient": (recipe.gradient == "mixed", "its graphs have one resolution"),
        "patches": (recipe.patches != "none", "devices cut whole squares"),
        "dtype": (recipe.dtype != "float32", "devices compute in float32, PyTorch would not"),
        "cache_dtype": (recipe.cache_dtype == "int8", "devices store features as float32 or bfloat16"),
        "weights": (
            recipe.weights == "streamed" and recipe.weight_bits is not None,
            "with weight_bits, PyTorch trains on a packed copy of other numbers than a bundle's",
        ),
        "optimizer_in_backward": (recipe.optimizer_in_backward, "devices clip by the norm of all blocks"),
        "vae_tile": (recipe.vae_tile is not None, "devices encode whole images, which gives other latents"),
    }
    for name, (asked, reason) in reasons.items():
        if asked:
            msg = f"a bundle cannot hold {name} = {getattr(recipe, name)!r}: {reason}. Leave {name} out to export."
            raise RecipeError(msg)


def optimizer_of(recipe: Recipe) -> m.Optimizer:
    """What takes the steps, as `pocketune.train` sets it up."""
    rate, decay, epsilon, clipped = recipe.learning_rate, recipe.weight_decay, EPSILON, True
    in_rate = None
    if recipe.method == "scales":
        rate, in_rate, decay = recipe.scale_learning_rate, recipe.scale_in_learning_rate, 0.0
    if recipe.gradient == "zeroth_order":
        rate, in_rate, clipped = recipe.zo_learning_rate, None, False
    if recipe.zo_optimizer == "adam":
        decay, epsilon = 0.0, ZO_ADAM_EPSILON
    return m.Optimizer(
        kind="adamw" if recipe.gradient == "backprop" or recipe.zo_optimizer == "adam" else "descent",
        beta1=BETA1,
        beta2=BETA2,
        learning_rate=rate,
        in_learning_rate=in_rate if recipe.scale_inputs else None,
        weight_decay=decay,
        epsilon=epsilon,
        max_grad_norm=recipe.max_grad_norm if clipped else None,
    )


def zero_negative(folder: ModelFolder) -> bool:
    """Whether guidance leads away from zeros, as diffusers' SDXL pipeline does by default."""
    return folder.family is unet.SDXL and bool(folder.index.get("force_zeros_for_empty_prompt", True))


def noise_schedule(folder: ModelFolder) -> m.NoiseSchedule:
    """The model's noise schedule.

    Raises:
        ModelError: it has options that are not in the bundle format.
    """
    scheduler = folder.scheduler()
    config, objective = scheduler.config, NoiseSchedule.of(scheduler).objective
    odd = [name for name in ("use_dynamic_shifting", "use_karras_sigmas", "invert_sigmas") if config.get(name)]
    if odd:
        msg = f"the noise schedule of {folder.name} has {odd[0]}, which a bundle cannot say. Please report this model."
        raise ModelError(msg)
    steps = int(config["num_train_timesteps"])
    if objective == "flow":
        shift = float(config["shift"])
        return m.NoiseSchedule(
            kind="flow_match_euler", objective=objective, train_timesteps=steps, shift=shift, signal=None, ddim=None
        )
    signal = tuple(float(share) for share in scheduler.alphas_cumprod)
    if min(signal) <= 0:
        msg = f"the noise schedule of {folder.name} ends in noise alone, which a bundle cannot say. Please report this model."
        raise ModelError(msg)
    return m.NoiseSchedule(
        kind="ddpm", objective=objective, train_timesteps=steps, shift=1.0, signal=signal, ddim=_ddim_steps(folder, signal[0])
    )


def _ddim_steps(folder: ModelFolder, first: float) -> m.DdimSteps:
    """Where the model's own sampler lays its steps, whichever sampler that is; first: the signal of timestep 0.

    Raises:
        ModelError: it changes what the denoiser predicts.
    """
    config = folder.family.noise.load_config(folder.path, subfolder="scheduler")
    if config.get("clip_sample") or config.get("thresholding"):
        msg = f"the sampler of {folder.name} clips samples, which devices do not do. Please report this model."
        raise ModelError(msg)
    return m.DdimSteps(
        spacing=config.get("timestep_spacing", "leading"),
        offset=int(config.get("steps_offset", 0)),
        final_signal=1.0 if config.get("set_alpha_to_one", True) else first,
    )
