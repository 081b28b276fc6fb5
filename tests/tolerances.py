"""Every tolerance of the test suite, with its reason."""

# One step of diffusers' script against ours: the same operations in float32, summed in another order (a mean over samples).
SCRIPT_LOSS = 1e-6
SCRIPT_GRADIENT = 1e-6
# A saved and loaded LoRA file: float32 all the way, so only fused against separate LoRA arithmetic differs.
LORA_ROUND_TRIP = 1e-5
# bfloat16 keeps 8 bits of a residual's mantissa.
BFLOAT16_RELATIVE = 1 / 128
# ONNX Runtime against PyTorch over six steps: the same float32 operations in another order, text and image encoders included.
EDGE_LOSS = 2e-5
EDGE_PARAMETER = 1e-5
# Of a learning rate: AdamW makes part of a step out of the last digits of a gradient that is nearly zero.
EDGE_SHARE_OF_A_STEP = 0.1
# Sampled pixels, of 255 levels: a rounding away from the boundary of two levels.
EDGE_IMAGE_LEVELS = 1
# A difference of two float32 losses over 2e-3, against the exact slope, relative to the gradient's norm.
DIRECTIONAL_DERIVATIVE = 2e-2
# The loss of pocket-sd3 with weights in few bits: rounding of 1/255 of a row's range, or of 1/15 of the range of 64 values.
PACKED_LOSS = {8: 5e-3, 4: 0.1}
# Three float32 gradients summed in another order, relative to the largest.
SUM_ORDER = 1e-5
# Gradients of scales around a packed weight against autograd on the float layer: float32 sums in another order.
SCALE_GRADIENT = 1e-5
# A merged weight against scales applied around the packed one, over six blocks: the same products in another order.
SCALES_MERGED = 1e-5
# Bytes counted on the meta device against those of real tensors: the processor's kernels give a few results other strides.
TRACED_BYTES = 0.02
# ExecuTorch's XNNPACK against PyTorch, relative to the largest number: it approximates exponentials.
EXECUTORCH_RELATIVE = 1e-4
# Pixels of 255 levels in bfloat16, whose kernels sum a tile in another order than a whole layer: a few roundings of 1/128.
HALF_PRECISION_PIXELS = 16
# The direction of a gradient in half precision against float32, over six blocks: roundings of 1/256 in every activation.
HALF_PRECISION_COSINE = 0.98
# The share of an update of 1e-3 that shows in bfloat16: a few of the weights, each rounded by itself, move by steps of 1/128.
HALF_PRECISION_UPDATE = 0.25
