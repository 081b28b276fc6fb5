"""The training script of the built-in models: what it feeds the denoiser, and that it goes on where it stopped."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pocketune.pocket import sd3
from pocketune.pocket.autoencoder import ImageBatches, new_autoencoder, train_autoencoder
from pocketune.pocket.denoiser import PocketDenoiser, train_denoiser
from pocketune.pocket.pool import prepare_latents
from pocketune.pocket.runs import StageRun
from pocketune.pocket.scenes import (
    CLASSES,
    Scene,
    caption,
    held_out_combinations,
    random_scene,
    shows_held_out,
    toy_identity,
)
from pocketune.pocket.sd15 import SD15, shift_into_convolutions
from pocketune.pocket.text import new_text_encoder, new_tokenizer, token_ids


def test_one_biased_token_stands_for_many_zero_tokens() -> None:
    """What training sees with log(n) added equals stock diffusers with n zero tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = sd3.new_denoiser()
        for parameter in model.parameters():
            parameter.data.add_(0.02 * torch.randn_like(parameter))
    g = torch.Generator().manual_seed(1)
    latents, hidden = torch.randn(2, 8, 8, 8, generator=g), torch.randn(2, 20, 128, generator=g)
    inputs = {"hidden_states": latents, "timestep": torch.tensor([300.0, 700.0]), "return_dict": False}
    inputs["pooled_projections"] = torch.randn(2, 128, generator=g)
    attention = sd3.PaddedJointAttention()
    for count in (0, 1, 40):
        text = torch.cat([hidden, torch.zeros(2, count, 128)], dim=1)
        with torch.no_grad():
            expected = model(encoder_hidden_states=text, **inputs)[0]
            stock = model.attn_processors
            model.set_attn_processor(attention)
            attention.log_count = torch.tensor(math.log(count) if count else -math.inf)
            found = model(encoder_hidden_states=torch.cat([hidden, torch.zeros(2, 1, 128)], dim=1), **inputs)[0]
            model.set_attn_processor(dict(stock))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pocket", [sd3.SD3, SD15], ids=lambda pocket: pocket.component)
def test_stage_resumes_exactly(tmp_path: Path, pocket: PocketDenoiser) -> None:
    pocket = replace(pocket, batches={128: 2, 64: 2})
    tokenizer = new_tokenizer()
    for suffix in ("", "_2"):
        with torch.random.fork_rng():
            torch.manual_seed(5)
            new_text_encoder(tokenizer).save_pretrained(tmp_path / f"text_encoder{suffix}")
        tokenizer.save_pretrained(tmp_path / f"tokenizer{suffix}")
    with torch.random.fork_rng():
        torch.manual_seed(6)
        vae = new_autoencoder()
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    pool = prepare_latents(tmp_path / "latents.safetensors", vae, count=32, seed=0, device=torch.device("cpu"))
    assert pool.latents[128].shape == (32, 8, 16, 16) and pool.latents[64].shape == (32, 8, 8, 8)

    class Stopped(StageRun):
        def after_step(self, step: int, *rest: object) -> None:  # type: ignore[override]
            super().after_step(step, *rest)  # type: ignore[arg-type]
            if step == 2:
                raise KeyboardInterrupt

    train_denoiser(pocket, tmp_path, pool, steps=4, seed=0, run=StageRun(tmp_path / "whole", save_every_s=0))
    with pytest.raises(KeyboardInterrupt):
        train_denoiser(pocket, tmp_path, pool, steps=4, seed=0, run=Stopped(tmp_path / "broken", save_every_s=0))
    train_denoiser(pocket, tmp_path, pool, steps=4, seed=0, run=StageRun(tmp_path / "broken", save_every_s=0))
    whole, broken = (load_file(tmp_path / name / "state.safetensors") for name in ("whole", "broken"))
    assert whole.keys() == broken.keys()
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    vae.save_pretrained(tmp_path / "vae")
    pipeline = pocket.pipeline(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a red cat", num_inference_steps=2, height=64, width=64).images[0].size == (64, 64)


def test_latents_of_another_seed_do_not_serve(tmp_path: Path) -> None:
    """Their scenes are other ones, and so are the captions."""
    with torch.random.fork_rng():
        torch.manual_seed(6)
        vae = new_autoencoder()
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    path, cpu = tmp_path / "latents.safetensors", torch.device("cpu")
    first = prepare_latents(path, vae, count=32, seed=0, device=cpu).latents
    written = path.stat().st_mtime_ns
    assert torch.equal(prepare_latents(path, vae, count=32, seed=0, device=cpu).latents[64], first[64])
    assert path.stat().st_mtime_ns == written
    assert not torch.equal(prepare_latents(path, vae, count=32, seed=1, device=cpu).latents[64], first[64])


def test_shift_moves_into_convolutions() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        vae = new_autoencoder().eval()
    vae.register_to_config(scaling_factor=0.8, shift_factor=0.3)
    shifted = shift_into_convolutions(vae)
    assert shifted.config.shift_factor is None
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        encoded = vae.encode(images).latent_dist
        found = shifted.encode(images).latent_dist
        torch.testing.assert_close(found.mean, encoded.mean - 0.3, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.std, encoded.std)
        decoded = vae.decode(encoded.mean).sample
        torch.testing.assert_close(shifted.decode(found.mean).sample, decoded, rtol=1e-4, atol=1e-4)


def test_autoencoder_stage_learns_and_measures_its_latents(tmp_path: Path) -> None:
    vae = train_autoencoder(tmp_path / "vae", steps=2, seed=0, run=StageRun(tmp_path / "run"))
    assert vae.config.scaling_factor > 0 and (tmp_path / "vae" / "config.json").exists()


def test_batches_follow_from_their_number() -> None:
    first, again = ImageBatches(seed=0, start=0, stop=8), ImageBatches(seed=0, start=5, stop=8)
    assert torch.equal(first[5], again[0])
    assert first[3].shape == (2, 128, 128, 3) and first[0].shape == (8, 64, 64, 3)


def test_every_caption_word_is_one_token() -> None:
    tokenizer = new_tokenizer()
    rng = np.random.default_rng(0)
    for _ in range(50):
        text = caption(random_scene(rng), rng, full=True)
        assert len(tokenizer.tokenize(text)) == len(text.split())
        assert token_ids(tokenizer, [text]).shape == (1, 20)


def test_equal_numbers_are_equal_toys_and_scenes() -> None:
    assert toy_identity(4) == toy_identity(4) != toy_identity(5)
    assert random_scene(np.random.default_rng(1)) == random_scene(np.random.default_rng(1))


def test_held_out_combinations_cover_every_class_and_are_recognised() -> None:
    held_out = held_out_combinations()
    assert len(set(held_out)) == 200 and {noun for noun, _, _ in held_out} == set(CLASSES)
    noun, colour, background = held_out[0]
    scene: Scene = random_scene(np.random.default_rng(0), noun=noun, colour=colour, background=background)
    assert shows_held_out(scene, frozenset(held_out))
    assert not shows_held_out(scene, frozenset(held_out[1:]))
