"""The main job, on real images: train, quantize, descend, export, verify, compare.

python -m keras_lowbit.demo                  scikit-learn's digits, a small CNN, about a minute
python -m keras_lowbit.demo cifar10.npz      CIFAR-10, ResNet-20 (EPOCHS, FLOAT_EPOCHS)
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import keras
import numpy as np

import keras_lowbit as klb
import tflite_export
from keras_lowbit import data as datasets
from keras_lowbit import zoo
from keras_lowbit.cli.measure import file_accuracy, keras_accuracy
from keras_lowbit.progress import fit_verbosity, table
from tflite_export import runtime

OUT = Path("runs/demo")


def small_cnn(input_shape, classes):
    """A residual CNN for small gray images, with batch norm; 24,000 parameters at 10 classes."""
    layers = keras.layers
    inputs = keras.Input(input_shape, name="image")
    x = layers.Rescaling(1 / 255, name="pixels")(inputs)

    def conv(x, filters, name, relu=True, size=3):
        x = layers.Conv2D(filters, size, padding="same", use_bias=False, name=name)(x)
        x = layers.BatchNormalization(momentum=0.9, name=f"{name}_bn")(x)
        return layers.ReLU(name=f"{name}_relu")(x) if relu else x

    x = conv(x, 16, "stem")
    y = conv(conv(x, 16, "block1_a"), 16, "block1_b", relu=False)
    x = layers.ReLU(name="block1_relu")(layers.Add(name="block1_add")([x, y]))
    x = layers.MaxPooling2D(name="shrink")(x)
    x = conv(x, 32, "wide", size=1)
    y = conv(conv(x, 32, "block2_a"), 32, "block2_b", relu=False)
    x = layers.ReLU(name="block2_relu")(layers.Add(name="block2_add")([x, y]))
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, layers.Dense(classes, name="logits")(x), name="small_cnn")


def fit(model, dataset, epochs, learning_rate, callbacks=(), augment=False, batch_size=64):
    """SGD with momentum, cosine to zero; the batches."""
    if augment:
        batches = datasets.AugmentedBatches(
            dataset.x_train, dataset.y_train, 128, drop_remainder=True
        )
    else:
        batches = datasets.AugmentedBatches(
            dataset.x_train, dataset.y_train, batch_size, flip=False, pad=1, drop_remainder=True
        )
    schedule = keras.optimizers.schedules.CosineDecay(learning_rate, epochs * len(batches))
    model.compile(
        optimizer=keras.optimizers.SGD(schedule, momentum=0.9, nesterov=True, global_clipnorm=1.0),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    callbacks = [batches.follow_epochs(), klb.callbacks.ScaleGuard(), *callbacks]
    model.fit(batches, epochs=epochs, callbacks=callbacks, verbose=fit_verbosity(), shuffle=False)
    return batches


def main(arguments=None) -> int:
    """Run the job on the data set named by the first argument; the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    keras.utils.set_random_seed(0)
    name = arguments[0] if arguments else "digits"
    dataset = datasets.load(name)
    small = dataset.image_shape[0] < 32
    print(f"{dataset}\nbackend: {keras.backend.backend()}")
    OUT.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    if small:
        model = small_cnn(dataset.image_shape, dataset.num_classes)
        epochs = {"float": 12, "descent": 9}
    else:
        model = zoo.build("resnet20", input_shape=dataset.image_shape, classes=dataset.num_classes)
        epochs = {
            "float": int(os.environ.get("FLOAT_EPOCHS", 20)),
            "descent": int(os.environ.get("EPOCHS", 9)),
        }
    print(f"\n1. float: {epochs['float']} epochs")
    fit(model, dataset, epochs["float"], 0.1, augment=not small)

    steps = epochs["descent"] // 3
    plan = {0: 8, steps: 6, 2 * steps: 4}
    print(f"\n2. quantize to w4a4, calibrate, descend 8 -> 6 -> 4 bits: {epochs['descent']} epochs")
    quantized = klb.quantize_model(model, "w4a4")
    klb.calibrate(quantized, np.asarray(dataset.x_train[:256]))
    descent = klb.callbacks.BitDescent(plan, verbose=1)
    batches = fit(quantized, dataset, epochs["descent"], 0.005, [descent], augment=not small)
    klb.reestimate_batchnorm(quantized, batches, steps=20)
    klb.snap_biases(quantized)
    quantized.save(OUT / "w4a4.keras")

    print("\n3. freeze, export, verify")
    images = np.asarray(dataset.x_test[:32]).astype("float32")
    results = {
        weights: tflite_export.convert(quantized, weights=weights, verify=images)
        for weights in ("int8", "int4")
    }
    print(results["int4"])
    report(model, quantized, results, dataset)
    print(f"\nThe whole job took {time.perf_counter() - started:.0f} s.")
    wrong = sum(result.mismatches for result in results.values())
    return 0 if wrong == 0 else 1


