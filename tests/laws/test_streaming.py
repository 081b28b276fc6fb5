"""Laws of weights on disk: the same numbers, bit for bit, as with weights in memory."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pocketune import scratch
from pocketune.errors import FileFormatError
from pocketune.memory import MemoryLog
from pocketune.methods.lora import add_lora
from pocketune.methods.scales import load_scales
from pocketune.methods.token import TokenMethod
from pocketune.models.base import DenoiserAdapter, Prompt, SkipConnected, denoise
from pocketune.models.load import ModelFolder, open_model
from pocketune.phases.state import Job
from pocketune.plan.blocks import BlockPlan, parse_plan
from pocketune.progress import ignore
from pocketune.recipe import Recipe
from pocketune.recompute import saved_to
from pocketune.sample import run_pipeline
from pocketune.scratch import Scratch
from pocketune.step import Batch, diffusion_loss, flow_matching_loss, predict, span_features
from pocketune.train import forget_activations, new_optimizer, train_step, update
from pocketune.watch import Watch
from pocketune.weights import stream
from pocketune.weights.fill import RESIDENT, Residence
from pocketune.weights.matrix import Matrix
from pocketune.weights.store import WeightStore
from tests.tolerances import HALF_PRECISION_PIXELS, PACKED_LOSS, SUM_ORDER

CPU = torch.device("cpu")
STREAMED = Residence(streamed=True)
RECIPE = Recipe.create(instance_prompt="x", activations="on_disk")


@pytest.fixture(autouse=True)
def small_layers_stream_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models have no large layers; tiles of 1 KiB cut theirs into several."""
    monkeypatch.setattr(stream, "SMALLEST_STREAMED", 1)
    monkeypatch.setattr(stream, "TILE_BYTES", 1024)


@pytest.fixture
def small_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scratch:
    monkeypatch.setattr(scratch, "SMALLEST", 1)
    return Scratch(tmp_path)


def batch_for(folder: ModelFolder, *, size: int = 2) -> Batch:
    g = torch.Generator().manual_seed(2)
    sizes = folder.sizes
    side = folder.native_resolution // folder.vae_scale if folder.name == "pocket-sd3" else 8
    sigmas = torch.linspace(0.2, 0.8, size)
    return Batch(
        latents=torch.randn(size, sizes.channels, side, side, generator=g),
        noise=torch.randn(size, sizes.channels, side, side, generator=g),
        timesteps=1000 * sigmas,
        sigmas=sigmas,
        alphas=None if folder.family.flow_matching else (1 - sigmas**2) ** 0.5,
        objective="flow" if folder.family.flow_matching else "epsilon",
        prompt=Prompt(
            hidden=torch.randn(size, 20, sizes.text_width, generator=g),
            pooled=torch.randn(size, sizes.pooled_width, generator=g) if sizes.pooled_width else None,
            sizes=torch.full((size, 6), 64.0) if folder.family.takes_sizes else None,
        ),
        loss_weights=torch.full((size,), 1 / size),
    )


def tuned(folder: ModelFolder, plan: BlockPlan, weights: Residence) -> tuple[DenoiserAdapter, dict[str, nn.Parameter]]:
    adapter = folder.load_denoiser(dtype=torch.float32, device=CPU, blocks=plan.kept, weights=weights)
    parameters = add_lora(adapter, blocks=plan.kept, rank=4, seed=7)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(parameters.items()):
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.05)
    return adapter, parameters


