"""Which calls of a model compute with reals, and why: those that no integer form exists for."""

from __future__ import annotations

from keras_lowbit import layers, walk
from keras_lowbit.integer.lower import Lowering
from keras_lowbit.integer.values import NotExportable
from keras_lowbit.kinds import CLIPS, activation_name, kind_of

_QUANTIZED = (
    layers.QuantizedConv2D,
    layers.QuantizedDepthwiseConv2D,
    layers.QuantizedSeparableConv2D,
    layers.QuantizedDense,
)
NOT_QUANTIZED = "the model is not quantized"


def why_float(program: walk.Program) -> dict[str, str]:
    """Reasons by call name; calls on codes, and those that melt into one, are not in it.

    A call that reads what a float call made is float too, until a `Quantize` stands between.
    """
    quantized = any(_is_quantized(call) for call in program.calls)
    refused = _refused(program) if quantized else {}
    culprits: dict[int, str] = {}
    found: dict[str, str] = {}
    for call in program.calls:
        why = _own_reason(call, quantized) or refused.get(call.name)
        culprit = call.name if why else None
        if why is None and quantized and kind_of(call) != "quantize":
            culprit = next((culprits[r.index] for r in call.inputs if r.index in culprits), None)
            why = culprit and f"it reads {culprit}, which stays float"
        if why:
            found[call.name] = why
        if culprit:
            culprits.update({ref.index: culprit for ref in walk.refs(call.outputs)})
    return found


def _refused(program):
    """What an export says against calls of their own accord, by call name.

    What it says of a grid depends on its scale, which data will set, so calls that put values on
    one are left out.
    """
    try:
        refusals = Lowering(program, 1, "int8", dry=True).refusals()
    except NotExportable:  # an image of any size: files are not, layers may well be
        return {}
    borders = {call.name for call in program.calls if kind_of(call) == "quantize"}
    return {
        name: sentences[0].removeprefix(f"{name}: ")
        for name, sentences in refusals.items()
        if name not in borders
    }


def _is_quantized(call):
    return kind_of(call) == "quantize" or isinstance(call.operation, _QUANTIZED)


def _own_reason(call, quantized):
    """Why a call is float whatever it reads, or `None`."""
    layer, kind = call.operation, kind_of(call)
    if kind is None:
        return f"{type(layer).__name__} has no quantized form"
    if kind == "product":
        return _product_reason(call, quantized)
    if kind == "activation":
        name = activation_name(layer)
        if name not in (*CLIPS, "softmax", "sigmoid"):
            return f"activation {name!r} has no integer form"
    return None


def _product_reason(call, quantized):
    layer = call.operation
    if not isinstance(layer, _QUANTIZED):
        return "the scheme leaves it out" if quantized else NOT_QUANTIZED
    for argument in ("kernel", "depthwise", "pointwise", "between"):
        if getattr(layer, f"{argument}_quantizer", layer) is None:
            return f"{argument}_quantizer is None"
    if len(call.inputs) == 1 and layer.input_quantizer is None:
        return "its input has no grid (neither a Quantize before it nor an input_quantizer)"
    name = activation_name(layer)
    return None if name in CLIPS else f"activation {name!r} has no integer form"
