"""Faster forms for JAX; `numerics.backend` says what they are."""

from __future__ import annotations

import functools

import jax
from jax import lax
from jax import numpy as jnp

from keras_lowbit.numerics.windows import same_padding

# Of a kernel, as many products are written out; a large window compiles for longer than it saves.
_MOST_TAPS = 25


def depthwise(x, kernel, strides, padding, dilation_rate):
    """A depthwise convolution as a sum of shifted products; `None`: not covered.

        y[n, i, j, c] = sum over (a, b) of x[n, s i + a, s j + b, c] kernel[a, b, c]

    On a CPU XLA's grouped convolution takes 15 to 40 times as long, its gradients 3 to 30 times.

    Gradient:
        Of that sum, written out likewise.
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    height, width, channels, multiplier = kernel.shape
    covered = (
        multiplier == 1
        and tuple(dilation_rate) == (1, 1)
        and height * width <= _MOST_TAPS
        and x.ndim == 4
        and x.shape[3] == channels
        and x.dtype == kernel.dtype
    )
    if not covered:
        return None
    sizes = zip(x.shape[1:3], kernel.shape[:2], strides, strict=True)
    pads = tuple(same_padding(*one) if padding == "same" else (0, 0) for one in sizes)
    return _compiled(x, kernel, tuple(strides), pads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(x, kernel, strides, pads):
    padded = _padded(x, pads)
    size = _sizes(padded, kernel, strides)
    return sum(_tap(padded, at, size, strides) * kernel[at][:, 0] for at in _positions(kernel))


def _forward(x, kernel, strides, pads):
    return _depthwise(x, kernel, strides, pads), (x, kernel)


def _backward(strides, pads, kept, gradient):
    x, kernel = kept
    padded = _padded(x, pads)
    size = _sizes(padded, kernel, strides)
    # Zeros between the gradients of strided windows, and around them: each pixel then sees the
    # outputs that it went into, through the kernel from its end.
    last = [n - 1 for n in kernel.shape[:2]]
    config = [(0, 0, 0)]
    for axis in (0, 1):
        before = last[axis] - pads[axis][0]
        spread = (size[axis] - 1) * strides[axis] + 1
        after = x.shape[1 + axis] + last[axis] - before - spread
        config.append((before, after, strides[axis] - 1))
    spaced = lax.pad(gradient, jnp.zeros((), gradient.dtype), [*config, (0, 0, 0)])
    to_x = sum(
        _tap(spaced, (last[0] - a, last[1] - b), x.shape[1:3], (1, 1)) * kernel[a, b, :, 0]
        for a, b in _positions(kernel)
    )
    return to_x, _to_kernel(padded, gradient, kernel, strides)


def _to_kernel(padded, gradient, kernel, strides):
    """The gradient to the kernel; on a CPU image by image, each of which stays in its cache."""

    def of(padded, gradient):
        size = gradient.shape[1:3]
        taps = (_tap(padded, at, size, strides) for at in _positions(kernel))
        return jnp.stack([jnp.sum(tap * gradient, axis=(0, 1, 2)) for tap in taps])

    def add(total, image):
        return total + of(*(part[None] for part in image)), None

    # A scan over images that lie on several devices would bring them all together.
    if jax.default_backend() == "cpu" and jax.device_count() == 1:
        start = jnp.zeros((kernel.shape[0] * kernel.shape[1], kernel.shape[2]), kernel.dtype)
        found, _ = lax.scan(add, start, (padded, gradient))
    else:
        found = of(padded, gradient)
    return found.reshape(kernel.shape)


_depthwise.defvjp(_forward, _backward)
# One call where a step is not compiled as a whole, as in `calibrate`.
_compiled = jax.jit(_depthwise, static_argnums=(2, 3))


def _positions(kernel):
    return [(a, b) for a in range(kernel.shape[0]) for b in range(kernel.shape[1])]


def _padded(x, pads):
    return jnp.pad(x, [(0, 0), *pads, (0, 0)]) if any(map(any, pads)) else x


def _sizes(padded, kernel, strides):
    sizes = zip(padded.shape[1:3], kernel.shape[:2], strides, strict=True)
    return [(n - k) // s + 1 for n, k, s in sizes]


def _tap(padded, at, size, strides):
    """What a kernel's position `at` sees: one pixel an output."""
    (a, b), (height, width), (down, right) = at, size, strides
    ends = (a + (height - 1) * down + 1, b + (width - 1) * right + 1)
    return padded[:, a : ends[0] : down, b : ends[1] : right]
