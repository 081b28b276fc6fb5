"""Parts of a capture, run one after the other, give what the whole gives, bit for bit."""

import pytest
import torch
from torch import Tensor, nn

from pocketune_export.capture import Capture, capture, frozen_weights
from pocketune_export.cutting import cut, cut_by_bytes
from pocketune_export.graphspec import TensorSpec
from pocketune_export.training import Named, spec

WIDTH = 8


class Encoder(nn.Module):
    """Three layers between an embedding and a norm; the second layer's input is a result too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.table(ids)
        states = []
        for layer in self.layers:
            states.append(hidden)
            hidden = hidden + torch.tanh(layer(hidden))
        return states[1], self.norm(hidden)[torch.arange(1), ids.argmax(-1)]


def run(part: Capture, model: nn.Module, known: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = frozen_weights(model)
    given = [known[item.name] for item in part.inputs] + [weights[name] for name in part.weights]
    return dict(zip((item.name for item in part.outputs), part.module(*given), strict=True))


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Encoder().eval().requires_grad_(False)


def test_parts_equal_the_whole(model: nn.Module) -> None:
    def encode(given: Named) -> dict[str, Tensor]:
        return dict(zip(("second", "pooled"), model(given["ids"]), strict=True))

    ids = TensorSpec(name="ids", shape=(1, 4), dtype="int64", meaning="ids")
    whole = capture(model, encode, (ids,), {"second": "a state", "pooled": "one row"})
    parts = cut(whole)
    assert [sorted(part.weights) for part in parts] == [
        ["table.weight"],
        ["layers.0.bias", "layers.0.weight"],
        ["layers.1.bias", "layers.1.weight"],
        ["layers.2.bias", "layers.2.weight", "norm.bias", "norm.weight"],
    ]
    example = {"ids": torch.tensor([[1, 4, 2, 3]])}
    known = dict(example)
    for part in parts:
        assert {item.name for item in part.inputs} <= set(known)
        known |= run(part, model, known)
    for name, expected in run(whole, model, example).items():
        assert torch.equal(known[name], expected)
    assert {item.name for part in parts for item in part.outputs} >= {"second", "pooled"}


def test_parts_of_bounded_weights_equal_the_whole(model: nn.Module) -> None:
    """Forward and backward, where each weight is used twice, the second time transposed."""

    def step(given: Named) -> dict[str, Tensor]:
        x = given["x"].detach().requires_grad_()
        y = x
        for layer in model.layers:
            y = y + torch.tanh(layer(y))
        return {"y": y, "grad_x": torch.autograd.grad((y * y).sum(), [x])[0]}

    whole = capture(model, step, (spec("x", (2, WIDTH), "x"),), {"y": "y", "grad_x": "of the sum of squares"})
    limit = 4 * (WIDTH * WIDTH + WIDTH)
    parts = cut_by_bytes(whole, limit=limit)
    assert len(parts) > 3
    example = {"x": torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))}
    known, weights = dict(example), frozen_weights(model)
    for part in parts:
        assert sum(4 * weights[name].numel() for name in part.weights) <= limit
        assert (WIDTH, WIDTH) not in {item.shape for item in part.inputs}
        known |= run(part, model, known)
    for name, expected in run(whole, model, example).items():
        assert torch.equal(known[name], expected)
    assert len(cut_by_bytes(whole)) == 1


def test_what_has_no_layers_stays_whole(model: nn.Module) -> None:
    whole = capture(model, lambda given: {"y": model.norm(given["x"])}, (spec("x", (1, WIDTH), "x"),), {"y": "y"})
    assert len(cut(whole)) == 1


def test_no_cut_where_a_mask_would_be_handed_over(model: nn.Module) -> None:
    def masked(given: Named) -> dict[str, Tensor]:
        first = model.layers[0](given["x"])
        chosen = first > 0
        return {"y": torch.where(chosen, model.layers[1](first), first)}

    whole = capture(model, masked, (spec("x", (1, WIDTH), "x"),), {"y": "y"})
    assert len(cut(whole)) == 1
