"""Adapter of the U-Nets of Stable Diffusion 1, 2 and XL (`UNet2DConditionModel`), with their skip connections as streams."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from pocketune.errors import ModelError, PlanError
from pocketune.models.base import Context, Prompt, RemovedBlock, Streams, TextAttention
from pocketune.models.family import Config, Family, Sizes, fixed_length
from pocketune.models.unet_layers import check_layers, layers_of

_ATTENTION_TARGETS = ("to_k", "to_q", "to_v", "to_out.0")


class UNetAdapter:
    """`UNet2DConditionModel` as its layers: those of the encoder, the middle block, those of the decoder.

    The first stream is the image, (batch, channels, rows, columns). Behind it come the skip connections in the order in which
    the encoder has made them; a decoder layer takes the last one away. A skipped span in the middle is replaced by the
    activation that leaves it, as in Hollowed Net; the skip connections around it are those of the layers that train.
    """

    stream_names: tuple[str, ...] = ("image",)
    unit_kinds: tuple[Any, ...] = (ResnetBlock2D, BasicTransformerBlock)
    default_scale_targets = None

    def __init__(self, model: Any) -> None:
        """Wrap a model; it is neither copied nor changed.

        Raises:
            ModelError: it takes other inputs, or has other kinds of layers.
        """
        check_layers(model.config)
        self.model = model
        self._layers = layers_of(model.config)
        depth = max((len(module) for name, module in model.named_modules() if name.endswith("transformer_blocks")), default=0)
        # The targets of diffusers' train_dreambooth_lora.py and train_dreambooth_lora_sdxl.py.
        self.default_lora_targets: tuple[str, ...] = tuple(
            f"transformer_blocks.{number}.{attention}.{target}"
            for number in range(depth)
            for attention in ("attn1", "attn2")
            for target in _ATTENTION_TARGETS
        )
        counts = [2]  # the image, and the skip connection of the first convolution
        for layer in self._layers:
            change = 0 if layer.is_middle else (1 + (layer.resample is not None)) if layer.is_down else -1
            counts.append(counts[-1] + change)
        self._stream_counts = tuple(counts)

    @property
    def block_count(self) -> int:
        """Number of layers, the middle being one."""
        return len(self._layers)

    def middle(self) -> int:
        """Index of the middle block."""
        return next(index for index, layer in enumerate(self._layers) if layer.is_middle)

    @property
    def patch_size(self) -> int:
        """Latent pixels along the side of a pixel in the middle block."""
        return int(2 ** (len(self.model.config.block_out_channels) - 1))

    def stream_count(self, index: int) -> int:
        """How many streams enter a block; for the number behind the last block, those that enter the head."""
        return self._stream_counts[index]

    def block_name(self, index: int) -> str:
        """The prefix of the layer's attention in the state dict, or of its residual layer where it has none."""
        layer = self._layers[index]
        number = 0 if layer.is_middle else layer.number
        has_attention = hasattr(self.model.get_submodule(layer.name), "attentions")
        return f"{layer.name}.{'attentions' if has_attention else 'resnets'}.{number}"

    def block_parts(self, index: int) -> tuple[str, ...]:
        """The layer's residual layer, its attention if it has one, and what ends its stage; or the whole middle block."""
        layer = self._layers[index]
        if layer.is_middle:
            return (layer.name,)
        stage = self.model.get_submodule(layer.name)
        names = [name for name in ("resnets", "attentions") if hasattr(stage, name)]
        parts = [f"{layer.name}.{name}.{layer.number}" for name in names]
        return *parts, *((f"{layer.name}.{layer.resample}",) if layer.resample else ())

    def remove_block(self, index: int) -> None:
        """Replace a layer's modules by placeholders without weights."""
        layer = self._layers[index]
        if layer.is_middle:
            # Placeholders inside, so that the block keeps its names.
            lists = [(name, range(len(getattr(self.model.mid_block, name)))) for name in ("resnets", "attentions")]
        else:
            lists = [(name, range(layer.number, layer.number + 1)) for name in ("resnets", "attentions")]
        stage = self.model.get_submodule(layer.name)
        for name, numbers in lists:
            for number in numbers if hasattr(stage, name) else ():
                getattr(stage, name)[number] = RemovedBlock()
        if layer.resample:
            getattr(stage, layer.resample)[0] = RemovedBlock()

    def context(self, latents: Tensor, timesteps: Tensor, prompt: Prompt) -> Context:
        """Embed the timestep, and for SDXL pooled text and sizes.

        Raises:
            PlanError: the latents' sides cannot be halved as often as the encoder does.
        """
        height, width = latents.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            msg = f"latents of {height} x {width} do not fit this U-Net: expected multiples of {self.patch_size}."
            raise PlanError(msg)
        embedding = self.model.time_embedding(self.model.get_time_embed(sample=latents, timestep=timesteps), None)
        further = self.model.get_aug_embed(
            emb=embedding,
            encoder_hidden_states=prompt.hidden,
            added_cond_kwargs={"text_embeds": prompt.pooled, "time_ids": prompt.sizes},
        )
        embedding = embedding if further is None else embedding + further
        return Context(embedding, height, width, text=prompt.hidden)

    def embed(self, latents: Tensor, prompt: Prompt) -> Streams:  # noqa: ARG002 - text is no stream here
        """The first convolution, whose output is the first skip connection too."""
        image: Tensor = self.model.conv_in(latents)
        return image, image

    def block(self, index: int, streams: Streams, context: Context) -> Streams:
        """Run one layer."""
        layer = self._layers[index]
        stage = self.model.get_submodule(layer.name)
        if layer.is_middle:
            return self._middle(stage, streams[0], context), *streams[1:]
        if layer.is_down:
            image = self._layer(stage, layer.number, streams[0], context)
            if layer.resample is None:
                return image, *streams[1:], image
            smaller = stage.downsamplers[0](image)
            return smaller, *streams[1:], image, smaller
        image = self._layer(stage, layer.number, torch.cat((streams[0], streams[-1]), dim=1), context)
        return image if layer.resample is None else stage.upsamplers[0](image, None), *streams[1:-1]

    def text_attention(self, index: int) -> tuple[TextAttention, ...]:
        """The cross-attentions of a layer; none where it has only convolutions."""
        layer = self._layers[index]
        stage: Any = self.model.get_submodule(layer.name)
        if not hasattr(stage, "attentions"):
            return ()
        chosen = stage.attentions if layer.is_middle else [stage.attentions[layer.number]]
        return tuple(TextAttention(block.attn2) for attention in chosen for block in attention.transformer_blocks)

    def head(self, streams: Streams, context: Context) -> Tensor:  # noqa: ARG002 - it needs no timestep
        """Final norm and convolution."""
        output: Tensor = self.model.conv_out(self.model.conv_act(self.model.conv_norm_out(streams[0])))
        return output

    def _middle(self, stage: nn.Module, image: Tensor, context: Context) -> Tensor:
        output: Tensor = stage(image, context.embedding, encoder_hidden_states=context.text)
        return output

    def _layer(self, stage: Any, number: int, image: Tensor, context: Context) -> Tensor:
        image = stage.resnets[number](image, context.embedding)
        if hasattr(stage, "attentions"):
            image = stage.attentions[number](image, encoder_hidden_states=context.text, return_dict=False)[0]
        return image


