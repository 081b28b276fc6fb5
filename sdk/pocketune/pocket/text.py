"""The tokenizer and the two CLIP-style text encoders of the built-in models (stage 2 of the training script).

CLIP's encoders learn from image and caption pairs; these small ones learn from the scenes' labels, which say the same with less
noise: the pooled embedding must tell which attributes a caption names. They go on learning with the denoiser.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from pocketune.pocket.runs import StageRun
from pocketune.pocket.scenes import (
    BACKGROUNDS,
    CLASSES,
    COLOURS,
    PATTERNS,
    PLACES,
    SIZES,
    TOY,
    Scene,
    caption,
    random_scene,
    vocabulary_corpus,
)

CONTEXT_LENGTH = 20
NOUNS = (*CLASSES, TOY)
_HEADS = {
    "noun": NOUNS,
    "colour": tuple(COLOURS),
    "pattern": PATTERNS,
    "size": SIZES,
    "place": PLACES,
    "background": tuple(BACKGROUNDS),
    "second_noun": NOUNS,
    "second_colour": tuple(COLOURS),
}


def new_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer (byte-level BPE) whose merges make every caption word one token."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=4096, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator(vocabulary_corpus(), trainer)
    learned = json.loads(bpe.to_str())["model"]["merges"]
    merges = [tuple(pair) for pair in learned]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    pairs: Any = merges  # transformers takes pairs; its annotation knows only their older, joined form
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=CONTEXT_LENGTH)


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """An untrained encoder: token ids (batch, 20) to hidden states (batch, 20, 64) and a pooled embedding (batch, 64)."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=64,
        max_position_embeddings=CONTEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Captions as padded ids, int64 (batch, 20)."""
    batch = tokenizer(captions, padding="max_length", truncation=True, max_length=CONTEXT_LENGTH, return_tensors="pt")
    return torch.as_tensor(batch["input_ids"])


class AttributeReader(nn.Module):
    """Linear heads that read a caption's attributes from one pooled embedding; class 0 is "not said"."""

    def __init__(self, width: int) -> None:
        """Make a head an attribute, for embeddings (batch, width)."""
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(options) + 1) for name, options in _HEADS.items()})

    def loss(self, pooled: Tensor, labels: dict[str, Tensor]) -> Tensor:
        """Mean cross-entropy over the attributes."""
        return torch.stack([F.cross_entropy(head(pooled), labels[name]) for name, head in self.heads.items()]).mean()


def caption_labels(text: str, scene: Scene) -> dict[str, int]:
    """Index + 1 of each attribute that the text names, 0 where it does not."""
    words = set(text.split())
    first = scene.subjects[0]
    found = {
        "noun": first.noun,
        "colour": first.colour,
        "pattern": first.pattern,
        "size": first.size,
        "place": first.place,
        "background": scene.background,
    }
    labels = {name: _HEADS[name].index(value) + 1 if value in words else 0 for name, value in found.items()}
    labels["background"] = _HEADS["background"].index(scene.background) + 1 if BACKGROUNDS[scene.background] in text else 0
    second = scene.subjects[1] if len(scene.subjects) > 1 else None
    labels["second_noun"] = NOUNS.index(second.noun) + 1 if second else 0
    labels["second_colour"] = _HEADS["second_colour"].index(second.colour) + 1 if second and second.noun != TOY else 0
    return labels


class TextTower(nn.Module):
    """Both encoders and their readers as one module, for training and for the restart point."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        """Make two encoders that differ by their random start."""
        super().__init__()
        self.encoders = nn.ModuleList([new_text_encoder(tokenizer) for _ in range(2)])
        self.readers = nn.ModuleList([AttributeReader(64) for _ in range(2)])

    def forward(self, ids: Tensor, labels: dict[str, Tensor]) -> Tensor:
        """The summed loss of both encoders."""
        losses = []
        for encoder, reader in zip(self.encoders, self.readers, strict=True):
            if isinstance(reader, AttributeReader):
                losses.append(reader.loss(encoder(ids).text_embeds, labels))
        return torch.stack(losses).sum()


def train_text_encoders(folder: Path, *, steps: int, seed: int, run: StageRun) -> None:
    """Train both encoders on captions alone and save them, with the tokenizer, as diffusers subfolders."""
    accelerator = Accelerator()
    torch.manual_seed(seed + 1)
    tokenizer = new_tokenizer()
    tower = TextTower(tokenizer)
    optimizer = torch.optim.AdamW(tower.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50) * (1 - 0.95 * step / steps))
    tower, optimizer = accelerator.prepare(tower, optimizer)
    done = run.restore(accelerator.unwrap_model(tower), optimizer, schedule)
    for step in range(done, steps):
        rng = np.random.default_rng([seed, 3, step])
        scenes = [random_scene(rng) for _ in range(64)]
        captions = [caption(scene, rng) for scene in scenes]
        rows = [caption_labels(text, scene) for text, scene in zip(captions, scenes, strict=True)]
        labels = {name: torch.tensor([row[name] for row in rows], device=accelerator.device) for name in _HEADS}
        loss = tower(token_ids(tokenizer, captions).to(accelerator.device), labels)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        run.after_step(step + 1, steps, {"loss": loss.item()}, accelerator.unwrap_model(tower), optimizer, schedule)
    trained = accelerator.unwrap_model(tower).cpu()
    for encoder, suffix in zip(trained.encoders, ("", "_2"), strict=True):
        encoder.save_pretrained(folder / f"text_encoder{suffix}")
        tokenizer.save_pretrained(folder / f"tokenizer{suffix}")
