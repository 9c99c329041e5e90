"""How weights choose among learned levels: by nearness, by signs over a basis, by logits.

A mode keeps the variables that levels are made of, and those that choose, in its quantizer, the
`owner`. It answers with masks, one for each level but the first: all weights take level 0, then
those of mask k, in order, level k.
"""

from __future__ import annotations

import numpy as np
from keras import ops

from keras_lowbit.quantizers.lloyd import ITERATIONS

# Latent signs start within -1..1, none nearer to 0 than this.
_NEAREST_TO_ZERO = 1e-3
SELECTOR_BITS = 2


class Codebook:
    """A weight takes the nearest level; `v_1` is free, and gaps above it are positive.

    v_{k+1} = v_k + width * softplus(g_k / width)
    """

    def build(self, owner, shape, scale_shape):
        """Create evenly spaced levels at -1..1."""
        gap = 2.0 / (owner.count - 1)
        owner.lowest = owner.add_state("lowest", -1.0, scale_shape, trainable=True)
        owner.gaps = owner.add_state(
            "gaps", gap * _inverse_softplus(1.0), (owner.count - 1, *scale_shape), trainable=True
        )
        owner.width = owner.add_state("width", gap, scale_shape)

    def levels(self, owner):
        """`(K, ...)`, rising."""
        width = ops.stop_gradient(ops.convert_to_tensor(owner.width))
        steps = width * ops.softplus(ops.convert_to_tensor(owner.gaps) / width)
        lowest = ops.expand_dims(ops.convert_to_tensor(owner.lowest), 0)
        return ops.concatenate([lowest, lowest + ops.cumsum(steps, axis=0)], axis=0)

    def reach(self, owner, levels):
        """The largest magnitude of `levels`."""
        return ops.maximum(ops.abs(levels[0]), ops.abs(levels[-1]))

    def masks(self, owner, x, reals):
        """Where `x` lies above the threshold below level k."""
        return [x > 0.5 * (reals[k - 1] + reals[k]) for k in range(1, owner.count)]

    def slopes(self, owner, x, reals):
        """1 to `x`, up to half of an outer gap past the ends."""
        below = reals[0] - 0.5 * (reals[1] - reals[0])
        beyond = reals[-1] + 0.5 * (reals[-1] - reals[-2])
        weight = ops.stop_gradient(x)
        inside = ops.logical_and(weight >= below, weight <= beyond)
        return [(x, ops.cast(inside, "float32"))]

    def start(self, owner, kernel, levels, refine):
        """Take rising `levels`, `(K, ...)`."""
        steps = np.diff(np.asarray(levels, np.float64), axis=0)
        width = steps.mean(axis=0)
        owner.gaps.assign(np.float32(width * _inverse_softplus(steps / width)))
        owner.lowest.assign(np.float32(levels[0]))
        owner.width.assign(np.float32(width))


class Selector(Codebook):
    """A weight has a logit for each level of a codebook and takes the level of the largest.

    Backwards the choice is softmax(logits / temperature).
    """

    def build(self, owner, shape, scale_shape):
        """Create the codebook, a logit for each weight and level, and the temperature."""
        super().build(owner, shape, scale_shape)
        owner.logits = owner.add_state("logits", 0.0, (owner.count, *shape), trainable=True)
        owner.temperature = owner.add_state("temperature", 1.0)

    def masks(self, owner, x, reals):
        """Where the logit of level k is the largest, the first of equal ones."""
        chosen = ops.argmax(ops.stop_gradient(ops.convert_to_tensor(owner.logits)), axis=0)
        return [ops.equal(chosen, k) for k in range(1, owner.count)]

    def slopes(self, owner, x, reals):
        """`p_k (v_k - sum_j p_j v_j) / temperature` to logit k; none to `x`."""
        logits = ops.convert_to_tensor(owner.logits)
        temperature = ops.convert_to_tensor(owner.temperature)
        shares = ops.unstack(ops.softmax(ops.stop_gradient(logits) / temperature, axis=0))
        mean = sum(share * reals[k] for k, share in enumerate(shares))
        soft = [
            (logits[k], share * (reals[k] - mean) / temperature) for k, share in enumerate(shares)
        ]
        return [(x, ops.zeros_like(mean)), *soft]

    def start(self, owner, kernel, levels, refine):
        """Take `levels`, and logits whose largest is that of the nearest."""
        super().start(owner, kernel, levels, refine)
        levels = np.asarray(levels, np.float64)
        spread = np.median(np.diff(levels, axis=0), axis=0) / 2
        missing = kernel.ndim - (levels.ndim - 1)
        under = levels.reshape(len(levels), *[1] * missing, *levels.shape[1:])
        owner.logits.assign(np.float32(-((kernel - under) ** 2) / (2 * spread**2)))


