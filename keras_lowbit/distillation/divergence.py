"""Distances between two nets: of their logits, and of their feature maps on a grid."""

from __future__ import annotations

from keras import ops

from keras_lowbit.numerics.uniform import inside_mask, straight_through


def divergence(target_logits, logits, temperature):
    """How far `softmax(logits / T)` is from that of `target_logits`.

        T^2 KL(p || q) = T^2 sum_classes p (log p - log q),   p = softmax(sg(target) / T)
                                                              q = softmax(logits / T)

    the mean over the batch. Computed from logits: `keras.losses.KLDivergence`, which
    `keras.distillation` applies to probabilities, cuts those below 1e-7 and their gradient.

    Args:
        target_logits: `(batch, classes)`, without gradient; float32 under any policy, as `logits`.
        logits: `(batch, classes)`.
        temperature: T, positive.

    Returns:
        A scalar, exactly 0 where both logits are equal.

    Gradient:
        To `logits`: `T (q - p) / batch`.

    Reference:
        Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015,
        arXiv:1503.02531, section 2.
    """
    target_logits, logits = (ops.cast(x, "float32") for x in (target_logits, logits))
    log_p = ops.log_softmax(ops.stop_gradient(target_logits) / temperature, axis=-1)
    log_q = ops.log_softmax(logits / temperature, axis=-1)
    return temperature**2 * ops.mean(ops.sum(ops.exp(log_p) * (log_p - log_q), axis=-1))


def on_grid_of(quantizer, x):
    """`x` as the activation quantizer gives it, which learns nothing of it.

        out = scale * code(x)

    Args:
        quantizer: a built activation quantizer.
        x: reals, such as a float net's feature map.

    Gradient:
        To `x`: 1 where `lo - 0.5 <= x / scale <= hi + 0.5`, else 0; 1 while it is switched off.
    """
    x = ops.cast(x, "float32")
    with quantizer.at_rest():
        codes, scale = quantizer.encode(ops.stop_gradient(x))
    lo, hi = quantizer.bounds()
    inside = inside_mask(ops.stop_gradient(x / scale), lo, hi)
    if quantizer.switch is not None:
        inside = ops.where(quantizer.switch > 0.5, inside, 1.0)
    return straight_through(codes * scale, (x, inside))


def squared_distance(first, second):
    """`mean (first - second)^2` over batch and features, in float32."""
    first, second = (ops.cast(x, "float32") for x in (first, second))
    return ops.mean(ops.square(first - second))
