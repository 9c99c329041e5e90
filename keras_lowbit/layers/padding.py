"""SAME padding with another code than 0."""

from __future__ import annotations

from keras import ops

from keras_lowbit.numerics.windows import same_padding

PAD_CODES = (0, -1)


class SamePadding:
    """Mixin in front of a convolution: what `padding="same"` puts around the codes.

    Zeros suit grids on which 0.0 has a code. Signs (`quantizers.Sign`) are -1 or 1, so -1 stands
    around them, here and in files.
    """

    def _take_pad_code(self, pad_code):
        if pad_code is not None and pad_code not in PAD_CODES:
            raise ValueError(
                f"{self.name}: pad_code must be None or one of {PAD_CODES}. Got {pad_code!r}"
            )
        self._pad_code = pad_code

    @property
    def pad_code(self) -> int:
        """The code that SAME padding puts around the input."""
        if self._pad_code is not None:
            return self._pad_code
        return 0 if self.input_quantizer is None else self.input_quantizer.pad_code

    def padded(self, codes, kernel):
        """`(codes, padding)`: codes with their border, where the backend would put zeros.

        Args:
            codes: shape `(batch, height, width, channels)`.
            kernel: shape `(h, w, ...)`.

        Raises:
            ValueError: strides on an image of dynamic size.
        """
        if self.padding != "same" or self.pad_code == 0:
            return codes, self.padding
        sizes = codes.shape[1:3]
        if any(n is None and s > 1 for n, s in zip(sizes, self.strides, strict=True)):
            raise ValueError(
                f"{self.name}: strides {self.strides} with SAME padding of {self.pad_code} need a "
                f"static image size. Got {tuple(codes.shape)}"
            )
        borders = [
            same_padding(n, (k - 1) * d + 1, s)
            for n, k, d, s in zip(
                sizes, kernel.shape[:2], self.dilation_rate, self.strides, strict=True
            )
        ]
        borders = ((0, 0), *borders, (0, 0))
        return ops.pad(codes, borders, constant_values=float(self.pad_code)), "valid"

    def get_config(self):
        """Arguments of the layer; `pad_code` where it was given."""
        config = super().get_config()
        return config if self._pad_code is None else {**config, "pad_code": self._pad_code}
