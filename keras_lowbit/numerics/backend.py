"""Operations that some backends have a faster form of.

The plain form in `keras.ops` is the definition. A `backend_<name>` module may answer with a tensor
of equal value and gradient, or with `None` for whatever it does not cover; it is imported when
Keras runs on that backend and the first such operation is asked for.
"""

from __future__ import annotations

import contextlib

import keras
from keras import ops

_CHANNELS_LAST = "channels_last"


def _fast(operation, *arguments):
    """What the fast form of `operation` answers, `None` on a backend that has none."""
    name = keras.backend.backend()
    if name == "torch":
        from keras_lowbit.numerics import backend_torch as forms
    elif name == "tensorflow":
        from keras_lowbit.numerics import backend_tensorflow as forms
    else:
        return None
    return getattr(forms, operation)(*arguments)


def unscoped():
    """A context in which a variable's name in the backend is that of the variable alone.

    TensorFlow keeps an operation for each name of a variable, and making one takes a millisecond.
    Keras' paths stay as they are.
    """
    return _fast("unscoped") or contextlib.nullcontext()


def without_gradients():
    """A context in which no gradient will be asked for.

    PyTorch keeps what a backward pass would need unless told so: all activations of a batch.
    """
    return _fast("without_gradients") or contextlib.nullcontext()


def compiled(function):
    """`function` of tensors as one graph, on TensorFlow alone: several times as fast as eagerly.

    It compiles at the first call with each shape; what Python does inside happens then only.
    """
    return _fast("compiled", function) or function


def known(value):
    """A scalar variable or tensor as a number; `None` where that would wait, or is not known yet.

    So a graph that is compiled never depends on the number.
    """
    return _fast("known", value)


def either(condition, yes, no):
    """`yes()` where a scalar `condition` holds, else `no()`: two tuples of tensors.

    The plain form computes both and selects: one graph, whatever the condition.

    Gradient:
        Zero, not missing, to what only the branch that was not taken depends on. `yes` may depend
        on nothing that `no` does not, so that `no` alone can stand for both.
    """
    if known(condition) == 0:
        return no()
    found = _fast("either", condition, yes, no)
    if found is not None:
        return found
    pairs = zip(yes(), no(), strict=True)
    return tuple(ops.where(condition, a, b) for a, b in pairs)


def quantize(x, scale, lo, hi, gradient_scale):
    """Codes with the gradient of `numerics.uniform.quantize`, or `None`: take the plain form."""
    return _fast("quantize", x, scale, lo, hi, gradient_scale)


def matmul(codes, kernel, scale):
    """`matmul(codes, kernel) * scale`.

    Args:
        codes: shape `(..., n)`.
        kernel: codes, shape `(n, units)`.
        scale: a scalar or shape `(units,)`, taken as a constant; `None` for 1.

    Gradient:
        Of that product; none to the scale.
    """
    fast = None if scale is None else _fast("matmul", codes, kernel, ops.stop_gradient(scale))
    return _scaled(ops.matmul(codes, kernel), scale) if fast is None else fast


def conv(codes, kernel, scale, *, strides=(1, 1), padding="valid", dilation_rate=(1, 1)):
    """`conv(codes, kernel) * scale` in two dimensions, channels last.

    Args:
        codes: shape `(batch, height, width, channels)`.
        kernel: codes, shape `(h, w, channels / groups, filters)`.
        scale: a scalar or shape `(filters,)`, taken as a constant; `None` for 1.
        strides: two ints.
        padding: `"valid"` or `"same"`.
        dilation_rate: two ints.

    Gradient:
        Of that product; none to the scale.
    """
    return _conv("conv", codes, kernel, scale, strides, padding, dilation_rate)


def depthwise_conv(codes, kernel, scale, *, strides=(1, 1), padding="valid", dilation_rate=(1, 1)):
    """`depthwise_conv(codes, kernel) * scale`; see `conv`.

    The kernel's shape is `(h, w, channels, multiplier)`, the scale's `()` or
    `(channels * multiplier,)`.
    """
    return _conv("depthwise_conv", codes, kernel, scale, strides, padding, dilation_rate)


def _conv(operation, codes, kernel, scale, strides, padding, dilation_rate):
    if scale is not None:
        constant = ops.stop_gradient(scale)
        fast = _fast(operation, codes, kernel, constant, strides, padding, dilation_rate)
        if fast is not None:
            return fast
    product = depthwise if operation == "depthwise_conv" else _plain_conv
    return _scaled(product(codes, kernel, strides, padding, dilation_rate), scale)


def depthwise(x, kernel, strides, padding, dilation_rate):
    """`ops.depthwise_conv`, channels last, without XLA's slow kernels on JAX; arguments as there.

    Gradient:
        Of that product.
    """
    if keras.backend.backend() == "jax":
        from keras_lowbit.numerics import backend_jax

        found = backend_jax.depthwise(x, kernel, strides, padding, dilation_rate)
        if found is not None:
            return found
    return _plain_conv(x, kernel, strides, padding, dilation_rate, operation=ops.depthwise_conv)


def _plain_conv(x, kernel, strides, padding, dilation_rate, operation=ops.conv):
    return operation(
        x,
        kernel,
        strides=tuple(strides),
        padding=padding,
        dilation_rate=dilation_rate,
        data_format=_CHANNELS_LAST,
    )


def batch_norm(x, gamma, beta, epsilon):
    """`(normalized x, mean, variance)` by the moments of the batch, or `None`: the plain form.

    Args:
        x: shape `(batch, height, width, channels)`, float32.
        gamma: shape `(channels,)`; `None` for ones.
        beta: shape `(channels,)`; `None` for zeros.
        epsilon: added to the variance.

    Returns:
        `None` where the backend has no faster form than Keras' own, else `x` normalized and the
        moments, shape `(channels,)`, the variance that of the batch itself (divided by n).

    Gradient:
        Of the normalized values, through the moments too; none of the moments that are returned.
    """
    return _fast("batch_norm", x, gamma, beta, epsilon)


def _scaled(product, scale):
    return product if scale is None else product * ops.stop_gradient(scale)
