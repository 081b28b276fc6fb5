"""The layers of a U-Net of Stable Diffusion, as its configuration lists them: what its adapter takes for blocks."""

from __future__ import annotations

from dataclasses import dataclass

from pocketune.errors import ModelError
from pocketune.models.family import Config

_DOWN = ("DownBlock2D", "CrossAttnDownBlock2D")
_UP = ("UpBlock2D", "CrossAttnUpBlock2D")
_MID = "UNetMidBlock2DCrossAttn"


@dataclass(frozen=True)
class Layer:
    """A block of the list: one residual layer with its attention, and what ends its stage; or the middle.

    Attributes:
        name: of the stage, as "down_blocks.1" or "mid_block".
        number: of the layer in its stage.
        resample: attribute of the stage with the down- or upsampler that follows the layer, if one does.
    """

    name: str
    number: int
    resample: str | None = None

    @property
    def is_down(self) -> bool:
        """Whether it lies before the middle."""
        return self.name.startswith("down")

    @property
    def is_middle(self) -> bool:
        """Whether it is the middle block."""
        return self.name.startswith("mid")


def check_layers(config: Config) -> None:
    """Refuse U-Nets that the adapter would run wrongly.

    Raises:
        ModelError: the configuration has another kind of layers, or takes other inputs.
    """
    strange = [
        name
        for name, usual in {
            "class_embed_type": (None,),
            "num_class_embeds": (None,),
            "encoder_hid_dim_type": (None,),
            "time_cond_proj_dim": (None,),
            "time_embedding_act_fn": (None,),
            "addition_embed_type": (None, "text_time"),
            "center_input_sample": (None, False),
            "mid_block_type": (_MID,),
            "in_channels": (config["out_channels"],),
        }.items()
        if config.get(name) not in usual
    ]
    if set(config["down_block_types"]) - set(_DOWN) or set(config["up_block_types"]) - set(_UP):
        strange.append("down_block_types or up_block_types")
    if strange:
        msg = (
            f"this U-Net's {', '.join(strange)} is not that of a text-to-image Stable Diffusion 1, 2 or XL (inpainting, "
            "distilled and pruned models differ there), and there is no adapter for it. Use the model it was made from."
        )
        raise ModelError(msg)


def layers_of(config: Config) -> tuple[Layer, ...]:
    """All layers in the order in which they run: those of the encoder, the middle, those of the decoder."""
    stages = len(config["block_out_channels"])
    given = config["layers_per_block"]
    per_stage = [given] * stages if isinstance(given, int) else list(given)
    down = [
        Layer(f"down_blocks.{stage}", number, "downsamplers" if stage < stages - 1 and number == count - 1 else None)
        for stage, count in enumerate(per_stage)
        for number in range(count)
    ]
    up = [
        Layer(f"up_blocks.{stage}", number, "upsamplers" if stage < stages - 1 and number == count else None)
        for stage, count in enumerate(reversed(per_stage))
        for number in range(count + 1)
    ]
    return *down, Layer("mid_block", 0), *up
