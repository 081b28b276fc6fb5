"""Export a model and a recipe to a bundle: capture each graph, lower it, store weights once, describe all in the manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor

from pocketune.delta import LORA_FILE, save_lora
from pocketune.errors import ModelError, PlanError
from pocketune.memory import read_memory
from pocketune.methods.lora import ADAPTER, add_lora, start_values
from pocketune.models.base import DenoiserAdapter
from pocketune.models.load import ModelFolder, open_model
from pocketune.plan.blocks import BlockPlan, parse_plan
from pocketune.progress import OnProgress, Progress, ignore
from pocketune.recipe import Recipe
from pocketune_export import manifest as m
from pocketune_export.bundle import describe_file, new_bundle_folder, seal
from pocketune_export.capture import Capture
from pocketune_export.denoiser_graphs import DenoiserGraphs, Sizes
from pocketune_export.onnx import lower
from pocketune_export.onnx_builder import OPSET
from pocketune_export.planning import activation_bytes, planned_memory
from pocketune_export.quantize import Storage
from pocketune_export.remainder import Tokenizer, encoder_numbers, read_tokenizer, text_encoder, text_join, vae_parts
from pocketune_export.sources import DenoiserWeights
from pocketune_export.training import BETA1, BETA2, EPSILON
from pocketune_export.weights import WeightPart, WeightStore

LORA_PATH = f"lora/{LORA_FILE}"


def export_trainable(
    *,
    recipe: Recipe,
    out: str | Path,
    model: str | Path = "pocket-sd3",
    backend: Literal["onnx"] = "onnx",
    weights: Storage = "fp32",
    weight_block: int | None = None,
    on_progress: OnProgress = ignore,
) -> m.Manifest:
    """Export a training step, the model around it and its start values.

    Args:
        recipe: batch size, resolution, rank, targets, skipped blocks and loss are fixed in the graphs; the rest are defaults.
        out: the bundle folder to make, or one file if it ends in ".ptb".
        model: built-in name, diffusers folder or hub id.
        backend: "onnx".
        weights: how matrices are stored.
        weight_block: int8 and int4 weights that share a scale; default: a row.
        on_progress: called after each graph.

    Raises:
        ModelError, PlanError, RecipeError, RunError: nothing is left behind.
    """
    if backend != "onnx":
        msg = f'there is no backend "{backend}" yet; choose onnx.'
        raise PlanError(msg)
    folder = open_model(model)
    with new_bundle_folder(Path(out)) as scratch:
        return _Export(folder, recipe, scratch, WeightStore(scratch, wanted=weights, block=weight_block), on_progress).run()


@dataclass
class _Export:
    """One export under way."""

    folder: ModelFolder
    recipe: Recipe
    out: Path
    store: WeightStore
    on_progress: OnProgress

    def __post_init__(self) -> None:
        self.graphs: list[m.Graph] = []
        self.plan: BlockPlan = parse_plan(self.recipe.skip, self.folder.block_count)
        self.resolution = resolution_of(self.folder, self.recipe)
        side = self.resolution // self.folder.vae_scale
        self.latents = (int(self.folder.vae_config["latent_channels"]), side, side)
        self.photos = self.recipe.batch_size
        self.class_images = self.photos if self.recipe.class_prompt else 0

    def run(self) -> m.Manifest:
        """Capture and write everything; the finished manifest."""
        schedule = self._schedule()
        encoders = self._text_encoders()
        vae = self.folder.load_vae(device=torch.device("cpu"))
        for part in vae_parts(vae, resolution=self.resolution, latents=self.latents):
            self._add(part.name, part.name, None, None, part.capture, self._part(part.name, part.load))  # type: ignore[arg-type]
        vae_settings = m.Vae(
            scaling_factor=float(vae.config.scaling_factor),
            shift_factor=float(vae.config.shift_factor or 0.0),
            downscale=self.folder.vae_scale,
        )
        del vae
        graphs, lora = self._denoiser()
        manifest = self._manifest(graphs, lora, encoders, vae_settings, schedule)
        seal(self.out, manifest)
        return manifest

    def _schedule(self) -> m.NoiseSchedule:
        config = self.folder.scheduler().config
        if config.get("use_dynamic_shifting") or config.get("use_karras_sigmas") or config.get("invert_sigmas"):
            msg = (
                f"{self.folder.name} has a noise schedule with options that the edge runtime does not know. Please report this."
            )
            raise ModelError(msg)
        return m.NoiseSchedule(
            kind="flow_match_euler", train_timesteps=int(config["num_train_timesteps"]), shift=float(config["shift"])
        )

    def _text_encoders(self) -> tuple[m.TextEncoder, ...]:
        captures: dict[int, Capture] = {}
        described = []
        for number in encoder_numbers(self.folder):
            tokenizer = read_tokenizer(self.folder, number)
            path = self._write(f"tokenizer-{number}/tokenizer.json", tokenizer.content)
            part = text_encoder(self.folder, number, tokenizer.tokens)
            captures[number] = part.capture
            described.append(_describe_encoder(part.name, path, tokenizer))
            self._add(part.name, "text_encoder", number, None, part.capture, self._part(part.name, part.load))
        joined, self.text = text_join(captures, self.folder)
        self._add("text_join", "text_join", None, None, joined, self._part("text_join", _no_weight))
        return tuple(described)

    def _denoiser(self) -> tuple[DenoiserGraphs, m.Lora]:
        adapter = self.folder.empty_denoiser()
        rank, targets = self.recipe.rank, self.recipe.lora_targets or adapter.default_lora_targets
        parameters = add_lora(adapter, blocks=self.plan.kept, rank=rank, targets=targets, seed=self.recipe.seed)
        names = list(parameters)
        for name, value in start_values(parameters, rank=rank, seed=self.recipe.seed).items():
            set_module_tensor_to_device(adapter.model, name, "cpu", value=value)
        parameters = {name: adapter.model.get_parameter(name) for name in names}
        sizes = Sizes(
            rows=self.photos + self.class_images,
            latents=self.latents,
            text_tokens=self.text.tokens,
            text_width=self.text.width,
            pooled_width=self.text.pooled,
        )
        sort_header(save_lora(adapter, self.out / "lora"))
        graphs = DenoiserGraphs(adapter, parameters, self.plan, self.recipe, sizes)
        weights = DenoiserWeights(self.folder.denoiser_files(), adapter.model)
        part = WeightPart(self.store, "transformer.", weights, lambda name: _file_of(adapter, name))
        for traced in graphs.trace():
            self._add(traced.name, traced.role, traced.block, traced.parameters, traced.capture, part)
        return graphs, self._lora(adapter, graphs, parameters, targets)

    def _lora(
        self,
        adapter: DenoiserAdapter,
        graphs: DenoiserGraphs,
        parameters: dict[str, torch.nn.Parameter],
        targets: tuple[str, ...],
    ) -> m.Lora:
        starts = {slot.name: slot.start for slot in graphs.layout.slots}
        described = tuple(
            m.Parameter(
                name=name,
                key="transformer." + name.replace(f".{ADAPTER}.", "."),
                shape=(parameter.shape[0], parameter.shape[1]),
                block=_block_of(adapter, name),
                offset=starts.get(name),
            )
            for name, parameter in parameters.items()
        )
        return m.Lora(
            rank=self.recipe.rank,
            alpha=float(self.recipe.rank),
            targets=targets,
            parameters=described,
            flat_elements=graphs.layout.elements,
            initial=LORA_PATH,
        )

    def _part(self, name: str, load: Callable[[str], Tensor]) -> WeightPart:
        return WeightPart(self.store, f"{name}.", load, lambda _: f"weights/{name}.bin")

    def _add(
        self,
        name: str,
        role: m.Role,
        block: int | None,
        parameters: tuple[int, int] | None,
        captured: Capture,
        part: WeightPart,
    ) -> None:
        """Lower a capture and write the graph."""
        inputs, outputs = captured.inputs, captured.outputs
        lowered = lower(captured, part)
        self.graphs.append(
            m.Graph(
                name=name,
                file=self._write(f"{name}.onnx", lowered.content),
                role=role,
                block=block,
                parameters=parameters,
                inputs=inputs,
                outputs=outputs,
                weights=lowered.files,
                weight_bytes=lowered.weight_bytes,
                activation_bytes=activation_bytes(lowered.content),
            )
        )
        rss = read_memory().rss_bytes
        self.on_progress(Progress(phase="graphs", done=len(self.graphs), total=0, unit="graph", rss_bytes=rss))

    def _write(self, path: str, content: bytes) -> str:
        (self.out / path).parent.mkdir(parents=True, exist_ok=True)
        (self.out / path).write_bytes(content)
        return path

    def _manifest(
        self,
        graphs: DenoiserGraphs,
        lora: m.Lora,
        encoders: tuple[m.TextEncoder, ...],
        vae: m.Vae,
        schedule: m.NoiseSchedule,
    ) -> m.Manifest:
        hashed = self.store.close()
        files = [m.File(path=path, bytes=size, sha256=digest) for path, (size, digest) in hashed.items()]
        others = [graph.file for graph in self.graphs] + [encoder.tokenizer for encoder in encoders] + [LORA_PATH]
        files += [describe_file(self.out, path) for path in others]
        recipe = self.recipe
        return m.Manifest(
            schema_version=m.SCHEMA_VERSION,
            pocketune_version=version("pocketune"),
            backend="onnx",
            opset=OPSET,
            model=m.Model(
                name=self.folder.name,
                kind=self.folder.denoiser_kind,
                sha256=self.folder.fingerprint(),
                note=self.folder.note(),
                block_count=self.folder.block_count,
                streams=graphs.stream_names,
            ),
            recipe=recipe.model_dump(mode="json"),
            plan=m.Plan(
                spans=tuple(
                    m.Span(
                        start=span.start,
                        stop=span.stop,
                        skipped=span.skipped,
                        features=tuple(feature.name for feature in graphs.features(span)),
                    )
                    for span in self.plan.spans
                ),
                use_residuals=recipe.use_residuals,
            ),
            batch=m.Batch(
                rows=self.photos + self.class_images,
                photos=self.photos,
                class_images=self.class_images,
                resolution=self.resolution,
                latent_shape=self.latents,
                text_tokens=self.text.tokens,
                text_width=self.text.width,
                pooled_width=self.text.pooled,
            ),
            weights=m.Weights(storage=self.store.wanted, block=self.store.block),
            lora=lora,
            optimizer=m.Optimizer(
                kind="adamw",
                beta1=BETA1,
                beta2=BETA2,
                learning_rate=recipe.learning_rate,
                weight_decay=recipe.weight_decay,
                epsilon=EPSILON,
                max_grad_norm=recipe.max_grad_norm,
            ),
            noise_schedule=schedule,
            text_encoders=encoders,
            vae=vae,
            memory=planned_memory(self.graphs),
            graphs=tuple(self.graphs),
            files=tuple(sorted(files, key=lambda file: file.path)),
        )


def resolution_of(folder: ModelFolder, recipe: Recipe) -> int:
    """The recipe's resolution, or the model's own.

    Raises:
        PlanError: the model cannot work at it.
    """
    side, unit, largest = recipe.resolution or folder.native_resolution, folder.resolution_unit, folder.largest_resolution
    if side % unit or side > largest:
        msg = f"resolution {side} does not fit {folder.name}: expected a multiple of {unit} up to {largest}."
        raise PlanError(msg)
    return side


def sort_header(path: Path) -> None:
    """Rewrite a safetensors file with its header sorted, so that equal tensors give equal bytes."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


def _describe_encoder(graph: str, path: str, tokenizer: Tokenizer) -> m.TextEncoder:
    return m.TextEncoder(
        graph=graph, tokenizer=path, tokens=tokenizer.tokens, pad_id=tokenizer.pad_id, pad_token=tokenizer.pad_token
    )


def _block_of(adapter: DenoiserAdapter, name: str) -> int:
    return next(index for index in range(adapter.block_count) if name.startswith(adapter.block_name(index) + "."))


def _file_of(adapter: DenoiserAdapter, name: str) -> str:
    """One weight file a block, and one for what all blocks share."""
    for index in range(adapter.block_count):
        if name.startswith(adapter.block_name(index) + "."):
            return f"weights/block-{index:02d}.bin"
    return "weights/denoiser.bin"


def _no_weight(name: str) -> Tensor:
    msg = f"the graph needs the weight {name}, which it should not have."
    raise ModelError(msg)
