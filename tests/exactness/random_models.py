"""Random functional models: the corners of the lowering that no architecture visits."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from tests.exactness.coverage import Coverage
from tests.exactness.hostile import hostile

K = keras.layers


def random_options(seed, coverage):
    """`(scheme, weights, options of convert)` for a model of the same seed."""
    random = np.random.default_rng(seed + 10_000)
    scheme = str(random.choice(["w8a8", "w4a8", "w4a4", "w2a2", "w3a5", "w1a1", "w2a8", "w6a4"]))
    weights = str(random.choice(["int8", "int4", "int4_all"]))
    options = {}
    if random.random() < 0.25:
        options["batch"] = 2
        coverage.update(["batch"])
    ends = random.choice(
        ["float", "uint8 input", "int8 ends", "uint8 output"], p=[0.4, 0.2, 0.2, 0.2]
    )
    if ends == "uint8 input":
        options["input_type"] = "uint8"
    elif ends == "int8 ends":
        options.update(input_type="int8", output_type="int8")
    elif ends == "uint8 output":
        options["output_type"] = "uint8"
    coverage.update([ends] if ends != "float" else [])
    return scheme, weights, options


def random_model(seed: int, coverage: Coverage | None = None) -> keras.Model:
    """A small model that only `seed` decides, with hostile weights."""
    keras.utils.clear_session(free_memory=False)
    return hostile(Maker(seed, coverage).model(), seed)


class Maker:
    """Rolls the dice for one model; a subclass may leave out blocks."""

    def __init__(self, seed, coverage):
        self.random = np.random.default_rng(seed)
        self.coverage = Coverage() if coverage is None else coverage
        self.blocks = (
            self.conv, self.conv, self.pointwise, self.depthwise, self.depthwise, self.separable,
            self.activation, self.norm_first, self.residual, self.residual, self.branches,
            self.three, self.max_pool, self.average_pool, self.padding, self.padded_conv,
            self.shortcut, self.shared, self.nested, self.dropout, self.dense_on_images,
            self.squeeze, self.sliced, self.excited, self.gated, self.constant, self.multiplied,
            self.upsampled, self.cropped, self.shuffled,
        )  # fmt: skip

    # --- dice -----------------------------------------------------------------------------------

    def count(self, *features):
        self.coverage.update(features)

    def chance(self, p):
        return self.random.random() < p

    def pick(self, *values):
        return values[self.random.integers(len(values))]

    def maybe(self, p, feature):
        hit = self.chance(p)
        if hit:
            self.count(feature)
        return hit

    # --- the whole ------------------------------------------------------------------------------

    def model(self):
        shape = (
            self.random.integers(5, 12),
            self.random.integers(5, 12),
            self.random.integers(1, 6),
        )
        shape = tuple(int(n) for n in shape)
        if shape[0] % 2 or shape[1] % 2:
            self.count("odd size")
        inputs = [keras.Input(shape, name="image")]
        x = inputs[0]
        if self.maybe(0.3, "rescaling"):
            x = K.Rescaling(*self.pick((1 / 127.5, -1.0), (1 / 255.0, 0.0), (0.01, 0.0)))(x)
        x = self.stem(x)
        if self.maybe(0.25, "several inputs"):
            other = keras.Input(shape, name="other")
            inputs.append(other)
            x = self.joined(x, self.stem(other, channels=x.shape[-1]))
        for _ in range(self.random.integers(2, 6)):
            x = self.pick(*self.blocks)(x)
        outputs = [self.head(x)]
        if self.maybe(0.25, "several outputs"):
            outputs.append(self.conv(x) if self.chance(0.5) else self.head(x))
        return keras.Model(inputs if len(inputs) > 1 else inputs[0], outputs)

    def stem(self, x, channels=None):
        return self.finish(K.Conv2D(channels or self.channels(), 3, padding="same")(x))

    def head(self, x):
        kind = self.pick("pool", "keepdims", "flatten", "reshape")
        if kind == "pool":
            self.count("global average pool")
            x = K.GlobalAveragePooling2D()(x)
        elif kind == "keepdims":
            self.count("global average pool keepdims", "flatten")
            x = K.Flatten()(K.GlobalAveragePooling2D(keepdims=True)(x))
        elif kind == "flatten":
            self.count("flatten")
            x = K.Flatten()(x)
        else:
            self.count("reshape")
            x = K.Reshape((-1,))(x)
        self.count("dense")
        if self.chance(0.4):
            x = self.finish(K.Dense(int(self.random.integers(3, 8)))(x))
        ending = self.pick("softmax", "softmax layer", "logits")
        if ending != "logits":
            self.count("softmax")
        x = K.Dense(5, activation="softmax" if ending == "softmax" else None)(x)
        return K.Softmax()(x) if ending == "softmax layer" else x

    # --- one layer ------------------------------------------------------------------------------

    def channels(self):
        return int(self.random.integers(2, 9))

    def window(self, x, name, *, dilate=False):
        """Kernel size, strides, padding (and dilation) that fit `x`."""
        size = (
            self.random.integers(2, 4, 2) if self.chance(0.4) else np.repeat(self.pick(1, 2, 3), 2)
        )
        size = np.minimum(size, x.shape[1:3])
        fields = {"padding": self.pick("same", "valid")}
        self.count(f"{name} {fields['padding'].upper()}")
        if min(x.shape[1:3]) > 3 and self.chance(0.35):
            fields["strides"] = (2, 2) if self.chance(0.7) or name == "depthwise" else (2, 1)
            self.count(f"{name} strides")
        elif dilate and min(x.shape[1:3]) > 4 and min(size) > 1 and self.chance(0.4):
            fields["dilation_rate"] = (2, 2)
            self.count(f"{name} dilation")
        return tuple(int(n) for n in size), fields

    def conv(self, x, channels=None):
        size, fields = self.window(x, "conv", dilate=True)
        channels = channels or self.channels()
        self.count("conv")
        if size[0] % 2 == 0:
            self.count("conv even kernel")
        if not x.shape[-1] % 2 and self.maybe(0.4, "conv groups"):
            fields["groups"], channels = 2, 2 * -(-channels // 2)
        fields["use_bias"] = not self.maybe(0.4, "conv without bias")
        return self.finish_with(K.Conv2D, x, channels, size, **fields)

    def pointwise(self, x):
        self.count("conv 1x1")
        return self.finish_with(K.Conv2D, x, self.channels(), 1)

    def depthwise(self, x):
        size, fields = self.window(x, "depthwise", dilate=True)
        self.count("depthwise")
        if x.shape[-1] < 6 and self.maybe(0.5, "depthwise multiplier"):
            fields["depth_multiplier"] = self.pick(2, 3)
        return self.finish_with(K.DepthwiseConv2D, x, size, **fields)

    def separable(self, x):
        size, fields = self.window(x, "separable")
        if "strides" in fields:
            fields["strides"] = 2
        self.count("separable")
        if x.shape[-1] < 6 and self.maybe(0.5, "separable multiplier"):
            fields["depth_multiplier"] = 2
        return self.finish_with(K.SeparableConv2D, x, self.channels(), size, **fields)

    def dense_on_images(self, x):
        self.count("dense on images")
        return self.finish_with(K.Dense, x, self.channels())

    def finish_with(self, layer, x, *args, **fields):
        """The layer with a fused activation, or plain with batch norm and activation behind."""
        activation = self.pick(None, None, None, "relu", "relu6")
        if activation:
            self.count(f"fused {activation}")
            return layer(*args, activation=activation, **fields)(x)
        return self.finish(layer(*args, **fields)(x))

    def finish(self, x):
        if self.maybe(0.6, "batch norm"):
            x = K.BatchNormalization()(x)
        return self.activation(x)

    def activation(self, x):
        kind = self.pick("relu", "relu6", "ops.relu", "linear")
        self.count(kind)
        if kind == "linear":
            return x
        if kind == "ops.relu":
            return ops.relu(x)
        return K.ReLU(6.0 if kind == "relu6" else None)(x)

    # --- blocks ---------------------------------------------------------------------------------

    def norm_first(self, x):
        self.count("batch norm before a product")
        return self.pointwise(K.ReLU()(K.BatchNormalization()(x)))

    def same_shape(self, x):
        y = K.Conv2D(x.shape[-1], self.pick(1, 3), padding="same")(x)
        return self.finish(y)

    def added(self, *tensors):
        if len(tensors) > 2:
            self.count("add of three")
        elif self.chance(0.5):
            self.count("ops.add")
            return ops.add(*tensors)
        self.count("add")
        return K.Add()(list(tensors))

    def joined(self, x, y):
        if self.chance(0.5):
            return self.added(x, y)
        self.count("concatenate")
        return K.Concatenate()([x, y])

    def residual(self, x):
        return self.activation(self.added(x, self.same_shape(x)))

    def three(self, x):
        return self.added(x, self.same_shape(x), self.same_shape(x))

    def branches(self, x):
        y = self.same_shape(x)
        if self.maybe(0.4, "concatenate of rows"):
            return K.Concatenate(axis=1)([x, y])
        if x.shape[-1] > 16:
            return y
        self.count("concatenate")
        return K.Concatenate()([x, y, self.same_shape(x)][: self.pick(2, 3)])

    def pool(self, x, layer, name):
        size = int(min(self.pick(2, 3), *x.shape[1:3]))
        padding = self.pick("same", "valid")
        self.count(f"{name} {padding.upper()}")
        strides = None
        if name == "max pool" and self.maybe(0.5, "max pool strides"):
            strides = 1
        return layer(size, strides, padding=padding)(x)

    def max_pool(self, x):
        return self.pool(x, K.MaxPooling2D, "max pool")

    def average_pool(self, x):
        return self.pool(x, K.AveragePooling2D, "average pool")

    def padding(self, x):
        widths = self.random.integers(0, 3, (2, 2)).tolist()
        if self.chance(0.5):
            self.count("zero padding")
            return K.ZeroPadding2D(widths)(x)
        self.count("ops.pad")
        more = int(self.random.integers(0, 3))
        return ops.pad(x, [(0, 0), *map(tuple, widths), (more, 1)])

    def padded_conv(self, x):
        """What Keras' own MobileNet does for strides: padding that SAME would have put there."""
        self.count("zero padding", "padding as SAME")
        x = K.ZeroPadding2D([(n % 2, 1) for n in x.shape[1:3]])(x)
        layer = K.Conv2D if self.chance(0.5) else K.DepthwiseConv2D
        args = (self.channels(), 3) if layer is K.Conv2D else (3,)
        return self.finish(layer(*args, strides=2, padding="valid")(x))

    def shortcut(self, x):
        """ResNet-20's: a strided slice, zero channels, an addition."""
        self.count("strided slice", "ops.pad")
        y = K.Conv2D(x.shape[-1] + 2, 3, strides=2, padding="same")(x)
        y = K.BatchNormalization()(y)
        z = ops.pad(x[:, ::2, ::2], [(0, 0), (0, 0), (0, 0), (1, 1)])
        return self.activation(self.added(y, z))

    def sliced(self, x):
        self.count("strided slice")
        return x[:, ::2] if self.chance(0.3) else x[:, ::2, ::2]

    def cropped(self, x):
        self.count("crop")
        if self.chance(0.5):
            return K.Cropping2D(((0, x.shape[1] // 3), (x.shape[2] // 3, 0)))(x)
        return x[:, x.shape[1] // 3 :, : -(x.shape[2] // 3) or None]

    def shuffled(self, x):
        """ShuffleNet's: a half that passes and one that is computed, mixed."""
        self.count("transpose", "slice of channels")
        h, w, c = x.shape[1:]
        half = (c + 1) // 2
        y = self.activation(K.Conv2D(half, 1)(x[..., half:] if c > 1 else x))
        y = K.Concatenate()([x[..., :half], y])
        y = K.Permute((1, 2, 4, 3))(K.Reshape((h, w, 2, half))(y))
        return K.Reshape((h, w, 2 * half))(y)

    def shared(self, x):
        self.count("shared layer")
        layer = K.Conv2D(x.shape[-1], 3, padding="same")
        return self.activation(layer(K.ReLU()(layer(x))))

    def nested(self, x):
        self.count("nested model")
        inside = keras.Input(x.shape[1:])
        return keras.Model(inside, self.residual(inside))(x)

    def dropout(self, x):
        self.count("dropout")
        return K.Dropout(0.3)(x)

    def excited(self, x):
        """Squeeze-and-excite."""
        self.count("squeeze and excite")
        gate = self.pick("sigmoid", "hard_sigmoid")
        self.count(gate)
        y = K.GlobalAveragePooling2D(keepdims=True)(x)
        y = K.Conv2D(2, 1, activation=self.pick("relu", "silu"))(y)
        return K.Multiply()([x, K.Conv2D(x.shape[-1], 1, activation=gate)(y)])

    def gated(self, x):
        name = self.pick("silu", "hard_silu", "sigmoid", "hard_sigmoid", "leaky relu")
        self.count(name)
        if name == "leaky relu":
            return K.LeakyReLU(self.pick(0.1, 0.3))(x)
        return K.Activation(name)(x if self.chance(0.5) else self.same_shape(x))

    def constant(self, x):
        """Constants behind a product, a sum or a tensor on a grid."""
        self.count("constant")
        x = x if self.chance(0.5) else self.same_shape(x)
        many = self.random.uniform(-1.5, 1.5, x.shape[-1]).astype(np.float32)
        return self.pick(lambda: x * 0.7, lambda: 1.0 - x / 3.0, lambda: x * many + 0.25)()

    def upsampled(self, x):
        self.count("upsampling")
        return K.UpSampling2D(self.pick(2, (1, 3)))(x)

    def multiplied(self, x):
        self.count("multiply")
        x = ops.multiply(x, self.same_shape(x))
        if self.maybe(0.5, "relu with a limit"):
            return K.ReLU(self.pick(0.5, 2.0))(x)
        return x

    def squeeze(self, x):
        """A mean over the image, brought back into it by an addition."""
        self.count("global average pool keepdims")
        return self.pointwise(K.GlobalAveragePooling2D(keepdims=True)(x))
