"""TuneQDM: the scales of a quantized denoiser's rows and columns are tuned, one pair for each interval of timesteps.

Paper: TuneQDM (arXiv 2401.04339): W = (s_out + d_s_out) (W_q - z) (s_in + d_s_in), and interval i = floor(t N / T) has its own
pair. Row scales alone are PEQA (arXiv 2305.14152).
Differs: the released layer builds the float weight under autograd, which then keeps a copy of every weight; here none is
kept (`weights.layers`). 4-bit codes are two to a byte. s_out is held relative to the quantizer's scale and s_in begins at 1,
so that a learning rate means the same in every layer and at any number of bits; each has its own. Each interval has its own
parameters, so that AdamW leaves those that were not used alone. A batch may mix intervals. Of transformers only layers that see
tokens train by default, as those that shift and gate them by the timestep made prompts count less; the paper tunes U-Nets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pocketune.atomic import replacing
from pocketune.errors import FileFormatError, RecipeError
from pocketune.headers import with_sorted_metadata
from pocketune.methods.base import Tuned
from pocketune.models.base import DenoiserAdapter
from pocketune.models.load import ModelFolder
from pocketune.plan.blocks import BlockPlan
from pocketune.recipe import Recipe
from pocketune.runfolder import METHOD_KEY, SCALES_FILE
from pocketune.sampling.intervals import TIMESTEPS, interval_of
from pocketune.step import Batch
from pocketune.weights.layers import PackedConv2d, PackedLayer, Scales, Selected
from pocketune.weights.quantizers import QUANTIZERS, Quantization, pack_layers
from pocketune.weights.store import WeightStore
from pocketune.weights.stream import StreamedLinear


class ScalesMethod:
    """Tunes the scales of packed layers."""

    result = SCALES_FILE

    def attach(
        self,
        adapter: DenoiserAdapter,
        *,
        plan: BlockPlan,
        recipe: Recipe,
        folder: ModelFolder,  # noqa: ARG002
    ) -> Tuned:
        """Give those of the packed layers that train scales of one.

        Raises:
            RecipeError: no layer is packed, or none of those that `scale_targets` names.
        """
        adapter.model.requires_grad_(False)
        names = trained_layers(adapter, plan, packed_layers(adapter.model), targets=recipe.scale_targets)
        if not names:
            msg = 'method = "scales" tunes scales of packed weights, and none are packed. Set weight_bits to 8 or 4.'
            raise RecipeError(msg)
        selected = add_scales(adapter.model, names, intervals=recipe.scale_intervals, inputs=recipe.scale_inputs)

        def inputs(batch: Batch) -> Batch:
            selected.rows = intervals_of(batch.timesteps, recipe.scale_intervals)
            return batch

        return Tuned(parameters=_trained(adapter.model), owner=adapter.model, inputs=inputs)

    def save(self, adapter: DenoiserAdapter, tuned: Tuned, path: Path, *, recipe: Recipe) -> None:
        """Write the scales, and in the metadata all that packs the same weights again."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in tuned.parameters.items()}
        metadata = metadata_of(recipe, adapter.model, codes=codes_digest(adapter.model, list(tensors)))
        with replacing(path) as partial:
            save_file(tensors, partial, metadata=metadata)
            partial.write_bytes(with_sorted_metadata(partial.read_bytes()))

    def change(self, tuned: Tuned) -> dict[str, float]:
        """The L2 distance of each tensor from ones."""
        return {name: float(torch.linalg.vector_norm(value.detach() - 1)) for name, value in tuned.parameters.items()}

    def prepare(self, pipeline: Any, path: Path, folder: ModelFolder) -> None:
        """Pack the denoiser and give it scales of one, so that what the images after show is not what packing does."""
        prepare_scales(getattr(pipeline, folder.family.component), path, folder)

    def check(self, pipeline: Any, path: Path, folder: ModelFolder) -> None:
        """Write the scales into the denoiser; a name or size that does not fit is refused in any case."""
        write_scales(getattr(pipeline, folder.family.component), load_file(path))

    def apply(self, pipeline: Any, path: Path, folder: ModelFolder) -> None:
        """Pack the pipeline's denoiser and give it the scales, which then follow the timestep of each call.

        Raises:
            FileFormatError: the file is damaged or of another model, or its quantizer now gives other codes.
        """
        load_scales(getattr(pipeline, folder.family.component), path, folder)