class Basis:
    """A weight is a sum of `bits` basis values, each with a sign: `q = sum_i v_i sign(x_i)`.

    The latents `x_i` stand in for the float weight; sign(0) is 1.
    """

    def build(self, owner, shape, scale_shape):
        """Create basis values whose levels are evenly spaced at -1..1, and latents."""
        bits = len(_even_basis(owner.count))
        owner.basis = owner.add_state("basis", 0.0, (bits, *scale_shape), trainable=True)
        even = np.multiply.outer(_even_basis(owner.count), np.ones(scale_shape))
        owner.basis.assign(np.float32(even))
        owner.latents = owner.add_state("latents", 0.0, (bits, *shape), trainable=True)

    def levels(self, owner):
        """`(K, ...)`, level p by the signs that the binary digits of p stand for."""
        basis = ops.convert_to_tensor(owner.basis)
        levels = ops.stack([-basis[0], basis[0]])
        for i in range(1, basis.shape[0]):
            levels = ops.concatenate([levels - basis[i], levels + basis[i]], axis=0)
        return levels

    def reach(self, owner, levels):
        """The largest magnitude of `levels`: all of the basis with one sign."""
        basis = ops.abs(ops.stop_gradient(ops.convert_to_tensor(owner.basis)))
        return sum(basis[i] for i in range(basis.shape[0]))

    def masks(self, owner, x, reals):
        """Where the signs are those of pattern k."""
        latents = ops.stop_gradient(ops.convert_to_tensor(owner.latents))
        digits = ops.cast(latents >= 0.0, "int32")
        pattern = sum(digits[i] * 2**i for i in range(latents.shape[0]))
        return [ops.equal(pattern, k) for k in range(1, owner.count)]

    def slopes(self, owner, x, reals):
        """`v_i` to latent i where `|x_i| <= 1`; none to `x`."""
        latents = ops.convert_to_tensor(owner.latents)
        held = ops.stop_gradient(latents)
        basis = ops.stop_gradient(ops.convert_to_tensor(owner.basis))
        inside = ops.cast(ops.abs(held) <= 1.0, "float32")
        signs = [(latents[i], basis[i] * inside[i]) for i in range(latents.shape[0])]
        return [(x, ops.zeros_like(inside[0])), *signs]

    def start(self, owner, kernel, levels, refine):
        """Fit basis and signs to a kernel by turns, from even steps over the reach of `levels`.

        Signs are those of the nearest level; the basis then is the least-squares one.

        Reference:
            Zhang, Yang, Ye, Hua, LQ-Nets, ECCV 2018, arXiv:1807.10029, section 3.3 (as
            recalled).
        """
        scale_shape = owner.basis.shape[1:]
        columns = kernel.reshape(-1, int(np.prod(scale_shape, dtype=int)))
        reach = np.abs(levels).max(axis=0).reshape(-1)
        even, patterns = _even_basis(owner.count), _patterns(owner.count)
        fitted = [
            _fit_basis(column, r * even, patterns, ITERATIONS * refine)
            for column, r in zip(columns.T, reach, strict=True)
        ]
        owner.basis.assign(
            np.float32(np.stack([f[0] for f in fitted], -1)).reshape(owner.basis.shape)
        )
        owner.latents.assign(
            np.float32(np.stack([f[1] for f in fitted], -1)).reshape(owner.latents.shape)
        )


def _even_basis(count):
    """The basis of `count` levels that are evenly spaced at -1..1."""
    bits = count.bit_length() - 1
    return 2.0 ** np.arange(bits) / (count - 1)


def _patterns(count):
    """`(count, bits)`, row p: the signs of level p, by the binary digits of p."""
    digits = np.arange(count)[:, None] >> np.arange(count.bit_length() - 1) & 1
    return np.float32(2 * digits - 1)


def _fit_basis(x, basis, patterns, iterations):
    """`(basis (bits,), latents (bits, n))` of one column `x (n,)`."""
    signs = _nearest_signs(x, basis, patterns)
    for _ in range(iterations):
        basis = np.linalg.lstsq(signs, x, rcond=None)[0]
        basis = np.abs(basis)  # a negative one means its signs the other way round
        signs = _nearest_signs(x, basis, patterns)
    # What a sign has to tell: the rest that the other signs leave.
    rest = (x - signs @ basis)[:, None] + signs * basis
    share = np.abs(rest) / max(np.abs(rest).max(), np.finfo(np.float32).tiny)
    return basis, (signs * np.maximum(share, _NEAREST_TO_ZERO)).T


def _nearest_signs(x, basis, patterns):
    levels = patterns @ basis
    order = np.argsort(levels, kind="stable")
    thresholds = (levels[order][1:] + levels[order][:-1]) / 2
    return patterns[order[np.searchsorted(thresholds, x)]].astype(np.float64)


def _inverse_softplus(y):
    """log(e^y - 1), in a form that no large y overflows."""
    return y + np.log(-np.expm1(-y))


MODES = {"codebook": Codebook, "basis": Basis, "selector": Selector}
