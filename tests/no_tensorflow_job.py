"""Quantize, train, save, load, export and verify where TensorFlow cannot be imported."""

import sys
from importlib.machinery import PathFinder


class WithoutTensorFlow(PathFinder):
    """Finds everything but TensorFlow, as in an environment without it."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] == "tensorflow":
            return None
        return PathFinder.find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTensorFlow

import keras  # noqa: E402
import numpy as np  # noqa: E402

import keras_lowbit as klb  # noqa: E402
import tflite_export  # noqa: E402


def main(folder):
    images = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 1)).astype("float32")
    labels = np.arange(32) % 4
    inputs = keras.Input((8, 8, 1))
    x = keras.layers.Rescaling(1 / 255)(inputs)
    x = keras.layers.Conv2D(4, 3, padding="same", use_bias=False)(x)
    x = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
    x = keras.layers.ReLU()(keras.layers.DepthwiseConv2D(3)(x))
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, keras.layers.Dense(4)(x))

    quantized = klb.calibrate(klb.quantize_model(model, "w4a4"), images)
    quantized.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    descent = klb.callbacks.BitDescent({0: 8, 1: 4})
    quantized.fit(images, labels, epochs=2, batch_size=16, callbacks=[descent], verbose=0)
    quantized.save(f"{folder}/model.keras")
    loaded = keras.models.load_model(f"{folder}/model.keras")
    klb.save_packed(loaded, f"{folder}/packed.keras")
    result = tflite_export.convert(loaded, weights="int4", verify=images[:4])
    print(f"wrong {result.mismatches} of {result.verification.compared}")
    return result.mismatches


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