def _sizes(config: Config) -> Sizes:
    return Sizes(
        blocks=len(layers_of(config)),
        width=int(config["block_out_channels"][-1]),
        patch=int(2 ** (len(config["block_out_channels"]) - 1)),
        native=int(config["sample_size"]),
        channels=int(config["in_channels"]),
        text_width=config["cross_attention_dim"],
        pooled_width=_pooled_width(config),
    )


def _pooled_width(config: Config) -> int:
    """SDXL projects the pooled text with its six embedded sizes behind it.

    Raises:
        ModelError: it is SDXL's refiner, whose one text encoder pools text as wide as a token, with five numbers behind it.
    """
    if config.get("addition_embed_type") != "text_time":
        return 0
    projected, each = int(config["projection_class_embeddings_input_dim"]), int(config["addition_time_embed_dim"])
    if projected - 5 * each == config["cross_attention_dim"]:
        msg = (
            "this is the refiner of Stable Diffusion XL: it finishes given images by an aesthetic score, and makes none from a "
            "prompt alone. Use the base model, such as stable-diffusion-xl-base-1.0."
        )
        raise ModelError(msg)
    return projected - 6 * each


def _encode(pipeline: Any, prompt: str, *, device: torch.device, length: int) -> Prompt:  # noqa: ARG001 - CLIP's own length
    hidden, _ = pipeline.encode_prompt(prompt, device, 1, False)
    return Prompt(hidden=hidden)


def _encode_xl(pipeline: Any, prompt: str, *, device: torch.device, length: int) -> Prompt:  # noqa: ARG001 - CLIP's own length
    hidden, _, pooled, _ = pipeline.encode_prompt(prompt, device=device, do_classifier_free_guidance=False)
    return Prompt(hidden=hidden, pooled=pooled)


SD = Family(
    title="Stable Diffusion 1 and 2",
    denoiser=UNet2DConditionModel,
    adapter=UNetAdapter,
    pipeline=StableDiffusionPipeline,
    text_encoders=("text_encoder",),
    sizes=_sizes,
    encode=_encode,
    text_length=fixed_length(0),
    clip_text=True,
    sampling=lambda _: {},
    recipe_defaults={
        "weighting_scheme": "none",
        "precondition_outputs": False,
        "learning_rate": 5e-4,
        "weight_decay": 1e-2,
        "guidance_scale": 7.5,
    },
    component="unet",
    left_out=("feature_extractor", "image_encoder", "safety_checker"),
    noise=DDPMScheduler,
)

SDXL = Family(
    title="Stable Diffusion XL",
    denoiser=UNet2DConditionModel,
    variant="text_time",
    adapter=UNetAdapter,
    pipeline=StableDiffusionXLPipeline,
    text_encoders=("text_encoder", "text_encoder_2"),
    sizes=_sizes,
    encode=_encode_xl,
    text_length=fixed_length(0),
    clip_text=True,
    sampling=lambda _: {},
    recipe_defaults={"weighting_scheme": "none", "precondition_outputs": False, "guidance_scale": 5.0},
    component="unet",
    left_out=("feature_extractor", "image_encoder"),
    takes_sizes=True,
    noise=DDPMScheduler,
)
