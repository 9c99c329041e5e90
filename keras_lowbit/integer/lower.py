"""From a quantized Keras model to the integer graph, call by call.

`RULES` is a table of small functions, one a kind (`keras_lowbit.kinds`), from the modules beside;
`integer.values` holds what they pass around, `integer.emit` puts them on grids, with the numbers of
`integer.products`.
"""

from __future__ import annotations

from keras_lowbit import walk
from keras_lowbit.integer import activations, affine, elementwise, grids, moves, weighted
from keras_lowbit.integer.emit import Emitter
from keras_lowbit.integer.values import Image, NotExportable, OnGrid
from keras_lowbit.kinds import kind_of, known_layers, rewrite_of
from keras_lowbit.numerics.grid import Grid


class Lowering:
    """Values of a program's tensors while its calls are lowered one by one."""

    def __init__(self, program, batch, weights, *, dry=False, preprocessing=None):
        self.program = program
        # A dry run looks for objections in a model that need not be calibrated yet.
        self.dry = dry
        self.batch = batch
        self.emitter = Emitter(weights)
        self.producers = program.producers()
        self.values = {}
        self.grids = {}  # quantizers by the tensors that they write
        for ref, name in zip(program.inputs, program.input_names, strict=True):
            scale, offset = preprocessing or (1.0, 0.0)
            pixels = preprocessing is not None
            self.values[ref.index] = Image(name, scale, offset, self.shape(ref), pixels)

    def shape(self, ref):
        """Static shape with the batch size."""
        if any(n is None for n in ref.shape[1:]):
            raise NotExportable(
                f"A tensor has the dynamic shape {ref.shape}: files have fixed sizes. "
                "Build the model with keras.Input of a full image size"
            )
        return (self.batch, *ref.shape[1:])

    def run(self):
        """Lower every call; values of the model's outputs."""
        for call in self.program.calls:
            self.values[walk.refs(call.outputs)[0].index] = self.lower(call)
        return [self.values[ref.index] for ref in walk.refs(self.program.outputs)]

    def lower(self, call):
        """The value of a call's output."""
        rule = RULES.get(kind_of(call))
        if rule is None:
            raise NotExportable(_unknown(call))
        return rule(self, call)

    def objections(self) -> list[str]:
        """All that stands against an integer graph, each call looked at by itself."""
        return [sentence for refused in self.refusals().values() for sentence in refused]

    def refusals(self) -> dict[str, list[str]]:
        """`objections` by the name of the call that they stand against."""
        found = {}
        for call in self.program.calls:
            # Scales travel beside codes and are no values here.
            if not all(ref.index in self.values for ref in call.inputs if ref.shape):
                continue  # behind a tensor whose size is not known
            made = walk.refs(call.outputs)
            try:
                self.values[made[0].index] = self.lower(call)
            except NotExportable as objection:
                found.setdefault(call.name, []).append(str(objection))
                # An 8-bit tensor stands in, so that calls behind this one are heard too.
                stand_in = Grid(1.0, -128, 127, 8)
                self.emitter.guessed = True
                for ref in made:
                    if None not in ref.shape[1:]:
                        shape = self.shape(ref)
                        value, _ = self.emitter.tensor(call.name, shape, stand_in)
                        self.values[ref.index] = value
        return found

    def read(self, call, position=0):
        """The value of an input tensor of a call."""
        return self.values[call.inputs[position].index]

    def grid_tensor(self, call, position=0) -> OnGrid:
        """An input that must sit on a grid."""
        value = self.read(call, position)
        if isinstance(value, OnGrid) and value.relu is None:
            return value
        raise NotExportable(
            f"{call.name}: its input has no grid. quantize_model puts one there; in a model built "
            "by hand, put a Quantize layer before it"
        )

    def tensor_name(self, ref):
        """The name of the Keras layer that computes a tensor, grids aside."""
        call = self.producers.get(ref.index)
        while call is not None and kind_of(call) in ("quantize", "dequantize"):
            ref = call.inputs[0]
            call = self.producers.get(ref.index)
        return self.program.input_name(ref) if call is None else call.name


def _unknown(call):
    better = rewrite_of(call)
    way_out = (
        f"Write {better} instead"
        if better
        else "Leave it out, or end the exported model before it and compute the rest in float. "
        f"Layers that have one: {', '.join(known_layers())}"
    )
    return f"{call.name} ({type(call.operation).__name__}) has no integer form. {way_out}"


RULES = {
    "quantize": grids.quantize,
    "dequantize": grids.dequantize,
    "product": weighted.product,
    "activation": activations.activation,
    "batch_norm": affine.batch_norm,
    "normalization": affine.normalization,
    "rescaling": affine.rescaling,
    "add": elementwise.add,
    "multiply": elementwise.multiply,
    "concatenate": moves.concatenate,
    "max_pool": moves.max_pool,
    "global_max_pool": moves.global_max_pool,
    "average_pool": moves.average_pool,
    "global_average_pool": moves.global_average_pool,
    "pad": moves.pad,
    "filled_pad": moves.pad,
    "upsample": moves.upsample,
    "reshape": moves.reshape,
    "dropout": moves.same,
    "augmentation": moves.same,
    "slice": moves.slice_,
    "transpose": moves.transpose,
}
