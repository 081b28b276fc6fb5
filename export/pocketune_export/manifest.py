"""The manifest of a bundle: what the device must know, as strict models; `docs/bundle.md` shows the format on one screen.

Nothing here imports torch or onnx. Reading is strict: unknown fields, wrong types, numbers out of range, paths that leave the
bundle and parts that contradict each other are refused.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from pocketune.errors import FileFormatError
from pocketune_export.agreement import (
    MAX_ELEMENTS,
    MAX_PATH_CHARACTERS,
    Role,
    graph_faults,
    parameter_faults,
    path_fault,
    plan_faults,
    tensor_faults,
)

Dtype = Literal["float32", "int64"]
Count = Annotated[int, Field(ge=0, le=MAX_ELEMENTS)]
Size = Annotated[int, Field(ge=1, le=MAX_ELEMENTS)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(min_length=1, max_length=300)]
Fraction = Annotated[float, Field(gt=0, lt=1)]


def checked_path(path: str) -> str:
    """Return a bundle path as it is, if it names a file inside the bundle on every system.

    Raises:
        ValueError: it does not.
    """
    fault = path_fault(path)
    if fault:
        raise ValueError(fault)
    return path


BundlePath = Annotated[str, Field(max_length=MAX_PATH_CHARACTERS), AfterValidator(checked_path)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class TensorSpec(_Strict):
    """An input or output of a graph. Shapes are static."""

    name: Name
    shape: tuple[Count, ...] = Field(max_length=8)
    dtype: Dtype
    meaning: Name

    @property
    def elements(self) -> int:
        """The product of the shape."""
        count = 1
        for side in self.shape:
            count *= side
        return count


class Graph(_Strict):
    """One graph: a pure function of its inputs and of frozen weights."""

    name: Name
    file: BundlePath
    role: Role
    block: Count | None = Field(
        description="Which block, of block_forward and block_vjp; which part, of text_encoder (counted through all encoders), "
        "vae_encoder and vae_decoder; else null."
    )
    parameters: tuple[Count, Count] | None = Field(
        description="Slice [start, stop) of the flat vector that its `parameters` and `gradients` are; null without LoRA."
    )
    inputs: tuple[TensorSpec, ...] = Field(min_length=1)
    outputs: tuple[TensorSpec, ...] = Field(min_length=1)
    weights: tuple[BundlePath, ...] = Field(description="Files with this graph's frozen weights, memory-mapped by the runtime.")
    weight_bytes: Count = Field(description="Bytes of those files that this graph reads.")
    activation_bytes: Count = Field(description="Planned peak of its intermediate results, when run in graph order.")

    @model_validator(mode="after")
    def _tensors_can_be(self) -> Self:
        for complaint in tensor_faults(self):
            raise ValueError(complaint)
        return self


class Model(_Strict):
    """The model that was exported."""

    name: Name
    kind: Name = Field(description="Class of the denoiser in diffusers.")
    sha256: Digest = Field(description="The model's fingerprint, as checkpoints of a run have it.")
    note: str | None
    block_count: Size
    streams: tuple[Name, ...] = Field(
        min_length=1,
        description="What flows from block to block; graph inputs have these names. A stream that a block takes and does not "
        "give back ends there; one that it does not take passes it by.",
    )


class Span(_Strict):
    """Neighbouring blocks from `start` to before `stop`, all skipped or all trained."""

    start: Count
    stop: Size
    skipped: bool
    features: tuple[Name, ...] = Field(
        description="Inputs of train_step that stand for a skipped span, one a stream: features_START_STOP_STREAM."
    )
    replaces: bool = Field(
        description="Whether the features are streams that leave the span and take the place of those that would enter it; "
        "else they are streams leaving minus streams entering, to be added."
    )


class Plan(_Strict):
    """Which blocks train. Skipped blocks are replaced by cached features, or dropped if `use_residuals` is false."""

    spans: tuple[Span, ...] = Field(min_length=1)
    use_residuals: bool


class Batch(_Strict):
    """The static sizes of every graph. Fewer rows are padded, more are run in turns."""

    rows: Size = Field(description="Samples a step: photos first, then as many class images if the recipe has a class prompt.")
    photos: Size
    class_images: Count
    resolution: Size = Field(description="Image side in pixels.")
    latent_shape: tuple[Size, Size, Size] = Field(description="Channels, height, width.")
    text_tokens: Size
    text_width: Size
    pooled_width: Count = Field(description="0 where the denoiser takes no pooled text.")


class Optimizer(_Strict):
    """AdamW as PyTorch computes it, after clipping the gradient's norm. The named inputs may be changed on the device.

    descent, of zeroth-order steps: parameters (1 - learning_rate weight_decay) - learning_rate gradient, and nothing else.
    """

    kind: Literal["adamw", "descent"]
    beta1: float = Field(ge=0, lt=1, description="Fixed in the graphs.")
    beta2: float = Field(ge=0, lt=1, description="Fixed in the graphs.")
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    epsilon: float = Field(gt=0)
    max_grad_norm: float | None = Field(gt=0, description="null: not clipped.")


class NoiseSchedule(_Strict):
    """Which noise a timestep has: noisy latents are alpha latents + sigma noise.

    flow_match_euler: of timestep index i, t = 1 - i / train_timesteps, sigma = shift t / (1 + (shift - 1) t), alpha = 1 - sigma
    and the timestep is sigma train_timesteps. ddpm: of timestep index i, the timestep is t = train_timesteps - 1 - i,
    alpha = signal[t]^0.5 and sigma = (1 - signal[t])^0.5.
    """

    kind: Literal["flow_match_euler", "ddpm"]
    objective: Literal["flow", "epsilon", "v_prediction"] = Field(
        description="What the denoiser predicts: noise - latents, the noise, or alpha noise - sigma latents."
    )
    train_timesteps: Size
    shift: float = Field(gt=0, description="Of flow_match_euler; else 1.")
    signal: tuple[Fraction, ...] | None = Field(description="Of ddpm, by timestep: cumulative product of 1 - beta; else null.")


class Parameter(_Strict):
    """One LoRA tensor."""

    name: Name = Field(description="In PyTorch and in checkpoints.")
    key: Name = Field(description="In the LoRA file.")
    shape: tuple[Size, Size]
    block: Count
    offset: Count | None = Field(
        description="Of its first element in the flat vector, row-major; null if the loss does not depend on it, so that it "
        "keeps its start value."
    )


class Lora(_Strict):
    """The adapter. The flat vector holds every parameter with an offset, one after the other, without gaps."""

    rank: Size
    alpha: float = Field(gt=0)
    targets: tuple[Name, ...]
    parameters: tuple[Parameter, ...] = Field(min_length=1)
    flat_elements: Size
    initial: BundlePath = Field(
        description="A LoRA file for diffusers with the start values; the result is this file with other values."
    )


class TextEncoder(_Strict):
    """A text encoder and its tokenizer (a tokenizer.json of the `tokenizers` library). Ids are cut and padded to `tokens`."""

    number: Count = Field(description="Its place in the pipeline, at the end of the names that text_join takes.")
    graphs: tuple[Name, ...] = Field(
        min_length=1, description="Its parts; each takes what was given and what earlier ones gave."
    )
    tokenizer: BundlePath
    tokens: Size
    pad_id: Count
    pad_token: Name


class Vae(_Strict):
    """The encoder gives the mean and deviation of scaled and shifted latents; the decoder takes such latents."""

    encoder: tuple[Name, ...] = Field(min_length=1, description="Its graphs, each taking what earlier ones gave.")
    decoder: tuple[Name, ...] = Field(min_length=1, description="Likewise.")
    scaling_factor: float
    shift_factor: float
    downscale: Size = Field(description="Image pixels along the side of a latent pixel.")


class Weights(_Strict):
    """How the frozen weights are stored; all arithmetic is float32."""

    storage: Literal["fp32", "fp16", "int8", "int4"]
    block: Size | None = Field(description="Weights that share one scale along a row; null: a whole row. Of int8 and int4.")


class Memory(_Strict):
    """Planned bytes of the training phase, without the runtime itself."""

    one_graph_anonymous: Count
    one_graph_mapped: Count
    streaming_anonymous: Count
    streaming_mapped: Count


class File(_Strict):
    """A file of the bundle."""

    path: BundlePath
    bytes: Count
    sha256: Digest


class Manifest(_Strict):
    """All that a device must know to train and sample from a bundle."""

    schema_version: Literal[1]
    pocketune_version: Name
    backend: Literal["onnx", "executorch"]
    opset: Annotated[int, Field(ge=1, le=20)] | None = Field(
        description="Of ai.onnx, the only domain used; null for executorch."
    )
    model: Model
    recipe: dict[str, Any] = Field(
        description="As `pocketune.Recipe` dumps it; all that is random on the device follows from it."
    )
    plan: Plan
    batch: Batch
    weights: Weights
    lora: Lora
    optimizer: Optimizer
    noise_schedule: NoiseSchedule
    text_encoders: tuple[TextEncoder, ...]
    vae: Vae
    memory: Memory
    graphs: tuple[Graph, ...] = Field(min_length=1)
    files: tuple[File, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        for complaint in (*plan_faults(self), *parameter_faults(self.lora), *graph_faults(self)):
            raise ValueError(complaint)
        return self

    def graph(self, role: Role, block: int | None = None) -> Graph:
        """The graph with a role, of one block where there is one a block.

        Raises:
            FileFormatError: the bundle has none.
        """
        for graph in self.graphs:
            if graph.role == role and graph.block == block:
                return graph
        msg = f"the bundle has no graph {role}{'' if block is None else f' of block {block}'}. Export it again."
        raise FileFormatError(msg)

    def to_json(self) -> bytes:
        """The bytes of `manifest.json`, the same for equal manifests."""
        return (json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=True) + "\n").encode()


def schema_json() -> str:
    """The JSON Schema of `manifest.json`, as kept in `manifest.schema.json`."""
    return json.dumps(Manifest.model_json_schema(), indent=1) + "\n"