def report(model, quantized, results, dataset):
    """Accuracies, sizes, latencies and wrong codes, with a picture."""
    x, y = np.asarray(dataset.x_test), dataset.y_test
    rows = [
        ("float Keras model", f"{keras_accuracy(model, x, y):.2%}", "", "", ""),
        ("w4a4 Keras model", f"{keras_accuracy(quantized, x, y):.2%}", "", "", ""),
        ("frozen (integers)", f"{keras_accuracy(results['int8'].frozen, x, y):.2%}", "", "", ""),
    ]
    for weights, result in results.items():
        path = result.save(OUT / f"w4a4_{weights}.tflite")
        rows.append(
            (
                str(path),
                f"{file_accuracy(result.content, x, y):.2%}",
                f"{len(result.content):,}",
                f"{runtime.median_latency(result.content):.3f}",
                f"{result.mismatches} of {result.verification.compared:,}",
            )
        )
    columns = ("model", "accuracy", "bytes", "ms a frame", "wrong codes")
    print(table(f"{dataset.name}, {len(y):,} test images", columns, rows))
    path = picture(quantized, results["int8"], dataset, OUT / "demo.png")
    print(f"Picture: {path}")


def picture(quantized, result, dataset, path):
    """Test images with what the file says of them, and the integer kernels it computes with."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    x = np.asarray(dataset.x_test[:400])
    name = result.graph.inputs[0]
    feed = {name: x.astype(result.graph.tensors[name].dtype)}
    logits = next(iter(runtime.run(result.content, feed).values()))
    said, truth = logits.argmax(-1), dataset.y_test[:400]
    order = np.argsort(said == truth, kind="stable")[:16]

    figure = pyplot.figure(figsize=(11, 5.2))
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.15))
    for axis, i in zip(left.subplots(4, 4).flat, order, strict=True):
        axis.imshow(x[i].squeeze(), cmap="gray")
        right_answer = said[i] == truth[i]
        verdict = f"{dataset.classes[said[i]]}"
        if not right_answer:
            verdict += f" (is {dataset.classes[truth[i]]})"
        axis.set_title(verdict, fontsize=7, color="black" if right_answer else "crimson")
        axis.axis("off")
    left.suptitle("what the .tflite says (mistakes first)", fontsize=9)

    low = [layer for layer in quantized.layers if getattr(layer, "kernel_quantizer", None)]
    low = [layer for layer in low if layer.kernel_quantizer.bits < 8][:4]
    for axis, layer in zip(right.subplots(2, 2).flat, low, strict=False):
        codes, _ = layer.kernel_quantizer.encode(keras.ops.convert_to_tensor(layer.kernel))
        codes = keras.ops.convert_to_numpy(codes).ravel()
        bits = layer.kernel_quantizer.bits
        values, counts = np.unique(codes, return_counts=True)
        axis.bar(values, counts, color="steelblue")
        axis.set_title(f"{layer.name}: {len(values)} codes at {bits} bits", fontsize=8)
        axis.tick_params(labelsize=7)
    right.suptitle("integer kernels", fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


if __name__ == "__main__":
    sys.exit(main())
