"""The ops `torch.ops.unswag.*`, which call the C++ core on tensors. No autograd here.

One module per family; each op has its schema, its kernel and its fake kernel in one place (`register.op`). `tensors` has what
they share: the tables DTYPES, MASKS, ACTIVATIONS and BLOCKS, checks, and the layout and place of a tensor.

An op has no derivative: one that is registered here would cost three times as much as the `autograd.Function`s of
`unswag.torch.functional`. An op called on a tensor that requires grad raises, because it would silently cut the graph.

Errors of all ops: TypeError (dtype), ValueError (shape, device, value), NotImplementedError or RuntimeError (a device without
kernels).
"""

from unswag.torch.ops.activations import (
    activation_backward,
    activation_forward,
    gated_backward,
    gated_backward_product,
    gated_forward,
    gated_halves_backward,
    halves,
)
from unswag.torch.ops.blocks import block_decode, block_encode
from unswag.torch.ops.codes import DITHERED, code_backward, code_forward, dither_backward, dither_forward
from unswag.torch.ops.cross_entropy import cross_entropy_
from unswag.torch.ops.dropout import dropout
from unswag.torch.ops.masks import mask_backward, mask_forward, signs_decode, signs_encode
from unswag.torch.ops.nonzeros import nonzero_decode, nonzero_encode
from unswag.torch.ops.norms import (
    layer_norm_apply,
    layer_norm_backward,
    layer_norm_forward,
    rms_norm_apply,
    rms_norm_backward,
    rms_norm_forward,
)
from unswag.torch.ops.register import OPS
from unswag.torch.ops.tensors import ACTIVATIONS, BLOCKS, DTYPES, MASKS, packed_row_bytes

__all__ = [
    "ACTIVATIONS",
    "BLOCKS",
    "DITHERED",
    "DTYPES",
    "MASKS",
    "OPS",
    "activation_backward",
    "activation_forward",
    "block_decode",
    "block_encode",
    "code_backward",
    "code_forward",
    "cross_entropy_",
    "dither_backward",
    "dither_forward",
    "dropout",
    "gated_backward",
    "gated_backward_product",
    "gated_forward",
    "gated_halves_backward",
    "halves",
    "layer_norm_apply",
    "layer_norm_backward",
    "layer_norm_forward",
    "mask_backward",
    "mask_forward",
    "nonzero_decode",
    "nonzero_encode",
    "packed_row_bytes",
    "rms_norm_apply",
    "rms_norm_backward",
    "rms_norm_forward",
    "signs_decode",
    "signs_encode",
]
