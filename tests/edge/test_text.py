"""Prompts on a device: each part of an encoder is read once for all of them."""

from pathlib import Path
from typing import Any

import pytest

from pocketune_edge.bundle import open_bundle
from pocketune_edge.delta import neutral
from pocketune_edge.errors import SettingError
from pocketune_edge.sample import render
from pocketune_edge.session import Session, Sessions
from pocketune_edge.text import encode_prompts


def test_each_part_is_opened_once_for_all_prompts(skipping_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The empty prompt of guidance included."""
    opened = []

    class Counted(Session):
        def __init__(self, bundle: Any, graph: Any, *, threads: int | None) -> None:
            opened.append(graph.name)
            super().__init__(bundle, graph, threads=threads)

    monkeypatch.setattr("pocketune_edge.session.Session", Counted)
    bundle = open_bundle(skipping_bundle)
    images = render(
        Sessions(bundle, keep=False, threads=1),
        ["a toy", "a cat"],
        seeds=[0, 1],
        steps=1,
        guidance=7.0,
        parameters=neutral(bundle.manifest.tuned),
        on_step=lambda *_: None,
    )
    assert len(list(images)) == 2
    parts = [graph.name for graph in bundle.manifest.graphs if graph.role in ("text_encoder", "text_join")]
    assert [opened.count(name) for name in parts] == [1] * len(parts)


def test_a_prompt_that_is_no_text_is_refused(sound: Path) -> None:
    with pytest.raises(SettingError, match=r"the prompt 'a \\udcff toy' is not UTF-8 text"):
        encode_prompts(Sessions(open_bundle(sound), keep=False, threads=1), ["a toy", "a \udcff toy"])
