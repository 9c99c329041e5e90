"""Mutual rescaling of layers that follow each other: what one channel gains, its reader loses.

For channel k with a factor s_k > 0:

    kernel_1[..., k] *= s_k,  bias_1[k] *= s_k,  kernel_2[:, :, k, :] /= s_k

The model computes the same where what lies between is linear or a ReLU, and under a ReLU6 while no
value of the channel reaches 6 before or after.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import keras
import numpy as np
from keras import ops

from keras_lowbit import walk
from keras_lowbit.checks import checked_choice
from keras_lowbit.kinds import activation_name, kind_of
from keras_lowbit.numerics.arrays import float64_of
from keras_lowbit.progress import track
from keras_lowbit.transform.batches import checked_batches
from keras_lowbit.transform.copies import constraints_of, set_weights

METHODS = ("fat", "cle", "activations")
FACTORS = (1e-2, 1e2)
_ROUNDS = 100
_SETTLED = 1e-3
_PRODUCTS = (keras.layers.Conv2D, keras.layers.DepthwiseConv2D, keras.layers.Dense)
_LINEAR = frozenset(
    {"dropout", "pad", "average_pool", "global_average_pool", "max_pool", "global_max_pool"}
)


@dataclass(frozen=True)
class RescaleReport:
    """What `rescale_pairs` did.

    Args:
        factors: `{(first layer, second layer): s}` of the pairs that were rescaled.
        declined: `{first layer: why}` of layers with a kernel that were not; of depthwise ones
            alone under `"fat"`.
    """

    factors: dict[tuple[str, str], np.ndarray]
    declined: dict[str, str]


def fat_factors(ranges, largest, *, capped, limit=5.9):
    """Factors of a depthwise layer's channels by the rule of FAT.

        locked: X_k >= limit                 T_a = mean of T_k over locked channels, or max T_k
        s_k = T_a / T_k,  at most limit / X_k,  in 1e-2..1e2          locked: 1

    Args:
        ranges: `T_k = max |kernel[..., k]|`.
        largest: `X_k`, the largest value in front of the ReLU6 over calibration images.
        capped: whether a ReLU6 follows; otherwise nothing is locked or limited.
        limit: reals.

    Reference:
        Goncharenko et al., ICANN 2019 (arXiv:1812.07872), section on rescaling; the chapter's
        printed average is the reciprocal of a mean, its sentence says average. Decisions: no
        locked channel gives `max T_k`, so that nothing shrinks; `X_k <= 0` has no limit; the limit
        is 5.9, not 6.
    """
    ranges, largest = np.asarray(ranges, np.float64), np.asarray(largest, np.float64)
    locked = (largest >= limit) & capped
    target = ranges[locked].mean() if locked.any() else ranges.max(initial=0.0)
    factors = np.divide(target, ranges, where=ranges > 0, out=np.ones_like(ranges))
    return _limited(factors, largest, locked, capped, limit)


def cle_factors(first, second, largest, *, capped, limit=5.9):
    """Factors that give both layers' channels equal ranges, `s_k = sqrt(r1 r2) / r1`.

    Args:
        first: `r1 = max |kernel_1[..., k]|`.
        second: `r2 = max |kernel_2[:, :, k, :]|`.
        largest: as in `fat_factors`.
        capped: as in `fat_factors`; channels that reach the ReLU6 stay.
        limit: reals.

    Reference:
        Nagel et al., Data-Free Quantization, ICCV 2019, arXiv:1906.04721, eq. 11. Deviation: the
        paper replaces ReLU6 by ReLU; here channels that reach it are locked instead.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    alive = (first > 0) & (second > 0)
    ratio = np.divide(second, first, where=alive, out=np.ones_like(first))
    largest = np.asarray(largest, np.float64)
    return _limited(np.sqrt(ratio), largest, (largest >= limit) & capped, capped, limit)


def activation_factors(largest, *, capped, share=1.0, limit=5.9):
    """Factors that bring a layer's channels to one range of values, so that one grid suits all.

        s_k = (T / X_k)^share       T = limit under a ReLU6, where X_k >= limit stays, else max X_k

    Args:
        largest: `X_k`, as in `fat_factors`; channels without a positive value stay.
        capped: as in `fat_factors`.
        share: 1 where the reader's kernel has a scale for each of its input channels, as a
            depthwise one: it loses nothing. Below 1 where the reader pays with unequal weights.
        limit: reals.

    Reference:
        As `cle_factors`, on ranges of activations in place of those of kernels (this library's).
    """
    largest = np.asarray(largest, np.float64)
    alive = largest > 0
    target = limit if capped else largest.max(initial=0.0)
    factors = np.divide(target, largest, where=alive, out=np.ones_like(largest)) ** share
    return _limited(factors, largest, (largest >= limit) & capped, capped, limit)


