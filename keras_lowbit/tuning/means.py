"""The mean of each channel of a block's output, put right by the bias that it gets last.

A grid moves the mean of what it rounds: small positive values fall to zero, large ones are cut
off. Training a block sees half of that shift, where half of the elements stay real (`drop`), and a
bias in reals moves too slowly for a tensor whose values are several units wide. What is left is the
cheapest part of a block's error: a constant for each channel takes it away, with everything
quantized.

Reference:
    Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction, ICCV 2019,
    arXiv:1906.04721, section 4.2, for the outputs of blocks instead of layers.
"""

from __future__ import annotations

import numpy as np
from keras import ops

from keras_lowbit import walk
from keras_lowbit.kinds import activation_name, kind_of, own_bias
from keras_lowbit.tuning import streams

# Images that means are taken over, evenly spaced: each has many positions.
IMAGES = 256
_BETWEEN = frozenset({"add", "quantize", "dequantize", "dropout"})


def match_means(program: walk.Program, biases, told, wanted, batch_size: int) -> None:
    """Shift biases in place so that channel means of a program's outputs are those of `wanted`.

    Exact where only additions lie between the bias and the output; nearly so where grids do, whose
    ends may cut. An output that no bias reaches so stays as it is, such as one behind a ReLU.

    Args:
        program: the quantized block.
        biases: variables that may move.
        told: streams of its inputs, as the quantized model gives them.
        wanted: streams of the float block's outputs.
        batch_size: images at a time.
    """
    found = {}
    for position, ref in enumerate(walk.refs(program.outputs)):
        bias = bias_of(program, ref, biases)
        if bias is not None:
            found.setdefault(id(bias), (position, bias))  # one that two outputs share serves one
    if not found:
        return
    step = -(-len(told[0]) // IMAGES)
    some = [streams.Given(stream[::step]) for stream in told]
    got = streams.propagate(program, some, batch_size, float("inf"))
    for position, bias in found.values():
        difference = wanted[position][::step] - got[position].array
        shift = difference.mean(tuple(range(difference.ndim - 1)), dtype=np.float64)
        bias.assign(ops.convert_to_numpy(bias) + shift.astype(np.float32))


def bias_of(program: walk.Program, ref, biases):
    """The variable among `biases` that adds to the tensor `ref` as it is, the last if several.

    `None` where there is none.
    """
    allowed = {id(bias) for bias in biases}
    producers = program.producers()

    def search(ref):
        call = producers.get(ref.index)
        kind = call and kind_of(call)
        if kind in ("batch_norm", "product"):
            bias = own_bias(call)
            linear = kind == "batch_norm" or activation_name(call.operation) == "linear"
            return bias if linear and id(bias) in allowed else None
        if kind not in _BETWEEN:
            return None
        found = (search(one) for one in reversed(call.inputs) if one.shape == ref.shape)
        return next((bias for bias in found if bias is not None), None)

    return search(ref)