def loss_and_gradients(
    adapter: DenoiserAdapter, parameters: dict[str, nn.Parameter], plan: BlockPlan, batch: Batch
) -> tuple[float, dict[str, Tensor]]:
    output = predict(adapter, plan, batch)
    loss = flow_matching_loss(output, batch) if batch.objective == "flow" else diffusion_loss(output, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item(), {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}


def streamed_layers(adapter: DenoiserAdapter) -> int:
    kinds = (stream.StreamedLinear, stream.StreamedConv2d, stream.StreamedEmbedding)
    return sum(isinstance(module, kinds) for module in adapter.model.modules())


@pytest.mark.parametrize("name", ["tiny-sd3", "pocket-sd3", "flux", "pixart", "sana", "sd15", "sdxl"])
def test_loss_and_gradients_are_those_of_the_resident_model(
    name: str, tiny_model: ModelFolder, tiny_pipelines: Callable[[str], ModelFolder], small_scratch: Scratch
) -> None:
    folder = tiny_model if name == "tiny-sd3" else open_model(name) if name == "pocket-sd3" else tiny_pipelines(name)
    batch = batch_for(folder)
    plan = BlockPlan(folder.block_count)
    expected_loss, expected = loss_and_gradients(*tuned(folder, plan, RESIDENT), plan, batch)
    adapter, parameters = tuned(folder, plan, STREAMED)
    loss, found = loss_and_gradients(adapter, parameters, plan, batch)
    assert streamed_layers(adapter) > 10
    assert loss == expected_loss
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # Once more with activations made again, and those that are kept meanwhile on disk.
    if isinstance(adapter, SkipConnected):
        # Gradients that meet at a skip connection are then summed in another order, with weights in memory too.
        plain = expected
        expected = recomputed(*tuned(folder, plan, RESIDENT), plan, batch, None)[1]
        for name, gradient in expected.items():
            torch.testing.assert_close(gradient, plain[name], rtol=0, atol=SUM_ORDER * plain[name].abs().max().item())
    loss, found = recomputed(adapter, parameters, plan, batch, small_scratch)
    assert small_scratch.written_bytes > 0
    assert loss == expected_loss
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def recomputed(
    adapter: DenoiserAdapter,
    parameters: dict[str, nn.Parameter],
    plan: BlockPlan,
    batch: Batch,
    where: Scratch | None,
) -> tuple[float, dict[str, Tensor]]:
    forget_activations(adapter, RECIPE, lambda: None, scratch=where)
    for parameter in parameters.values():
        parameter.grad = None
    with saved_to(where):
        return loss_and_gradients(adapter, parameters, plan, batch)


def test_optimizer_in_backward_takes_the_same_steps_where_nothing_is_clipped(tiny_model: ModelFolder) -> None:
    plan, batch = BlockPlan(6), batch_for(tiny_model)
    results = []
    for settings in ({}, {"activations": "recomputed"}, {"activations": "recomputed", "optimizer_in_backward": True}):
        recipe = Recipe.create(instance_prompt="x", max_grad_norm=1e9, **settings)
        adapter, parameters = tuned(tiny_model, plan, RESIDENT)
        optimizer = new_optimizer(parameters, recipe)
        if settings:
            forget_activations(adapter, recipe, partial(update, parameters.values(), recipe, optimizer))
        losses = [train_step(adapter, parameters, plan, recipe, batch, optimizer) for _ in range(3)]
        results.append((losses, [parameter.detach() for parameter in parameters.values()]))
    for losses, values in results[1:]:
        assert losses == results[0][0]
        assert all(torch.equal(a, b) for a, b in zip(values, results[0][1], strict=True))


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_weights_are_the_same_streamed_and_resident(bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKETUNE_CACHE", str(tmp_path))
    folder = open_model("pocket-sd3")
    batch, plan = batch_for(folder), BlockPlan(folder.block_count)
    results = [
        loss_and_gradients(*tuned(folder, plan, Residence(streamed=streamed, bits=bits)), plan, batch)  # type: ignore[arg-type]
        for streamed in (False, True)
    ]
    (expected_loss, expected), (loss, found) = results
    assert loss == expected_loss
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    plain, _ = loss_and_gradients(*tuned(folder, plan, RESIDENT), plan, batch)
    assert loss != plain
    assert loss == pytest.approx(plain, rel=PACKED_LOSS[bits])
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_skipped_blocks_are_never_read(tiny_model: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = parse_plan("0-1,5", 6)
    frozen = tiny_model.load_denoiser(dtype=torch.float32, device=CPU, weights=STREAMED)
    batch = batch_for(tiny_model)
    batch = replace(batch, features=span_features(frozen, plan, batch))
    read: list[str] = []
    original = WeightStore.matrix
    monkeypatch.setattr(WeightStore, "matrix", lambda store, name: read.append(name) or original(store, name))
    loss_and_gradients(*tuned(tiny_model, plan, STREAMED), plan, batch)
    assert {name.split(".")[1] for name in read if name.startswith("transformer_blocks.")} == {"2", "3", "4"}


def test_modulation_is_read_once_a_step(tiny_model: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Linears that see the timestep alone, although every block runs twice."""
    plan = BlockPlan(6)
    read: list[Matrix] = []
    original = stream.Tiles.rows
    monkeypatch.setattr(stream.Tiles, "rows", lambda tiles, matrix, like: read.append(matrix) or original(tiles, matrix, like))
    adapter, parameters = tuned(tiny_model, plan, STREAMED)
    recomputed(adapter, parameters, plan, batch_for(tiny_model), None)
    modulation, query = (adapter.model.get_submodule(f"transformer_blocks.3.{name}") for name in ("norm1.linear", "attn.to_q"))
    assert read.count(modulation._matrix) == 1
    assert read.count(query.base_layer._matrix) == 2


def test_precomputed_features_are_the_same(tiny_model: ModelFolder) -> None:
    plan = parse_plan("0-1,5", 6)
    batch = batch_for(tiny_model)
    both = [
        span_features(tiny_model.load_denoiser(dtype=torch.float32, device=CPU, weights=weights), plan, batch)
        for weights in (RESIDENT, STREAMED)
    ]
    for span, streams in both[0].items():
        assert all(torch.equal(a, b) for a, b in zip(streams, both[1][span], strict=True))


def test_a_cropped_table_of_positions_gives_the_same_output(tiny_model: ModelFolder) -> None:
    """The tiny table has room for 8 x 8 tokens, the latents have 4 x 4."""
    batch = batch_for(tiny_model)
    outputs = []
    with torch.no_grad():
        for side in (None, 8):
            adapter = tiny_model.load_denoiser(dtype=torch.float32, device=CPU, latent_side=side)
            outputs.append(denoise(adapter, batch.noisy, batch.timesteps, batch.prompt))
    assert adapter.model.pos_embed.pos_embed.shape[1] == 16
    assert torch.equal(*outputs)


@pytest.mark.parametrize(("resolution", "low_resolution", "tokens"), [(64, 32, 4), (48, 16, 3), (48, 32, 8)])
def test_a_table_cropped_for_mixed_training_gives_the_same_output_at_both_sizes(
    tiny_model: ModelFolder, tmp_path: Path, resolution: int, low_resolution: int, tokens: int
) -> None:
    """The middle 2 x 2 of 8 x 8 tokens are not the middle of the middle 3 x 3: the table stays whole then."""
    sides = {"resolution": resolution, "low_resolution": low_resolution}
    recipe = Recipe.create(instance_prompt="x", gradient="mixed", positions="own", **sides)
    job = Job(recipe, tiny_model, tmp_path, CPU, Watch(MemoryLog(), ignore))
    cropped, whole = job.denoiser(range(6)), tiny_model.load_denoiser(dtype=torch.float32, device=CPU)
    assert cropped.model.pos_embed.pos_embed.shape[1] == tokens**2
    batch = batch_for(tiny_model)
    for side in (resolution // 8, low_resolution // 8):
        noisy = batch.noisy[..., :side, :side]
        with torch.no_grad():
            outputs = [denoise(adapter, noisy, batch.timesteps, batch.prompt) for adapter in (cropped, whole)]
        assert torch.equal(*outputs)


@pytest.mark.parametrize("name", ["tiny-sd3", "flux", "sana"])
def test_streamed_text_encoders_and_autoencoder_are_the_same(
    name: str, tiny_model: ModelFolder, tiny_pipelines: Callable[[str], ModelFolder]
) -> None:
    folder = tiny_model if name == "tiny-sd3" else tiny_pipelines(name)
    prompts = ["a photo of a toy"]
    expected, found = (folder.encode_prompts(prompts, device=CPU, weights=w)[prompts[0]] for w in (RESIDENT, STREAMED))
    for part in ("hidden", "pooled", "mask"):
        a, b = getattr(expected, part), getattr(found, part)
        assert (a is None and b is None) or torch.equal(a, b)
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        latents = [folder.load_vae(device=CPU, weights=w).encode(image)[0] for w in (RESIDENT, STREAMED)]
    values = [latent if isinstance(latent, Tensor) else latent.mean for latent in latents]
    assert torch.equal(*values)


def test_a_cast_leaves_streamed_weights_on_disk(tiny_pipelines: Callable[[str], ModelFolder]) -> None:
    """SDXL's pipeline casts its autoencoder from float16 to float32 and back around each decoding."""
    vae = tiny_pipelines("sdxl").pipeline(dtype=torch.float16, device=CPU, weights=STREAMED).vae
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))

    def held_bytes() -> int:
        return sum(value.untyped_storage().nbytes() for value in vae.parameters())

    held, shapes = held_bytes(), [value.shape for value in vae.parameters()]
    vae.to(torch.float32)
    assert held_bytes() == 2 * held and [value.shape for value in vae.parameters()] == shapes
    with torch.no_grad():
        assert vae.decode(latents).sample.dtype == torch.float32
    assert vae.to(torch.float16).dtype == torch.float16 and held_bytes() == held


@torch.no_grad()
def test_t5_keeps_in_float32_what_would_overflow_in_float16(
    tiny_pipelines: Callable[[str], ModelFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers does; the numbers behind a feed-forward layer of T5-XXL reach beyond 65504."""
    model = tiny_pipelines("flux")
    folder = ModelFolder("large", Path(shutil.copytree(model.path, tmp_path / "large")))
    (weights,) = (folder.path / "text_encoder_2").glob("*.safetensors")
    tensors = load_file(weights)
    save_file({name: value * 1e7 if ".wo." in name else value for name, value in tensors.items()}, weights, {"format": "pt"})
    found = []
    for where, smallest in ((RESIDENT, 1), (STREAMED, 2**20), (STREAMED, 1)):  # the second holds all that is small
        monkeypatch.setattr(stream, "SMALLEST_STREAMED", smallest)
        encoder = folder.pipeline(dtype=torch.float16, device=CPU, weights=where).text_encoder_2
        types = {name: value.dtype for name, value in encoder.named_parameters()}
        assert {kind for name, kind in types.items() if ".wo." in name} == {torch.float32}
        assert {kind for name, kind in types.items() if ".wo." not in name} == {torch.float16}
        found.append(encoder(torch.arange(4, 12)[None])[0])
    assert found[0].isfinite().all() and all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("name", ["tiny-sd3", "flux", "sana", "sdxl"])
def test_a_pipeline_that_is_filled_here_is_the_stock_one(
    name: str, tiny_model: ModelFolder, tiny_pipelines: Callable[[str], ModelFolder]
) -> None:
    folder = tiny_model if name == "tiny-sd3" else tiny_pipelines(name)
    side = 64 // folder.vae_scale
    filled = folder.pipeline(dtype=torch.float32, device=CPU, latent_side=side)
    images = [
        run_pipeline(pipeline, folder, ["a photo of a toy"], seeds=[0], steps=1, guidance=2.0, resolution=64)[0].tobytes()
        for pipeline in (folder.stock_pipeline(dtype=torch.float32), filled)
    ]
    assert images[0] == images[1]
    if name == "tiny-sd3":  # its table of positions is large
        table = filled.transformer.pos_embed.pos_embed
        assert table.shape[1] == (side // folder.sizes.patch) ** 2 < folder.denoiser_config["pos_embed_max_size"] ** 2


@pytest.mark.parametrize("name", ["tiny-sd3", "sana", "sdxl"])
def test_half_precision_is_that_of_the_resident_pipeline(
    name: str, tiny_model: ModelFolder, tiny_pipelines: Callable[[str], ModelFolder]
) -> None:
    folder = tiny_model if name == "tiny-sd3" else tiny_pipelines(name)
    images, types = [], []
    for weights in (RESIDENT, STREAMED):
        pipeline = folder.pipeline(dtype=torch.bfloat16, device=CPU, weights=weights)
        encoders = {"vae": pipeline.vae, "text": pipeline.text_encoder}
        types.append(
            {
                (part, path): value.dtype
                for part, model in encoders.items()
                for path, value in (*model.named_parameters(), *model.named_buffers())
                if value.ndim  # Gemma casts a single number where it is used
            }
        )
        prompt = ["a photo of a toy"]
        images += run_pipeline(pipeline, folder, prompt, seeds=[0], steps=2, guidance=2.0, resolution=64)
    assert not {name: kind for name, kind in types[0].items() if types[1].get(name) != kind}
    of_vae = {kind for (part, _), kind in types[0].items() if part == "vae"}
    assert of_vae == {torch.float32 if name == "sana" else torch.bfloat16}
    resident, streamed = (torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float() for image in images)
    torch.testing.assert_close(streamed, resident, rtol=0, atol=HALF_PRECISION_PIXELS)


def test_a_tuned_word_is_the_same(tiny_model: ModelFolder, tmp_path: Path) -> None:
    path = tmp_path / "learned_embeds.safetensors"
    row = torch.randn(64, generator=torch.Generator().manual_seed(4))
    save_file({"text_encoder": row}, path, metadata={"token": "sks"})
    found = []
    for weights in (RESIDENT, STREAMED):
        pipeline = tiny_model.pipeline(dtype=torch.float32, device=CPU, weights=weights)
        for tuned_too in (False, True):
            if tuned_too:
                TokenMethod().apply(pipeline, path, tiny_model)
            found.append(tiny_model.family.encode(pipeline, "a photo of sks toy", device=CPU, length=77).hidden)
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert not torch.equal(found[0], found[1])


def test_scales_need_weights_in_memory(tiny_model: ModelFolder, tmp_path: Path) -> None:
    path = tmp_path / "scales.safetensors"
    metadata = {"bits": "8", "intervals": "1", "quantizer": "minmax"}
    save_file({"x.scales.0.s_out": torch.ones(1)}, path, metadata=metadata)
    model = tiny_model.load_denoiser(dtype=torch.float32, device=CPU, weights=STREAMED).model
    with pytest.raises(FileFormatError, match="without --streamed"):
        load_scales(model, path, tiny_model)


def test_the_parts_of_a_streamed_pipeline_share_one_buffer(tiny_model: ModelFolder) -> None:
    pipeline = tiny_model.pipeline(dtype=torch.float32, device=CPU, weights=STREAMED)
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    layers = [layer for part in parts for layer in part.modules() if isinstance(layer, stream.StreamedLinear)]
    assert len(parts) == 4 and len({id(layer._tiles) for layer in layers}) == 1


def test_streamed_weights_that_someone_uses_otherwise_are_not_numbers(tiny_model: ModelFolder) -> None:
    adapter = tiny_model.load_denoiser(dtype=torch.float32, device=CPU, weights=STREAMED)
    weight = adapter.model.transformer_blocks[0].attn.to_q.weight
    assert weight.shape == (32, 32)
    assert weight.isnan().all()