def _limited(factors, largest, locked, capped, limit):
    if capped:
        cap = np.divide(limit, largest, where=largest > 0, out=np.full_like(largest, np.inf))
        factors = np.minimum(factors, cap)
    return np.where(locked, 1.0, np.clip(factors, *FACTORS))


def rescale_pairs(
    model: keras.Model,
    images,
    *,
    method: str = "fat",
    limit: float = 5.9,
    batch_size: int = 32,
    return_report: bool = False,
) -> keras.Model | tuple[keras.Model, RescaleReport]:
    """A copy of a folded float model with pairs of layers rescaled.

    `"fat"` equalizes the channels of depthwise kernels, at the cost of the pointwise kernels behind
    them, which per-channel or 8-bit grids bear better. `"cle"` equalizes both layers of every pair
    of products, in rounds until nothing moves. `"activations"` equalizes the values between them,
    which few bits a tensor need: wholly in front of a depthwise layer, whose kernel has a scale a
    channel, else by the square root.

    A pair is two products where the first's output reaches the second alone, through nothing but
    ReLU, ReLU6, padding, pooling or dropout. Not across additions.

    Args:
        model: float model without batch norms in between (`fold_batchnorm` first).
        images: calibration images, as for `calibrate`; outputs on them stay the same.
        method: `"fat"`, `"cle"` or `"activations"`.
        limit: below 6: how near to the end of a ReLU6 a channel may be scaled.
        batch_size: images at a time, for arrays.
        return_report: return `(model, RescaleReport)`.

    Returns:
        A new model; the one given stays as it is.

    Raises:
        ValueError: unknown method, a limit outside 0..6, no pair to rescale (with the reasons).
    """
    checked_choice(method, METHODS, who="rescale_pairs: method")
    if not 0 < limit < 6:
        raise ValueError(f"rescale_pairs: limit must lie between 0 and 6. Got {limit!r}")
    copy = keras.models.clone_model(model)
    set_weights(copy, model.get_weights())
    if hasattr(model, "output_names"):  # a Sequential model has none
        copy.output_names = list(model.output_names)
    program = walk.flatten(copy)
    pairs, declined = _pairs(program, method)
    if not pairs:
        raise ValueError(f"rescale_pairs: {_why_none(model, method, declined)}")
    batches = checked_batches(program, images, batch_size)
    largest = _largest(program, [p[0] for p in pairs], batches)
    totals = {(a.name, b.name): 1.0 for a, b, _ in pairs}
    for _ in range(_ROUNDS if method == "cle" else 1):
        moved = 0.0
        for first, second, capped in pairs:
            top = largest[first.name]
            r1 = _range(first.operation, reads=False)
            if method == "fat":
                factors = fat_factors(r1, top, capped=capped, limit=limit)
            elif method == "activations":
                depthwise = isinstance(second.operation, keras.layers.DepthwiseConv2D)
                share = 1.0 if depthwise else 0.5
                factors = activation_factors(top, capped=capped, share=share, limit=limit)
            else:
                r2 = _range(second.operation, reads=True)
                factors = cle_factors(r1, r2, top, capped=capped, limit=limit)
            _apply(first.operation, second.operation, factors)
            largest[first.name] = top * factors
            totals[first.name, second.name] = totals[first.name, second.name] * factors
            moved = max(moved, float(np.abs(np.log(factors)).max(initial=0.0)))
        if moved < _SETTLED:
            break
    return (copy, RescaleReport(totals, declined)) if return_report else copy


def _pairs(program, method):
    """`[(first call, second call, whether a ReLU6 lies between)]` and what was declined."""
    readers = program.readers()
    outputs = {ref.index for ref in walk.refs(program.outputs)}
    times = program.times()
    pairs, declined = [], {}
    for first in program.calls:
        depthwise = type(first.operation) is keras.layers.DepthwiseConv2D
        if type(first.operation) not in _PRODUCTS or (method == "fat" and not depthwise):
            continue
        found = _follow(first, readers, outputs, times)
        if isinstance(found, str):
            declined[first.name] = found
        elif method == "fat" and type(found[0].operation) is not keras.layers.Conv2D:
            declined[first.name] = f"{found[0].name} behind it is no Conv2D"
        else:
            pairs.append((first, *found))
    return pairs, declined