def trained_layers(
    adapter: DenoiserAdapter, plan: BlockPlan, packed: Iterable[str], *, targets: Sequence[str] | None = None
) -> list[str]:
    """Those of the packed layers whose scales train.

    Args:
        adapter: a denoiser, packed or not.
        plan: layers of skipped blocks do not train; where any are skipped, neither do layers outside of blocks.
        packed: names of the packed layers.
        targets: parts of a block, as "attn"; default: the adapter's own, which may be all layers, outside of blocks too.

    Raises:
        RecipeError: one of the parts that are asked for is in no kept block.
    """
    kept = tuple(f"{part}." for index in plan.kept for part in adapter.block_parts(index))
    parts = targets or adapter.default_scale_targets
    if parts is None:
        return [name for name in packed if not plan.skipped or name.startswith(kept)]
    inside = [name for name in packed if name.startswith(kept)]
    for part in targets or ():
        if inside and not any(_is_in(name, part) for name in inside):
            msg = (
                f'no packed layer of the kept blocks is in a part named "{part}". Leave scale_targets out for the model\'s own.'
            )
            raise RecipeError(msg)
    return [name for name in inside if any(_is_in(name, part) for part in parts)]


def _is_in(layer: str, part: str) -> bool:
    return f".{part}." in f"{layer}."


def metadata_of(recipe: Recipe, model: nn.Module, *, codes: str) -> dict[str, str]:
    """What a file of scales says of itself. model: the denoiser; codes: their digest."""
    return {
        METHOD_KEY: "scales",
        "bits": str(recipe.weight_bits),
        "quantizer": recipe.quantizer,
        "intervals": str(recipe.scale_intervals),
        "denoiser": type(model).__name__,
        "codes": codes,
    }


def load_scales(model: nn.Module, path: Path, folder: ModelFolder) -> Selected:
    """Pack a denoiser as a file of scales says, and give it these scales; arguments and the rest as of `prepare_scales`."""
    selected, tensors = prepare_scales(model, path, folder)
    write_scales(model, tensors)
    return selected


def prepare_scales(model: nn.Module, path: Path, folder: ModelFolder) -> tuple[Selected, dict[str, Tensor]]:
    """Pack a denoiser as a file of scales says, and give it scales of one, which then follow the timestep of each call.

    Args:
        model: changed in place.
        path: of the scales.
        folder: of the model; codes are made from its own numbers, whatever the type that the model was loaded in.

    Returns:
        What selects among the scales, and those of the file, which fit.

    Raises:
        FileFormatError: as of `ScalesMethod.apply`, or the denoiser's weights are on disk.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        bits, intervals, quantizer = int(metadata["bits"]), int(metadata["intervals"]), metadata["quantizer"]
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        msg = f"{path} is no file of scales, or is damaged ({error}). Give what `pocketune personalize` wrote."
        raise FileFormatError(msg) from error
    if bits not in (4, 8) or quantizer not in QUANTIZERS or not 1 <= intervals <= TIMESTEPS:
        msg = f"{path} asks for {bits} bits by {quantizer}, {intervals} intervals. Use the version of pocketune that wrote it."
        raise FileFormatError(msg)
    if any(isinstance(module, StreamedLinear) for module in model.modules()):
        msg = f"{path} holds scales of packed weights, which lie in memory. Sample without --streamed."
        raise FileFormatError(msg)
    parameter = next(model.parameters())
    quantization = Quantization(bits, quantizer)  # type: ignore[arg-type]
    store = WeightStore(folder.denoiser_files())
    pack_layers(model, quantization, store.load, dtype=parameter.dtype, device=parameter.device)
    names = sorted({name.rsplit(".scales.", 1)[0] for name in tensors})
    if set(names) - set(packed_layers(model)):
        msg = f"{path} names layers that {type(model).__name__} does not have. Use the model that it was trained on."
        raise FileFormatError(msg)
    if metadata.get("codes") != codes_digest(model, list(tensors)):
        msg = f"{path} belongs to other weights, or another version of the quantizer {quantizer}. Use what it was trained on."
        raise FileFormatError(msg)
    selected = add_scales(model, names, intervals=intervals, inputs=any(name.endswith("s_in") for name in tensors))
    found = _trained(model)
    if {name: value.shape for name, value in found.items()} != {name: value.shape for name, value in tensors.items()}:
        msg = f"{path} has scales of other sizes than {type(model).__name__}. Use the model that it was trained on."
        raise FileFormatError(msg)
    for frozen in found.values():
        frozen.requires_grad_(False)
    follow_timesteps(model, selected, intervals=intervals, divisor=folder.family.timestep_divisor)
    return selected, tensors


@torch.no_grad()
def write_scales(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a denoiser that was prepared for them the values of its scales, by name."""
    for name, parameter in _trained(model).items():
        parameter.copy_(tensors[name])


