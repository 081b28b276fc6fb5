"""Train the SD3-style denoiser of `pocket-sd3` by rectified flow (stage 3 of the training script).

Latents and text embeddings are computed once; every sample then draws its own noise, timestep and caption.
The learning rate warms up, stays, and decays at the end, so that a longer run can go on from any restart point of the plateau.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.models.attention_processor import Attention
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from pocketune.pocket.autoencoder import LATENT_CHANNELS, to_unit
from pocketune.pocket.draw import render
from pocketune.pocket.runs import StageRun
from pocketune.pocket.scenes import IDENTIFIERS, Scene, caption, held_out_combinations, random_scene, shows_held_out
from pocketune.pocket.text import token_ids

WIDTH = 128
LEARNING_RATE = 1.5e-3
CAPTION_DROPOUT = 0.1
BATCHES = {128: 32, 64: 64}
"""Samples a batch by image side; both take about the same time."""
SMALL_SHARE = 0.35
HARD_CLASSES = {"star": 3, "duck": 2}
"""How much more often scenes of the classes that come out wrong most often are drawn."""
DECAY_SHARE = 0.25
EMA_DECAY = 0.999
STOCK_PADDING = 256
"""How many zero tokens diffusers' SD3 pipeline appends when there is no T5 encoder."""


def new_denoiser() -> SD3Transformer2DModel:
    """An untrained MMDiT of 12 joint blocks for latents (batch, 8, h, w); modulation and output start at zero."""
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=12,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=128,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=128,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.xavier_uniform_(parameter)
    zeros = [model.proj_out, model.norm_out.linear]
    zeros += [norm.linear for block in model.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    for linear in zeros:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return model


class PaddedJointAttention:
    """Joint attention whose last text token stands for n equal ones: its logits get log(n) added.

    diffusers' pipeline appends 256 zero tokens to the text when there is no T5 encoder. Equal tokens without positions stay
    equal through every block, so one token with a bias teaches the model to live with any number of them at no cost.
    `log_count`: (batch, 1, 1, 1), minus infinity for none.
    """

    def __init__(self) -> None:
        """Start with no padding; `log_count` is set before each forward."""
        self.log_count: Tensor | None = None

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: object
    ) -> tuple[Tensor, Tensor]:
        """As diffusers' `JointAttnProcessor2_0`, image tokens first, plus the bias."""
        batch, length = hidden_states.shape[:2]

        def heads(tensor: Tensor) -> Tensor:
            split: Tensor = tensor.unflatten(-1, (attn.heads, -1))
            return split.transpose(1, 2)

        query = torch.cat(
            [attn.norm_q(heads(attn.to_q(hidden_states))), attn.norm_added_q(heads(attn.add_q_proj(encoder_hidden_states)))],
            dim=2,
        )
        key = torch.cat(
            [attn.norm_k(heads(attn.to_k(hidden_states))), attn.norm_added_k(heads(attn.add_k_proj(encoder_hidden_states)))],
            dim=2,
        )
        value = torch.cat([heads(attn.to_v(hidden_states)), heads(attn.add_v_proj(encoder_hidden_states))], dim=2)
        bias = torch.zeros(batch, 1, 1, key.shape[2], device=key.device, dtype=key.dtype)
        if self.log_count is not None:
            bias[..., -1:] = self.log_count
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2)
        image, text = mixed[:, :length], mixed[:, length:]
        image = attn.to_out[1](attn.to_out[0](image))
        return image, text if attn.context_pre_only else attn.to_add_out(text)


@dataclass(frozen=True)
class LatentPool:
    """Rendered scenes as latents. `latents[side]`: (count, 8, side / 8, side / 8), already scaled and shifted."""

    scenes: list[Scene]
    latents: dict[int, Tensor]


class _Renders(Dataset[dict[int, Tensor]]):
    def __init__(self, seed: int, count: int) -> None:
        self._seed, self._count = seed, count

    def __len__(self) -> int:
        return self._count // 32

    def __getitem__(self, index: int) -> dict[int, Tensor]:
        scenes = [_scene(self._seed, number) for number in range(index * 32, index * 32 + 32)]
        return {side: torch.from_numpy(np.stack([np.asarray(render(s, size=side)) for s in scenes])) for side in BATCHES}


def _scene(seed: int, number: int) -> Scene:
    return random_scene(np.random.default_rng([seed, 4, number]))


def _repeats(scene: Scene) -> int:
    return max(HARD_CLASSES.get(subject.noun, 1) for subject in scene.subjects)


@torch.no_grad()
def prepare_latents(path: Path, vae: AutoencoderKL, *, count: int, seed: int, device: torch.device) -> LatentPool:
    """Render and encode `count` scenes at both sizes, or load them if `path` already holds that many."""
    scenes = [_scene(seed, number) for number in range(count)]
    if path.exists():
        stored = load_file(path)
        if len(stored["128"]) >= count:
            return LatentPool(scenes, {side: stored[str(side)][:count] for side in BATCHES})
    vae = vae.to(device)
    parts: dict[int, list[Tensor]] = {side: [] for side in BATCHES}
    for pixels in DataLoader(_Renders(seed, count), batch_size=None, num_workers=1, prefetch_factor=8):
        for side, images in pixels.items():
            mean = vae.encode(to_unit(images.to(device))).latent_dist.mean
            parts[side].append(((mean - vae.config.shift_factor) * vae.config.scaling_factor).half().cpu().contiguous())
    latents = {side: torch.cat(part) for side, part in parts.items()}
    save_file({str(side): tensor for side, tensor in latents.items()}, path)
    return LatentPool(scenes, latents)


