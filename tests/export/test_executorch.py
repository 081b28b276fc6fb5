"""The seam of a second backend: the captures that ONNX is made of become ExecuTorch programs that train alike."""

import subprocess
import sys
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from pocketune.methods.lora import add_lora
from pocketune.models.base import Context
from pocketune.models.mmdit import SD3Adapter
from pocketune_export.capture import Capture, capture, frozen_weights, with_weights
from pocketune_export.training import Named, spec
from tests.tiny_models import sd3_transformer
from tests.tolerances import EXECUTORCH_RELATIVE

LINEAR = {"y": "result", "gradient": "of the sum of squares"}


def run_program(captured: Capture, weights: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    pytest.importorskip("executorch.exir", reason="needs ExecuTorch: pip install 'pocketune[executorch]', or make executorch")
    from executorch.runtime import Runtime

    from pocketune_export.executorch import lower

    program = lower(captured, weights.__getitem__)
    method = Runtime.get().load_program(program).load_method("forward")
    results = method.execute([given[item.name] for item in captured.inputs])
    return dict(zip((item.name for item in captured.outputs), results, strict=True))


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert tensor.abs().max() > 0
        assert (found[name] - tensor).abs().max() <= EXECUTORCH_RELATIVE * tensor.abs().max(), name


def test_capturing_imports_no_backend() -> None:
    """Capture and passes know neither ONNX nor ExecuTorch."""
    code = (
        "import sys, pocketune_export.capture, pocketune_export.passes, pocketune_export.training;"
        "print([name for name in sys.modules if name.split('.')[0] in ('onnx', 'onnx_ir', 'onnxruntime', 'executorch')])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_layer_and_its_gradient_run_on_executorch() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(8, 8).requires_grad_(False)
        given = {"x": torch.randn(2, 8), "low": torch.randn(8, 8)}

    def step(given: Named) -> dict[str, Tensor]:
        low = given["low"].detach().requires_grad_()
        y = model(given["x"]) + given["x"] @ low
        return {"y": y, "gradient": torch.autograd.grad((y * y).sum(), [low])[0]}

    captured = capture(model, step, (spec("x", (2, 8), "x"), spec("low", (8, 8), "adapter")), LINEAR)
    assert_close(run_program(captured, frozen_weights(model), given), step(given))


@pytest.mark.slow
def test_a_block_step_runs_on_executorch() -> None:
    """One joint block with LoRA: the streams that leave it, and gradients of all matrices, from one capture."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = sd3_transformer(
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            qk_norm=None,
        ).eval()
        given = {"image": torch.randn(1, 16, 32), "text": torch.randn(1, 7, 32), "embedding": torch.randn(1, 32)}
    adapter = SD3Adapter(model)
    parameters = add_lora(adapter, blocks=(0,), rank=2)
    # As small as trained matrices: with larger ones softmax saturates, and the gradients behind it are what rounding leaves.
    generator = torch.Generator().manual_seed(1)
    given |= {name: 0.1 * torch.randn(value.shape, generator=generator) for name, value in parameters.items()}

    def step(given: Named) -> dict[str, Tensor]:
        values = {name: given[name].detach().requires_grad_() for name in parameters}
        context = Context(given["embedding"], 8, 8)
        image, text = with_weights(model, values, lambda: adapter.block(0, (given["image"], given["text"]), context))
        gradients = torch.autograd.grad(image.square().mean() + text.square().mean(), list(values.values()))
        return {"new_image": image, "new_text": text} | {f"gradient of {n}": g for n, g in zip(values, gradients, strict=True)}

    expected = {name: value.detach() for name, value in step(given).items()}
    captured = capture(
        model, step, [spec(name, value.shape, name) for name, value in given.items()], {name: name for name in expected}
    )
    assert_close(run_program(captured, frozen_weights(model), given), expected)
