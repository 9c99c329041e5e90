"""Fast forms on PyTorch: fewer passes over activations, on a CPU and outside of `torch.compile`.

What the plain form loses there: an autograd node and a fresh tensor for each small operation, two
copies of each convolution's input into another memory layout, and multiplications of activations
by scales in the backward pass, where multiplying the kernel does.
"""

from __future__ import annotations

import math

import keras
import numpy as np
import torch

from keras_lowbit.numerics.windows import same_padding

# Elements that one round of passes works on, so that the later ones find them in a cache.
_CHUNK = 1 << 17


def _covers(*tensors):
    """Whether all are ordinary float32 tensors in main memory, and no tracer is watching."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _transformed():
        return False
    return all(
        type(t) in (torch.Tensor, torch.nn.Parameter)
        and t.dtype is torch.float32
        and t.device.type == "cpu"
        for t in tensors
    )


def _transformed():
    """Whether a transform of `torch.func` runs; there is no public way to ask."""
    ask = getattr(torch._C, "_are_functorch_transforms_active", None)
    return ask is None or ask()


def without_gradients():
    """Nothing is kept for a backward pass."""
    return torch.no_grad()


def unscoped():
    """Always `None`: variables have no other names."""
    return None


def compiled(function):
    """Always `None`: what runs eagerly is as fast."""
    return None


def known(value):
    """The scalar `value` as a Python number; `None`: not covered."""
    if isinstance(value, keras.Variable):
        value = value.value
    if isinstance(value, torch.Tensor) and value.dtype is torch.bool:
        value = value.float()
    return value.item() if _covers(value) and not value.ndim else None


def either(condition, yes, no):
    """Always `None`: a condition is known here, and one that holds takes the plain form."""
    return None


def quantize(x, scale, lo, hi, gradient_scale):
    """Codes of `x`, as `numerics.uniform.quantize`; `None`: not covered."""
    if not _covers(x, scale) or not x.numel() or scale.ndim > x.ndim:
        return None
    inverse = 1.0 / scale.detach()
    lo, hi = _number(lo), _number(hi)
    if gradient_scale is None:
        scale = scale.detach()
    if scale.ndim:
        return _QuantizeChannels.apply(x, scale, gradient_scale, inverse, lo, hi)
    inverse = inverse.item()
    if not 0 < inverse < math.inf:
        return None
    return _Quantize.apply(x, scale, gradient_scale, inverse, lo, hi)


def _number(value):
    return value.item() if isinstance(value, torch.Tensor) else float(value)


class _QuantizeChannels(torch.autograd.Function):
    """Codes of small tensors with several scales; the equations are those of `numerics.uniform`."""

    @staticmethod
    def forward(ctx, x, scale, gradient_scale, inverse, lo, hi):
        ratio = x * inverse
        codes = ratio.clamp(lo, hi).round_()
        ctx.save_for_backward(ratio, codes, inverse)
        ctx.bounds, ctx.gradient_scale, ctx.shape = (lo, hi), gradient_scale, scale.shape
        return codes

    @staticmethod
    def backward(ctx, gradient):
        ratio, codes, inverse = ctx.saved_tensors
        lo, hi = ctx.bounds
        gradient = gradient * inverse
        inside = ((ratio >= lo - 0.5) & (ratio <= hi + 0.5)).to(ratio.dtype)
        to_scale = None
        if ctx.needs_input_grad[1]:
            to_scale = gradient * (codes.detach() - inside * ratio)
            to_scale = to_scale.sum_to_size(ctx.shape) * ctx.gradient_scale
        return gradient * inside, to_scale, None, None, None, None


class _Quantize(torch.autograd.Function):
    """Codes of a grid with one scale; the equations are those of `numerics.uniform`."""

    @staticmethod
    def forward(ctx, x, scale, gradient_scale, inverse, lo, hi):
        codes = torch.empty_like(x, memory_format=torch.contiguous_format)
        for part, out in _chunks(x, codes):
            torch.mul(part, inverse, out=out).clamp_(lo, hi).round_()
        ctx.save_for_backward(x, codes)
        ctx.gradient_scale, ctx.inverse, ctx.bounds = gradient_scale, inverse, (lo, hi)
        return codes

    @staticmethod
    def backward(ctx, gradient):
        x, codes = ctx.saved_tensors
        inverse, (lo, hi) = ctx.inverse, ctx.bounds
        # Open ends for `hardtanh_backward`, which tells inside from outside in one pass.
        below, above = -_first_above(0.5 - lo, inverse), _first_above(hi + 0.5, inverse)
        wants_scale = ctx.needs_input_grad[1]
        if torch.is_grad_enabled():  # someone will differentiate again: no writing in place
            inside = ((x > below) & (x < above)).to(x.dtype) * inverse
            if wants_scale:
                total = (
                    gradient * (codes.detach() * inverse - inside * x.detach() * inverse)
                ).sum()
            to_x = gradient * inside
        else:
            to_x, total = torch.empty_like(codes), 0.0
            for part, code, g, out in _chunks(x, codes, gradient, to_x):
                torch.ops.aten.hardtanh_backward.grad_input(g, part, below, above, grad_input=out)
                if wants_scale:
                    # Not `torch.dot`: its last bits depend on where in memory the tensors lie, and
                    # a run that resumes must repeat the other bit for bit.
                    to_codes, to_values = torch.mul(g, code).sum(), torch.mul(out, part).sum()
                    total += to_codes.item() - to_values.item() * inverse
                out.mul_(inverse)
            total = torch.tensor(total * inverse, dtype=torch.float32)
        to_scale = total * ctx.gradient_scale if wants_scale else None
        return to_x, to_scale, None, None, None, None


def _first_above(ratio, inverse):
    """The first float32 whose product with `inverse` exceeds `ratio`."""
    ratio, inverse = np.float32(ratio), np.float32(inverse)
    with np.errstate(over="ignore"):
        x = ratio / inverse
        while x * inverse > ratio:
            x = np.nextafter(x, np.float32(-np.inf))
        while x * inverse <= ratio:
            x = np.nextafter(x, np.float32(np.inf))
    return float(x)


def _chunks(*tensors):
    """The same stretch of each tensor, flat."""
    flat = (t.contiguous().view(-1) for t in tensors)
    if tensors[0].numel() <= _CHUNK:
        return (tuple(flat),)
    return zip(*(t.split(_CHUNK) for t in flat), strict=True)


def conv(codes, kernel, scale, strides, padding, dilation_rate):
    """`conv(codes, kernel) * scale` in two dimensions, channels last; `None`: not covered."""
    if not _covers(codes, kernel, scale) or codes.ndim != 4 or scale.ndim > 1:
        return None
    strides, dilation = tuple(strides), tuple(dilation_rate)
    pads = [0, 0]
    if padding == "same":
        sides = [
            same_padding(size, (window - 1) * apart + 1, stride)
            for size, window, stride, apart in zip(
                codes.shape[1:3], kernel.shape[:2], strides, dilation, strict=True
            )
        ]
        pads = [before for before, _ in sides]
        if any(before != after for before, after in sides):
            (top, bottom), (left, right) = sides
            codes = torch.nn.functional.pad(codes, (0, 0, left, right, top, bottom))
            pads = [0, 0]
    groups = codes.shape[3] // kernel.shape[2]
    return _Conv.apply(codes, kernel, scale, strides, pads, dilation, groups)


def depthwise_conv(codes, kernel, scale, strides, padding, dilation_rate):
    """`depthwise_conv(codes, kernel) * scale`; see `conv`."""
    if not _covers(codes, kernel, scale):
        return None
    kernel = kernel.reshape(*kernel.shape[:2], 1, -1)
    return conv(codes, kernel, scale, strides, padding, dilation_rate)


def _channels_first(x):
    """A view of channels-last `x` in the order of axes that PyTorch's convolutions take."""
    return x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def _filters_first(kernel):
    return kernel.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)


