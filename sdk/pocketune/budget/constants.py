"""What no tensor shows, fitted to rows of benchmarks/results/memory.jsonl: measured peak above the floor, less what was traced.

| row | trained tensors | MB that no tensor shows |
|---|---|---|
| fit-pixart-256-two-streamed | 40 | 29.1 |
| fit-pixart-256-quarter | 140 | 32.1 |
| sd35-256-half | 192 | 40.4 |
| fit-pixart-256-low | 560 | 52.2 |

On x86-64 with the CPU build of torch and glibc, one thread.
"""

from __future__ import annotations

HEAP_BYTES = 27_000_000
"""Python objects of model and autograd, pages of code that kernels touch first, and buffers inside of kernels."""
HEAP_BYTES_PER_TENSOR = 45_000
"""Modules, names, optimizer state and small pieces of each trained tensor."""

CONVOLUTION_BYTES, CONVOLUTION_BYTES_PER_SHAPE = 8_100_000, 200_000
"""Pages of code for convolutions whose windows overlap, and the code that oneDNN makes for each shape; measured one by one."""

HEAP_BYTES_PER_ENCODER = 10_000_000
"""Of each text encoder in memory: its modules, and the vocabulary of its tokenizer."""
LEFT_BYTES = 30_000_000
"""What text encoders and autoencoder leave in a process that goes on: pages of code, and holes in the heap.

Measured peaks less what was traced, in MB, without these two: of the whole job sd35-256-half-whole 18 in the phase text, 37 in
features (16 of them waited for a file, and are traced since), 56 in training, 74 in samples; of one of pocket-sd3 with blocks 0
to 3 skipped 0, 27, 28 and 11.
"""
