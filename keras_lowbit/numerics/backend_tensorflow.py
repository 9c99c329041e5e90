"""Fast forms on TensorFlow, inside a graph on a CPU that XLA does not compile whole.

What the plain form loses there: a pass over the activations for each small operation. So the
element-wise work of a quantizer's forward pass is one XLA cluster and that of its backward pass
another, shared by all quantizers (they compile once a shape); the sum for the scale's gradient
stays outside, where it uses all cores. And the backward pass of a product multiplies the kernel by
the scale, not activations.

Where XLA compiles the whole step the plain form is the fastest: it fuses all of this by itself.
"""

from __future__ import annotations

import functools

import keras
import tensorflow as tf
from keras import ops

_TENSOR = tf.TensorSpec(None, tf.float32)
_SCALAR = tf.TensorSpec((), tf.float32)
# x, inverse scale, lo, hi, and backwards the gradient
_SIGNATURE = (_TENSOR, _TENSOR, _SCALAR, _SCALAR, _TENSOR)
# Elements up to which there is no cluster: a start of one takes about 0.3 ms, passes over tensors
# that stay in a cache far less.
_FEW = 1 << 15


@functools.cache
def _cluster(function, arguments):
    """One cluster for all quantizers: it compiles once a shape."""
    signature = _SIGNATURE[:arguments]
    return tf.function(function, jit_compile=True, autograph=False, input_signature=signature)


def _in_one_pass(function, x, *others):
    """`function(x, *others)`, tensors of the shape of `x`, in a cluster unless `x` is small."""
    count = x.shape.num_elements()
    if count is not None and count <= _FEW:
        return function(x, *others)
    found = _cluster(function, 1 + len(others))(x, *others)
    return tf.nest.map_structure(lambda tensor: tf.ensure_shape(tensor, x.shape), found)


@functools.cache
def _on_cpu_alone():
    return not tf.config.list_logical_devices("GPU") and not tf.config.list_logical_devices("TPU")


def _in_plain_graph():
    """Whether operations made now land in a graph on a CPU that XLA does not compile whole."""
    return (
        not tf.executing_eagerly()
        and tf.__internal__.get_enclosing_xla_context() is None
        and _on_cpu_alone()
    )


def _covers(*tensors):
    return _in_plain_graph() and all(
        isinstance(t, tf.Tensor) and t.shape.rank is not None and t.dtype == tf.float32
        for t in tensors
    )


def without_gradients():
    """Nothing is kept outside of a tape."""


def unscoped():
    """See `numerics.backend`."""
    return tf.name_scope("")


def compiled(function):
    """See `numerics.backend`."""
    return tf.function(function, autograph=False)


def known(value):
    """Always `None`: what a graph computes is not known while it is made."""
    return None


def either(condition, yes, no):
    """`yes()` or `no()`, only that one computed; `None`: not covered."""
    if not _in_plain_graph():
        return None
    return tf.cond(_tensor(condition), yes, no)


def quantize(x, scale, lo, hi, gradient_scale):
    """Codes of `x`, as `numerics.uniform.quantize`; `None`: not covered."""
    if not _covers(x) or not _lies_along_the_last_axes(scale.shape, x.shape):
        return None
    learned = gradient_scale is not None
    lo, hi, factor = (
        tf.cast(_tensor(v), tf.float32) for v in (lo, hi, gradient_scale if learned else 0.0)
    )

    @tf.custom_gradient
    def codes_of(x, scale):
        codes = _in_one_pass(_codes, x, 1.0 / scale, lo, hi)

        def backward(gradient):
            inverse = 1.0 / scale  # a gradient inside `tf.cond` may not use the tensor above
            if not learned:
                return _in_one_pass(_to_x, x, inverse, lo, hi, gradient), None
            to_x, terms = _in_one_pass(_to_both, x, inverse, lo, hi, gradient)
            to_scale = tf.reduce_sum(terms, axis=range(x.shape.rank - scale.shape.rank)) * factor
            return to_x, to_scale

        return codes, backward

    return codes_of(x, _tensor(scale))


def _lies_along_the_last_axes(scale_shape, shape):
    rank = len(scale_shape)
    return len(shape) >= rank and tuple(scale_shape) == tuple(shape[len(shape) - rank :])


def _tensor(value):
    return tf.convert_to_tensor(value.value if isinstance(value, keras.Variable) else value)


def _codes(x, inverse, lo, hi):
    # Not `tf.clip_by_value`: outside a cluster it takes two passes.
    return tf.round(tf.raw_ops.ClipByValue(t=x * inverse, clip_value_min=lo, clip_value_max=hi))