class _Conv(torch.autograd.Function):
    """`conv(codes, kernel) * scale`; backward the scale lies on the kernel."""

    @staticmethod
    def forward(ctx, codes, kernel, scale, strides, pads, dilation, groups):
        outputs = torch.conv2d(
            _channels_first(codes), _filters_first(kernel), None, strides, pads, dilation, groups
        )
        ctx.save_for_backward(codes, kernel, scale)
        ctx.geometry = strides, pads, dilation, groups
        return outputs.permute(0, 2, 3, 1).mul_(scale)

    @staticmethod
    def backward(ctx, gradient):
        codes, kernel, scale = ctx.saved_tensors
        strides, pads, dilation, groups = ctx.geometry
        to_codes, to_kernel, _ = torch.ops.aten.convolution_backward(
            _channels_first(gradient),
            _channels_first(codes),
            _filters_first(kernel * scale),
            None,
            strides,
            pads,
            dilation,
            False,
            [0, 0],
            groups,
            [*ctx.needs_input_grad[:2], False],
        )
        if to_codes is not None:
            to_codes = to_codes.permute(0, 2, 3, 1)
        if to_kernel is not None:
            to_kernel = to_kernel.permute(2, 3, 1, 0) * scale
        return to_codes, to_kernel, None, None, None, None, None


def matmul(codes, kernel, scale):
    """`matmul(codes, kernel) * scale` of a kernel with two axes; `None`: not covered."""
    if not _covers(codes, kernel, scale) or kernel.ndim != 2 or codes.ndim < 2 or scale.ndim > 1:
        return None
    return _Matmul.apply(codes, kernel, scale)


class _Matmul(torch.autograd.Function):
    """`matmul(codes, kernel) * scale`; backward the scale lies on the kernel."""

    @staticmethod
    def forward(ctx, codes, kernel, scale):
        ctx.save_for_backward(codes, kernel, scale)
        return torch.matmul(codes, kernel).mul_(scale)

    @staticmethod
    def backward(ctx, gradient):
        codes, kernel, scale = ctx.saved_tensors
        to_codes = torch.matmul(gradient, (kernel * scale).mT)
        rows = codes.reshape(-1, codes.shape[-1]).mT
        to_kernel = torch.matmul(rows, gradient.reshape(-1, gradient.shape[-1])) * scale
        return to_codes, to_kernel, None


def batch_norm(x, gamma, beta, epsilon):
    """Normalized `x` and its moments, as `numerics.backend.batch_norm`."""
    gamma, beta = (v.value if isinstance(v, keras.Variable) else v for v in (gamma, beta))
    if not _covers(x, *(v for v in (gamma, beta) if v is not None)):
        return None
    channels = x.shape[-1]
    count = x.numel() // max(channels, 1)
    if count < 2:
        return None
    mean, variance = x.new_zeros(channels), x.new_zeros(channels)
    outputs = torch.nn.functional.batch_norm(
        _channels_first(x), mean, variance, gamma, beta, training=True, momentum=1.0, eps=epsilon
    )
    # The operation divides by n - 1.
    return outputs.permute(0, 2, 3, 1), mean, variance * ((count - 1) / count)
