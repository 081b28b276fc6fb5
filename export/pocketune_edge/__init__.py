"""Pocketune on a device: personalizes and samples from an exported bundle with stock ONNX Runtime.

Of Pocketune it uses only what needs neither torch nor pydantic: photos, draws, progress, memory readings, atomic files. Third
parties: numpy, onnxruntime, pillow, tokenizers, safetensors.
"""
