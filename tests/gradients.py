"""Gradients and compiled functions on whichever backend the tests run."""

import keras
import numpy as np
from keras import ops


def gradient(fn, *arrays, variables=()):
    """Gradients of the scalar `fn(*tensors)` to `arrays`, then to Keras `variables`.

    Returns NumPy arrays, zeros where `fn` does not depend on one; NaN or infinity fails the test.
    """
    backend = keras.backend.backend()
    grads = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}[backend](
        fn, [np.asarray(a, np.float32) for a in arrays], list(variables)
    )
    for grad in grads:
        assert np.isfinite(grad).all(), "a gradient is not finite"
    return grads


def _tensorflow(fn, arrays, variables):
    import tensorflow as tf

    tensors = [tf.constant(a) for a in arrays]
    sources = [*tensors, *(v.value for v in variables)]
    with tf.GradientTape() as tape:
        tape.watch(sources)
        loss = fn(*tensors)
    grads = tape.gradient(loss, sources, unconnected_gradients="zero")
    return [np.asarray(g) for g in grads]


def _jax(fn, arrays, variables):
    import jax

    n = len(arrays)

    def loss(*sources):
        with keras.StatelessScope(state_mapping=list(zip(variables, sources[n:], strict=True))):
            return fn(*sources[:n])

    sources = [*map(ops.convert_to_tensor, arrays), *(v.value for v in variables)]
    # One compilation: JAX would compile each operation by itself otherwise.
    grads = jax.jit(jax.grad(loss, range(len(sources))))(*sources)
    return [np.asarray(g) for g in grads]


def _torch(fn, arrays, variables):
    import torch

    tensors = [torch.tensor(a, requires_grad=True) for a in arrays]
    values = [v.value for v in variables]
    frozen = [v for v in values if not v.requires_grad]
    for value in frozen:
        value.requires_grad_(True)
    sources = [*tensors, *values]
    try:
        grads = torch.autograd.grad(fn(*tensors), sources, allow_unused=True)
    finally:
        for value in frozen:
            value.requires_grad_(False)
    return [
        np.zeros(tuple(s.shape), np.float32) if g is None else g.numpy()
        for s, g in zip(sources, grads, strict=True)
    ]


def compiled(fn):
    """`fn` of arrays as one compiled graph (XLA; a trace on PyTorch), with NumPy results."""
    backend = keras.backend.backend()

    def stateless(*tensors):
        # Compiled JAX must not leave its tracers in variables.
        with keras.StatelessScope():
            return fn(*tensors)

    if backend == "tensorflow":
        import tensorflow as tf

        made = tf.function(fn, jit_compile=True, autograph=False)
    elif backend == "jax":
        import jax

        made = jax.jit(stateless)
    else:
        import torch

        # The tracer alone: generating code takes a minute and says nothing about our graph.
        made = torch.compile(fn, backend="eager")

    def call(*arrays):
        tensors = [ops.convert_to_tensor(np.asarray(a, np.float32)) for a in arrays]
        return keras.tree.map_structure(ops.convert_to_numpy, made(*tensors))

    return call