def _inside(ratio, lo, hi):
    return tf.cast((ratio >= lo - 0.5) & (ratio <= hi + 0.5), tf.float32)


def _to_x(x, inverse, lo, hi, gradient):
    """The gradient to `x`."""
    return gradient * (_inside(x * inverse, lo, hi) * inverse)


def _to_both(x, inverse, lo, hi, gradient):
    """The gradient to `x` and the terms of that to the scale."""
    # Computed again, not read again: in a fused loop that is cheaper than memory.
    ratio = tf.stop_gradient(x) * inverse
    codes = tf.round(tf.raw_ops.ClipByValue(t=ratio, clip_value_min=lo, clip_value_max=hi))
    inside = _inside(ratio, lo, hi)
    terms = gradient * ((codes - inside * ratio) * inverse)
    return gradient * (inside * inverse), terms


def _plain_enough(codes, kernel, scale, strides, dilation_rate):
    """Whether TensorFlow has kernels for the backward passes of a convolution."""
    return (
        codes.shape.rank == 4
        and kernel.shape.is_fully_defined()
        and scale.shape.rank in (0, 1)
        and tuple(dilation_rate) == (1, 1)
        and strides[0] == strides[1]
        and None not in codes.shape[1:]
    )


def conv(codes, kernel, scale, strides, padding, dilation_rate):
    """`conv(codes, kernel) * scale` in two dimensions, channels last; `None`: not covered."""
    if not _covers(codes, kernel, scale) or not _plain_enough(
        codes, kernel, scale, strides, dilation_rate
    ):
        return None
    if codes.shape[3] != kernel.shape[2]:
        return None
    how = {"strides": [1, *strides, 1], "padding": padding.upper()}

    @tf.custom_gradient
    def product(codes, kernel, scale):
        outputs = ops.conv(codes, kernel, tuple(strides), padding, "channels_last")

        def backward(gradient):
            to_codes = tf.raw_ops.Conv2DBackpropInput(
                input_sizes=tf.shape(codes), filter=kernel * scale, out_backprop=gradient, **how
            )
            to_kernel = tf.raw_ops.Conv2DBackpropFilter(
                input=codes, filter_sizes=kernel.shape, out_backprop=gradient, **how
            )
            return to_codes, to_kernel * scale, None

        return outputs * scale, backward

    return product(codes, kernel, scale)


def depthwise_conv(codes, kernel, scale, strides, padding, dilation_rate):
    """`depthwise_conv(codes, kernel) * scale`; see `conv`."""
    if not _covers(codes, kernel, scale) or not _plain_enough(
        codes, kernel, scale, strides, dilation_rate
    ):
        return None
    how = {"strides": [1, *strides, 1], "padding": padding.upper()}
    of_kernel = scale if scale.shape.rank == 0 else tf.reshape(scale, kernel.shape[2:])

    @tf.custom_gradient
    def product(codes, kernel, scale, of_kernel):
        outputs = ops.depthwise_conv(codes, kernel, tuple(strides), padding, "channels_last")

        def backward(gradient):
            to_codes = tf.nn.depthwise_conv2d_backprop_input(
                tf.shape(codes), kernel * of_kernel, gradient, **how
            )
            to_kernel = tf.nn.depthwise_conv2d_backprop_filter(codes, kernel.shape, gradient, **how)
            return to_codes, to_kernel * of_kernel, None, None

        return outputs * scale, backward

    return product(codes, kernel, scale, of_kernel)


def matmul(codes, kernel, scale):
    """Always `None`: a dense layer's input is small, or its product large against the scaling."""
    return None


def batch_norm(x, gamma, beta, epsilon):
    """Normalized `x` and its moments, as `numerics.backend.batch_norm`."""
    if not _covers(x) or x.shape[-1] is None:
        return None
    channels = x.shape[-1]
    gamma = tf.ones(channels) if gamma is None else _tensor(gamma)
    beta = tf.zeros(channels) if beta is None else _tensor(beta)
    outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=x,
        scale=gamma,
        offset=beta,
        mean=tf.zeros(0),
        variance=tf.zeros(0),
        epsilon=epsilon,
        data_format="NHWC",
        is_training=True,
    )
    count = tf.cast(tf.size(x), tf.float32) / channels
    # The operation divides by n - 1, with 1 in place of 0.
    biased = variance * (tf.maximum(count - 1.0, 1.0) / count)
    return outputs, tf.stop_gradient(mean), tf.stop_gradient(biased)
