"""Layers that a quantized model needs beyond the float model's own: names and dtypes."""

from __future__ import annotations

from keras_lowbit import layers, walk


class LayerMaker:
    """Makes layers under names of their own.

    Args:
        program: the `walk.Program` that is rebuilt; the names in it are taken.
    """

    def __init__(self, program):
        self._names = {call.plain for call in program.calls} | set(program.input_names)
        self._given: set[str] = set()

    def name(self, text):
        """A name near `text` that nothing has yet."""
        name = walk.unused(walk.plain(text), self._names)
        self._names.add(name)
        return name

    def own_name(self, call):
        """The name of a call's operation, where it is made for the first time."""
        if call.plain in self._given:
            return self.name(call.plain)
        self._given.add(call.plain)
        return call.plain

    def exact(self, layer, name, *args):
        """A layer between two grids: float32 whatever the policy, or codes would be lost."""
        return layer(*args, name=self.name(name), dtype="float32")

    def quantized(self, values, quantizer, name):
        """The pair of codes and scale of `values`."""
        return layers.Quantize(quantizer, name=self.name(f"{name}_quantize"))(values)

    def dequantized(self, pair, name, offset=0.0):
        """The reals of a pair; `offset` is what its code 0 stands for."""
        return layers.Dequantize(offset=offset, name=self.name(f"{name}_dequantize"))(pair)
