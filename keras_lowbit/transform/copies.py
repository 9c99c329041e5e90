"""Copies of inputs and layers: layers are made again from their configs, with their weights."""

from __future__ import annotations

import keras

from keras_lowbit import walk
from keras_lowbit.named_outputs import model_of
from keras_lowbit.whole_files import first_line


def inputs_like(program) -> list:
    """`keras.Input` for each input of a program, of its name, type and batch size."""
    return [
        keras.Input(batch_shape=ref.shape, dtype=ref.dtype, name=name)
        for ref, name in zip(program.inputs, program.input_names, strict=True)
    ]


def refuse_changed(program) -> None:
    """Raise `ValueError` for layers whose configuration does not tell what weights they hold."""
    changed = [
        call.name
        for call in program.calls
        if getattr(call.operation, "quantization_mode", None)
        or getattr(call.operation, "lora_enabled", False)
    ]
    if changed:
        raise ValueError(
            f"{', '.join(dict.fromkeys(changed))}: quantized by Keras or with LoRA weights. Pass "
            "the float model before quantize(), or one of plain layers with the merged kernels"
        )


def config_of(original) -> dict:
    """`get_config`, with regularizers and constraints that have none as they are.

    Raises:
        ValueError: a layer without a config, with its name.
    """
    try:
        return original.get_config()
    except NotImplementedError:
        endings = ("_regularizer", "_constraint")
        held = {k: v for k, v in vars(original).items() if k.endswith(endings) and v is not None}
    try:
        for key in held:
            setattr(original, key, None)
        return {**original.get_config(), **held}
    except NotImplementedError as error:
        raise ValueError(
            f"{original.name} ({type(original).__name__}) cannot be copied: give its class a "
            "get_config"
        ) from error
    finally:
        for key, value in held.items():
            setattr(original, key, value)


def constraints_of(layer) -> list[str]:
    """Names of a layer's arguments that constrain its weights, such as `kernel_constraint`."""
    given = config_of(layer)
    return [key for key, value in given.items() if key.endswith("_constraint") and value]


def rebuilt(original, config, cls=None):
    """A layer or operation of `config`, which is the original's with some entries changed.

    What Keras cannot make again from a config (a lambda, a function or a regularizer that is not
    registered) the copy shares with the original.

    Args:
        original: what is copied.
        config: `config_of(original)`, changed or not.
        cls: class of the copy; that of the original when left out.

    Raises:
        ValueError: a layer that cannot be made again, with its name and why neither its
            `from_config` nor its constructor does it.
    """
    cls = cls or type(original)
    try:
        return cls.from_config(dict(config))
    except (TypeError, ValueError, AttributeError) as first:
        # Inside the first error's handler, so that the second one's traceback shows both.
        try:
            return cls(**{key: _own(original, key, value) for key, value in config.items()})
        except (TypeError, ValueError, AttributeError) as second:
            reasons = _reason(first), _reason(second)
            why = "its from_config: {}; its constructor: {}".format(*reasons)
            if reasons[0] == reasons[1]:
                why = reasons[0]
            raise ValueError(
                f"{original.name} ({type(original).__name__}) cannot be copied: {why}. "
                "Give its class a get_config and a from_config that fit"
            ) from second


def _reason(error):
    """One line; of Keras' `from_config` the class's own error, without the config in front."""
    wraps = "Exception encountered: " in str(error)
    return first_line(error.__context__ if wraps and error.__context__ else error).rstrip(".")


def _own(original, key, value):
    """A serialized function or object of a config, as the original holds it."""
    held = getattr(original, key, None)
    if key == "dtype" or not isinstance(value, (dict, str)) or not callable(held):
        return value
    # Layers have weights, which copies do not share.
    return value if isinstance(held, keras.layers.Layer) else held


def rebuilt_model(program, replace, name) -> keras.Model:
    """A copy of a program's float model with some calls replaced.

    Args:
        program: a `walk.Program`.
        replace: `(call, arguments)` to the new tensors, or to `None` for a copy of the call.
        name: name of the new model.
    """
    clones: dict[int, object] = {}

    def execute(call, args, kwargs):
        made = replace(call, args)
        if made is not None:
            return made
        original = call.operation
        operation = clones.get(id(original))
        if operation is None:
            config = config_of(original)
            if isinstance(original, keras.layers.Layer):
                config["name"] = call.plain
            operation = clones[id(original)] = rebuilt(original, config)
        results = operation(*args, **kwargs)
        if isinstance(original, keras.layers.Layer) and original.weights:
            set_weights(operation, original.get_weights())
        return results

    inputs = inputs_like(program)
    values = walk.run(program, inputs, execute)
    outputs = walk.substitute(program.outputs, values)
    return model_of(inputs if len(inputs) > 1 else inputs[0], outputs, name, program.output_names)


def set_weights(layer, weights):
    """`set_weights` of a layer or a model, and of what `Normalization` derives from its weights.

    Keras computes its mean and variance anew where a file is read, but not here.
    """
    layer.set_weights(weights)
    _derive(layer)


def twin(model) -> keras.Model:
    """A model of the same layers and weights, which learns by itself."""
    made = keras.models.clone_model(model)
    set_weights(made, model.get_weights())
    return made


def _derive(layer):
    if isinstance(layer, keras.layers.Normalization):
        layer.finalize_state()
    for part in getattr(layer, "layers", ()):
        _derive(part)
