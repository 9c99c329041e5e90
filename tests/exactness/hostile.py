"""Weights that look for trouble, and the check that every model here goes through."""

from __future__ import annotations

import keras
import numpy as np

from keras_lowbit import calibrate, quantize_model
from keras_lowbit.integer import reference
from keras_lowbit.integer.build import integer_graph
from tflite_export import convert
from tflite_export.convert import fitting_images

SCHEMES = ("w8a8", "w4a8", "w4a4", "w2a2")
WEIGHTS = ("int8", "int4")


def hostile(model: keras.Model, seed: int, gain: float = np.inf) -> keras.Model:
    """Random kernels, and batch norms that a trained model might have on a bad day, in place.

    One channel in eight of a batch norm has gamma 0, one in eight a variance of 1e-7 to 1e-3;
    half of the gammas are negative; means are up to three deviations away.

    Args:
        model: any Keras model.
        seed: decides everything.
        gain: largest root mean square of a batch norm's gains; deep models without bounded
            activations overflow float32 without a limit.
    """
    random = np.random.default_rng(seed)
    for layer in _leaves(model):
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights(_hostile_norm(layer, random, gain))
        elif layer.weights and isinstance(layer, keras.layers.Normalization):
            layer.adapt(random.uniform(0, 1, (16, *layer.input.shape[1:])).astype(np.float32))
        elif layer.weights:
            layer.set_weights([_random_like(w, random) for w in layer.weights])
    return model


def _leaves(model):
    for layer in model.layers:
        yield from _leaves(layer) if isinstance(layer, keras.Model) else [layer]


def _random_like(weight, random):
    shape = tuple(weight.shape)
    if len(shape) < 2:
        return random.normal(0, 0.3, shape).astype(np.float32)
    inputs = np.prod(shape[:2]) if "depthwise" in weight.path else np.prod(shape[:-1])
    kernel = random.normal(0, 1 / np.sqrt(inputs), shape)
    # Channels of very different size, as depthwise layers have them.
    return (kernel * random.uniform(0.1, 2, shape[-1])).astype(np.float32)


def _hostile_norm(layer, random, gain):
    channels = (layer.moving_mean.shape[0],)

    def rare():
        return random.random(channels) < 1 / 8

    gamma = random.uniform(0.3, 1.5, channels) * random.choice([-1, 1], channels)
    gamma[rare()] = 0
    variance = random.uniform(0.3, 2.0, channels)
    tiny = rare()
    variance[tiny] = 10.0 ** random.uniform(-7, -3, tiny.sum())
    size = np.sqrt(np.mean(gamma**2 / (variance + layer.epsilon)))
    gamma *= min(1, gain / size) if size else 1
    values = {
        "gamma": gamma,
        "beta": random.normal(0, 0.5, channels),
        "moving_mean": random.normal(0, 1, channels) * 3 * np.sqrt(variance),
        "moving_variance": variance,
    }
    return [values[w.name].astype(np.float32) for w in layer.weights]


def images_for(model, count=4, seed=0):
    """Random images by input, from dark to bright: 0..1, or pixels where the model rescales."""
    random = np.random.default_rng(seed)
    pixels = any(isinstance(layer, keras.layers.Rescaling) for layer in model.layers)
    arrays = []
    for tensor in model.inputs:
        images = random.random((count, *tensor.shape[1:]), np.float32)
        images *= np.linspace(0.25, 1, count, dtype=np.float32).reshape(
            -1, *[1] * (images.ndim - 1)
        )
        arrays.append(np.round(255 * images) if pixels else images)
    return arrays


def codes_for(model, graph, count, seed):
    """Images in the types of a graph's inputs: random codes where they are integers."""
    random = np.random.default_rng(seed)
    arrays = images_for(model, count, seed)
    for i, name in enumerate(graph.inputs):
        kind = graph.tensors[name].dtype
        if kind != "float32":
            low = np.iinfo(kind).min
            arrays[i] = random.integers(low, low + 256, arrays[i].shape).astype(kind)
    return arrays


def quantized(model, scheme, seed=0):
    """The model at a scheme, calibrated on four images."""
    small = quantize_model(model, scheme)
    return calibrate(small, images_for(model, seed=seed), method="minmax" if seed % 2 else "mse")


def exported(small, weights="int8", *, target="android", images=2, seed=0, **options):
    """Convert and compare: `(ExportResult, images it was verified on)`."""
    graph = integer_graph(small, weights=weights, **options)
    codes = codes_for(small, graph, images, seed + 1)
    return convert(small, target, weights, verify=codes, **options), codes


def constant_tensors(result, images):
    """Tensors that hold a single code for all images: exact, and proof of nothing."""
    graph = result.graph
    found = reference.run(graph, fitting_images(graph, images))
    return [op.output for op in graph if np.ptp(found[op.output]) == 0]
