"""Which operations and attributes a set of random models has used, and how often."""

from __future__ import annotations

import collections


class Coverage(collections.Counter):
    """How often each operation and attribute was used."""

    def missing(self, least):
        """Features of `FEATURES` seen less often than `least`, with their counts."""
        return {f: self[f] for f in FEATURES if self[f] < least}

    def __str__(self):
        return ", ".join(f"{name} {self[name]}" for name in FEATURES)


FEATURES = (
    "conv", "conv 1x1", "conv groups", "conv dilation", "conv strides", "conv SAME", "conv VALID",
    "conv without bias", "conv even kernel",
    "depthwise", "depthwise multiplier", "depthwise strides", "depthwise dilation",
    "depthwise SAME", "depthwise VALID", "separable", "separable multiplier", "dense",
    "dense on images",
    "fused relu", "fused relu6", "relu", "relu6", "ops.relu", "linear",
    "batch norm", "batch norm before a product",
    "relu with a limit", "leaky relu", "silu", "hard_silu", "sigmoid", "hard_sigmoid", "constant",
    "squeeze and excite", "multiply",
    "add", "ops.add", "add of three", "concatenate", "concatenate of rows",
    "upsampling", "max pool SAME", "max pool VALID", "max pool strides", "average pool SAME",
    "average pool VALID",
    "global average pool", "global average pool keepdims",
    "zero padding", "padding as SAME", "ops.pad", "strided slice", "crop",
    "slice of channels", "transpose", "flatten", "reshape", "dropout",
    "shared layer", "nested model", "odd size", "several inputs", "several outputs", "softmax",
    "rescaling", "batch", "uint8 input", "int8 ends", "uint8 output",
)  # fmt: skip
