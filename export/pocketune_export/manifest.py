"""The manifest of a bundle: what the device must know, as strict models; `docs/bundle.md` shows the format on one screen.

Nothing here imports torch or onnx. Reading is strict: unknown fields, wrong types, numbers out of range, paths that leave the
bundle and parts that contradict each other are refused.
"""

from __future__ import annotations

import json
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from pocketune_edge.agreement import graph_faults, parameter_faults, plan_faults, size_faults
from pocketune_export.graphspec import BundlePath, Count, Digest, Graph, Name, Share, Size, Strict


class Model(Strict):
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
    zero_negative: bool = Field(description="Whether guidance leads away from zeros, not from an encoded empty prompt.")


class Span(Strict):
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


class Plan(Strict):
    """Which blocks train. Skipped blocks are replaced by cached features, or dropped if `use_residuals` is false."""

    spans: tuple[Span, ...] = Field(min_length=1)
    use_residuals: bool


class Batch(Strict):
    """The static sizes of every graph. Fewer rows are padded, more are run in turns."""

    rows: Size = Field(description="Samples a step: photos first, then as many class images if the recipe has a class prompt.")
    photos: Size
    class_images: Count
    resolution: Size = Field(description="Image side in pixels.")
    latent_shape: tuple[Size, Size, Size] = Field(description="Channels, height, width.")
    text_tokens: Size
    text_width: Size
    pooled_width: Count = Field(description="0 where the denoiser takes no pooled text.")


class Optimizer(Strict):
    """AdamW as PyTorch computes it, after clipping the gradient's norm. The named inputs may be changed on the device.

    descent, of zeroth-order steps: parameters (1 - learning_rate weight_decay) - learning_rate gradient, and nothing else.
    """

    kind: Literal["adamw", "descent"]
    beta1: float = Field(ge=0, lt=1, description="Fixed in the graphs.")
    beta2: float = Field(ge=0, lt=1, description="Fixed in the graphs.")
    learning_rate: float = Field(gt=0, description="Of scales, that of s_out; the input has a rate for each element then.")
    in_learning_rate: float | None = Field(gt=0, description="Of s_in; null where there is none.")
    weight_decay: float = Field(ge=0)
    epsilon: float = Field(gt=0)
    max_grad_norm: float | None = Field(gt=0, description="null: not clipped.")


class DdimSteps(Strict):
    """Which training timesteps the n steps of DDIM use; each leads train_timesteps // n lower.

    leading: i (train_timesteps // n) + offset, for i below n. trailing: train_timesteps (1 - i / n) - 1. linspace: n numbers
    from 0 to train_timesteps - 1. All but leading are rounded.
    """

    spacing: Literal["leading", "trailing", "linspace"]
    offset: Count = Field(description="Of leading.")
    final_signal: float = Field(gt=0, le=1, description="The signal that the last step leads to.")


class NoiseSchedule(Strict):
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
    signal: tuple[Share, ...] | None = Field(description="Of ddpm, by timestep: cumulative product of 1 - beta; else null.")
    ddim: DdimSteps | None = Field(description="Of ddpm, how devices sample; else null.")


class Parameter(Strict):
    """One trained tensor."""

    name: Name = Field(description="In PyTorch and in checkpoints.")
    key: Name = Field(description="In the result file.")
    shape: tuple[Size, ...] = Field(min_length=1, max_length=2)
    interval: Count = Field(description="Which interval of timesteps it is of, 0 the least noisy.")
    block: Count | None = Field(description="null outside of blocks.")
    offset: Count | None = Field(
        description="Of its first element in its interval's flat vector, row-major; null if the loss does not depend on it, so "
        "that it keeps its start value."
    )


class Lora(Strict):
    """Of LoRA matrices."""

    rank: Size
    alpha: float = Field(gt=0)
    targets: tuple[Name, ...]


class Tuned(Strict):
    """What trains. A flat vector holds every parameter with an offset, one after the other, without gaps.

    Timesteps are divided into equal intervals, each with a flat vector, moments and a count of AdamW's updates of its own; the
    device gives a graph those of the interval of its timesteps.
    """

    method: Literal["lora", "scales"]
    lora: Lora | None = Field(description="null of scales.")
    intervals: Size = Field(description="1 of LoRA.")
    parameters: tuple[Parameter, ...] = Field(min_length=1, description="Of all intervals.")
    flat_elements: Size = Field(description="Length of a flat vector.")
    initial: BundlePath = Field(description="The start values, as a result file; a result is this file with other values.")


class TextEncoder(Strict):
    """A text encoder and its tokenizer (a tokenizer.json of the `tokenizers` library). Ids are cut and padded to `tokens`."""

    number: Count = Field(description="Its place in the pipeline, at the end of the names that text_join takes.")
    graphs: tuple[Name, ...] = Field(
        min_length=1, description="Its parts; each takes what was given and what earlier ones gave."
    )
    tokenizer: BundlePath
    tokens: Size
    pad_id: Count
    pad_token: Name


class Vae(Strict):
    """The encoder gives the mean and deviation of scaled and shifted latents; the decoder takes such latents."""

    encoder: tuple[Name, ...] = Field(min_length=1, description="Its graphs, each taking what earlier ones gave.")
    decoder: tuple[Name, ...] = Field(min_length=1, description="Likewise.")
    scaling_factor: float
    shift_factor: float
    downscale: Size = Field(description="Image pixels along the side of a latent pixel.")


class Weights(Strict):
    """How the frozen weights are stored; all arithmetic is float32."""

    storage: Literal["fp32", "fp16", "int8", "int4"]
    block: Size | None = Field(description="Weights that share one scale along a row; null: a whole row. Of int8 and int4.")


class Memory(Strict):
    """Planned bytes of the training phase, without the runtime itself."""

    one_graph_anonymous: Count
    one_graph_mapped: Count
    streaming_anonymous: Count
    streaming_mapped: Count


class File(Strict):
    """A file of the bundle."""

    path: BundlePath
    bytes: Count
    sha256: Digest


class Manifest(Strict):
    """All that a device must know to train and sample from a bundle."""

    schema_version: Literal[1]
    schema_minor: Literal[1]
    pocketune_version: Name
    backend: Literal["onnx"]
    opset: int = Field(ge=1, le=20, description="Of ai.onnx, the only domain used.")
    model: Model
    recipe: dict[str, Any] = Field(
        description="As `pocketune.Recipe` dumps it; all that is random on the device follows from it."
    )
    plan: Plan
    batch: Batch
    weights: Weights
    tuned: Tuned
    optimizer: Optimizer
    noise_schedule: NoiseSchedule
    text_encoders: tuple[TextEncoder, ...]
    vae: Vae
    memory: Memory
    graphs: tuple[Graph, ...] = Field(min_length=1)
    files: tuple[File, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        here: Any = self  # the rules name the device's class, and read attributes alone
        for complaint in (*plan_faults(here), *parameter_faults(here.tuned), *graph_faults(here), *size_faults(here)):
            raise ValueError(complaint)
        return self

    def to_json(self) -> bytes:
        """The bytes of `manifest.json`, the same for equal manifests."""
        return (json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=True) + "\n").encode()


def schema_json() -> str:
    """The JSON Schema of `manifest.json`, as kept in `manifest.schema.json`."""
    return json.dumps(Manifest.model_json_schema(), indent=1) + "\n"