def _why_none(model, method, declined):
    """Why a model has no pair for a method, and the way out."""
    if declined:
        return f"no pair to rescale in {model.name}. Declined: {declined}"
    if method == "fat":
        return (
            f"{model.name} has no DepthwiseConv2D, which method='fat' is for; 'cle' and "
            "'activations' take any two products in a row"
        )
    kinds = [product.__name__ for product in _PRODUCTS]
    return f"{model.name} has no {', '.join(kinds[:-1])} or {kinds[-1]} to rescale"


def _follow(first, readers, outputs, times):
    """`(second call, whether a ReLU6 lies between)`, or why there is none."""
    if times[id(first.operation)] > 1:
        return f"{first.name} is called {times[id(first.operation)]} times"
    name = activation_name(first.operation)
    capped, call = name == "relu6", first
    while True:
        if name not in ("linear", "relu", "relu6"):
            return f"{call.name} is {name}"
        if call.output.index in outputs:
            return f"the output of {call.name} is an output of the model"
        following = readers.get(call.output.index, [])
        if len(following) != 1:
            return f"the output of {call.name} has {len(following)} readers"
        call = following[0]
        if type(call.operation) in _PRODUCTS:
            break
        if kind_of(call) == "activation":
            name = activation_name(call.operation)
            capped = capped or name == "relu6"
        elif kind_of(call) not in _LINEAR:
            return f"{call.name} ({type(call.operation).__name__}) stands behind it"
    if times[id(call.operation)] > 1:
        return f"{call.name} is called {times[id(call.operation)]} times"
    if getattr(call.operation, "groups", 1) != 1:
        return f"{call.name} has groups"
    for layer in (first.operation, call.operation):
        if constraints_of(layer):
            return f"{layer.name} has a {constraints_of(layer)[0]}, which rescaling would break"
    return call, capped


def _range(layer, *, reads):
    """Largest magnitude of each output channel's weights; of each input channel's if `reads`."""
    kernel = np.abs(float64_of(layer.kernel))
    if isinstance(layer, keras.layers.DepthwiseConv2D):
        by_channel = kernel.max(axis=(0, 1))
        return by_channel.max(axis=-1) if reads else by_channel.reshape(-1)
    kept = kernel.ndim - (2 if reads else 1)
    return kernel.max(axis=tuple(axis for axis in range(kernel.ndim) if axis != kept))


def _apply(first, second, factors):
    kernel, bias = scaled_first(
        float64_of(first.kernel),
        float64_of(first.bias) if first.use_bias else None,
        factors,
        depthwise=isinstance(first, keras.layers.DepthwiseConv2D),
    )
    first.kernel.assign(kernel.astype(np.float32))
    if bias is not None:
        first.bias.assign(bias.astype(np.float32))
    second.kernel.assign(scaled_second(float64_of(second.kernel), factors).astype(np.float32))


def scaled_first(kernel, bias, factors, *, depthwise):
    """Kernel and bias of the first layer: `(kh, kw, c, m)` depthwise, else `(..., out)`.

    Output channel `c m + j` of a depthwise layer is kernel `[..., c, j]`.
    """
    by_channel = factors.reshape(kernel.shape[-2:]) if depthwise else factors
    return kernel * by_channel, None if bias is None else bias * factors


def scaled_second(kernel, factors):
    """Kernel of the second layer, input channels at axis -2: divided by the factors."""
    return kernel / factors[:, None]


def _largest(program, firsts, batches):
    """`{call name: largest value of each channel before its activation}`."""
    found: dict[str, np.ndarray] = {}
    names = {id(call): call.name for call in firsts}

    def execute(call, args, kwargs):
        if id(call) not in names:
            return walk.infer(call, args, kwargs)
        with without_activation(call.operation) as activation:
            outputs = call.operation(*args, **kwargs)
        seen = ops.convert_to_numpy(outputs)
        top = seen.reshape(-1, seen.shape[-1]).max(axis=0)
        found[call.name] = np.maximum(found.get(call.name, -np.inf), top)
        return activation(outputs)

    for batch in track(batches, "rescale"):
        walk.forward(program, program.feeds(batch), execute)
    return found


@contextlib.contextmanager
def without_activation(layer):
    """Inside the block the layer gives what lies before its activation, which is yielded."""
    activation = layer.activation
    layer.activation = None  # in the place of a layer PyTorch lets no function stand
    try:
        yield activation if activation is not None else keras.activations.linear
    finally:
        layer.activation = activation