class CaptionEncoder:
    """Captions to what the denoiser wants, as diffusers' SD3 pipeline makes it, with one zero token for padding."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Load both encoders and the tokenizer from a pipeline folder."""
        self._tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        names = ("text_encoder", "text_encoder_2")
        self._encoders = [CLIPTextModelWithProjection.from_pretrained(folder / name).eval().to(device) for name in names]
        self._device = device

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Hidden states (batch, 21, 128) and pooled embeddings (batch, 128)."""
        ids = token_ids(self._tokenizer, captions).to(self._device)
        outputs = [encoder(ids, output_hidden_states=True) for encoder in self._encoders]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return F.pad(hidden, (0, 0, 0, 1)), torch.cat([output.text_embeds for output in outputs], dim=-1)


def training_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption as the training draws it: empty for guidance now and then, rarely with a meaningless identifier."""
    if rng.random() < CAPTION_DROPOUT:
        return ""
    identifier = IDENTIFIERS[int(rng.integers(len(IDENTIFIERS)))] if len(scene.subjects) == 1 and rng.random() < 0.05 else None
    return caption(scene, rng, identifier=identifier)


def flow_loss(model: nn.Module, latents: Tensor, hidden: Tensor, pooled: Tensor, sigmas: Tensor, noise: Tensor) -> Tensor:
    """Mean squared velocity error of rectified flow.

    Paper: Esser et al. 2024 (SD3), equations 4 and 5: x_t = (1 - sigma) x_0 + sigma eps, target eps - x_0.

    Args:
        model: the denoiser; timestep is 1000 sigma.
        latents: (batch, 8, h, w), clean.
        hidden: text, (batch, tokens, 128).
        pooled: text, (batch, 128).
        sigmas: (batch,) in (0, 1).
        noise: like latents.
    """
    sigma = sigmas.view(-1, 1, 1, 1)
    noisy = (1 - sigma) * latents + sigma * noise
    velocity = model(
        hidden_states=noisy, encoder_hidden_states=hidden, pooled_projections=pooled, timestep=1000 * sigmas, return_dict=False
    )[0]
    return F.mse_loss(velocity, noise - latents)


def learning_rate_factor(step: int, steps: int) -> float:
    """Warm up for 150 steps, stay at 1, then fall along a half cosine to 1 % over the last quarter."""
    decay_from = steps * (1 - DECAY_SHARE)
    warm = min(1.0, (step + 1) / 150)
    if step < decay_from:
        return warm
    return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - decay_from) / (steps - decay_from))))


def train_denoiser(
    folder: Path, pool: LatentPool, *, steps: int, seed: int, run: StageRun, start_from: Path | None = None
) -> None:
    """Train on the pool and save the averaged weights (EMA) in `folder/transformer`, fp16; processes share each batch."""
    accelerator = Accelerator()
    torch.manual_seed(seed + 2)
    model = new_denoiser()
    if start_from is not None:
        model.load_state_dict(SD3Transformer2DModel.from_pretrained(start_from / "transformer").float().state_dict())
    attention = PaddedJointAttention()
    model.set_attn_processor(attention)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    both = nn.ModuleDict({"model": model, "average": average})
    done = run.restore(both, optimizer, schedule)
    model, optimizer = accelerator.prepare(model, optimizer)
    average.to(accelerator.device)
    encode = CaptionEncoder(folder, accelerator.device)
    held_out = frozenset(held_out_combinations())
    allowed = [number for number, scene in enumerate(pool.scenes) if not shows_held_out(scene, held_out)]
    drawable = np.repeat(allowed, [_repeats(pool.scenes[number]) for number in allowed])
    for step in range(done, steps):
        rng = np.random.default_rng([seed, 5, step])
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        side = 64 if rng.random() < SMALL_SHARE else 128
        chosen = drawable[rng.integers(len(drawable), size=BATCHES[side])]
        latents = pool.latents[side][torch.from_numpy(chosen)].float()
        hidden, pooled = encode([training_caption(pool.scenes[i], rng) for i in chosen])
        count = float(rng.integers(1, STOCK_PADDING + 1)) if rng.random() < 0.5 else float(STOCK_PADDING)
        attention.log_count = torch.tensor(math.log(count) if rng.random() < 0.4 else -math.inf, device=hidden.device)
        sigmas = torch.randn(len(chosen), generator=generator).sigmoid()
        noise = torch.randn(latents.shape, generator=generator)
        # Every process draws the whole batch and takes its share, so the number of processes does not change the stream.
        mine = slice(accelerator.process_index, None, accelerator.num_processes)
        inputs = (tensor[mine].to(accelerator.device) for tensor in (latents, hidden, pooled, sigmas, noise))
        loss = flow_loss(model, *inputs)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        if accelerator.is_main_process:
            run.after_step(step + 1, steps, {f"loss{side}": loss.item()}, both, optimizer, schedule)
    if accelerator.is_main_process:
        save_average(folder, average)


def save_average(folder: Path, average: AveragedModel) -> None:
    """Save the averaged denoiser as a diffusers folder, fp16, with diffusers' own attention."""
    trained = new_denoiser()
    trained.load_state_dict(average.module.state_dict())
    trained.half().save_pretrained(folder / "transformer")
