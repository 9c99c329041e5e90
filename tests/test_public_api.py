"""The public surface is a list."""

import inspect

import pytest

import keras_lowbit
import tflite_export

MODULES = (
    keras_lowbit,
    keras_lowbit.analysis,
    keras_lowbit.callbacks,
    keras_lowbit.data,
    keras_lowbit.distillation,
    keras_lowbit.layers,
    keras_lowbit.optimizers,
    keras_lowbit.quantizers,
    keras_lowbit.regularizers,
    keras_lowbit.training,
    keras_lowbit.transform,
    keras_lowbit.tuning,
    keras_lowbit.zoo,
    tflite_export,
)


def signature(thing):
    if inspect.ismodule(thing) or (issubclass(type(thing), type) and issubclass(thing, Exception)):
        return ""
    return str(inspect.signature(thing)) if callable(thing) else ""


@pytest.mark.once
def test_the_public_surface_is_the_agreed_one(golden):
    lines = (
        f"{module.__name__}.{name}{signature(getattr(module, name))}"
        for module in MODULES
        for name in sorted(module.__all__)
    )
    golden("public_api", "\n".join(lines) + "\n")


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_what_is_public_says_what_it_is(module):
    missing = [n for n in module.__all__ if not (getattr(module, n).__doc__ or "").strip()]
    assert not missing