def add_scales(model: nn.Module, names: list[str], *, intervals: int, inputs: bool) -> Selected:
    """Give packed layers scales of one, and return what selects among them.

    Args:
        model: changed in place.
        names: of the layers.
        intervals: pairs a layer.
        inputs: whether columns are scaled too; otherwise rows alone (PEQA).
    """
    selected = Selected()
    for name in names:
        layer = model.get_submodule(name)
        if isinstance(layer, PackedLayer):
            columns = layer.columns if inputs else None
            layer.scales.extend(Scales(layer.codes.shape[0], columns, device=layer.codes.device) for _ in range(intervals))
            layer.selected = selected
    return selected


def packed_layers(model: nn.Module) -> list[str]:
    """Names of the packed layers."""
    return [name for name, layer in model.named_modules() if isinstance(layer, PackedLayer)]


def intervals_of(timesteps: Tensor, intervals: int) -> tuple[int, ...]:
    """The interval of each timestep."""
    return tuple(interval_of(float(timestep), intervals) for timestep in timesteps.flatten())


def follow_timesteps(model: nn.Module, selected: Selected, *, intervals: int, divisor: int) -> None:
    """Let each call of a denoiser choose its scales by its `timestep`, as stock pipelines give it.

    Args:
        model: gets a hook.
        selected: what the hook changes.
        intervals: of timesteps.
        divisor: `Family.timestep_divisor`.
    """

    def select(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1])
        selected.rows = intervals_of(timestep * divisor, intervals)

    model.register_forward_pre_hook(select, with_kwargs=True)


@torch.no_grad()
def merge(model: nn.Module, interval: int) -> None:
    """Turn every packed layer into an ordinary one with the float weight of an interval, for runtimes without hooks.

    Args:
        model: changed in place; save one for each interval, and use it for the timesteps of that interval.
        interval: whose scales.
    """
    for name in packed_layers(model):
        layer = model.get_submodule(name)
        if not isinstance(layer, PackedLayer):
            continue
        scales = layer.scales[interval] if layer.scales else None
        weight = layer.merged(scales if isinstance(scales, Scales) else None).to(layer.weight.dtype)
        plain: nn.Linear | nn.Conv2d
        if isinstance(layer, PackedConv2d):
            names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
            settings: dict[str, Any] = {name: getattr(layer, name) for name in names}
            plain = nn.Conv2d(**settings, device="meta")
        else:
            plain = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), layer.bias  # type: ignore[assignment]
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, plain.eval())


def quantization_of(recipe: Recipe) -> Quantization | None:
    """How the recipe wants frozen weights in memory packed; None: not at all."""
    if recipe.weight_bits is None or recipe.weights == "streamed":
        return None
    return Quantization(recipe.weight_bits, recipe.quantizer)


def codes_digest(model: nn.Module, names: list[str]) -> str:
    """A hash of the codes that scales belong to. names: of the scales."""
    layers = (model.get_submodule(name) for name in sorted({name.rsplit(".scales.", 1)[0] for name in names}))
    return digest_of(layer.codes for layer in layers if isinstance(layer, PackedLayer))


def digest_of(codes: Iterable[Tensor]) -> str:
    """A hash of the codes of some layers, in the order of their names."""
    digest = hashlib.sha256()
    for of_layer in codes:
        digest.update(of_layer.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if ".scales." in name}
