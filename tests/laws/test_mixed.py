"""Mixed training: what backpropagates does so at low resolution, and what sees high resolution is of zeroth order."""

from pathlib import Path
from typing import Any

import pytest

from pocketune import personalize, train
from tests.reliability.test_job import quick_recipe

LATENT_PIXEL = 8


def test_each_kind_of_step_has_its_resolution(
    tiny_folder: Path, toy_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW's moments count backpropagated steps alone."""
    seen: list[tuple[str, int, int]] = []

    def watch(name: str, *, batch_at: int, optimizer_at: int) -> None:
        original = getattr(train, name)

        def step(*arguments: Any, **settings: Any) -> float:
            loss: float = original(*arguments, **settings)
            counts = {int(state["step"]) for state in arguments[optimizer_at].state.values()} or {0}
            seen.append((name, arguments[batch_at].latents.shape[-1] * LATENT_PIXEL, max(counts)))
            return loss

        monkeypatch.setattr(train, name, step)

    watch("train_step", batch_at=4, optimizer_at=5)
    watch("zeroth_order_step", batch_at=4, optimizer_at=5)
    asked = quick_recipe(gradient="mixed", mix_start=0.5, mix_end=0.5, steps=12, resolution=64, low_resolution=32)
    record = personalize(toy_photos, model=str(tiny_folder), recipe=asked, out=tmp_path / "run")
    kinds = ["zeroth_order_step" if choice["zeroth_order"] else "train_step" for choice in record.plan["choices"]]
    assert [name for name, *_ in seen] == kinds and set(kinds) == {"zeroth_order_step", "train_step"}
    assert {side for name, side, _ in seen if name == "train_step"} == {32}
    assert {side for name, side, _ in seen if name == "zeroth_order_step"} == {64}
    assert [count for *_, count in seen] == [kinds[: index + 1].count("train_step") for index in range(len(kinds))]
