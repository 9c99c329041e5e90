"""What a stage asks of a model: bits, switches, frozen parts, fresh batch norms."""

from __future__ import annotations

import contextlib
import fnmatch

import keras

from keras_lowbit.callbacks.switches import add_switches
from keras_lowbit.numerics.grid import MAX_EXPORT_BITS
from keras_lowbit.quantizers.sites import Site, layers_of, sites_of
from keras_lowbit.training.plan import FLOAT_BITS, Stage


def prepare(model: keras.Model, stages) -> None:
    """Check stages against a model, and give it the switches that they need.

    Args:
        model: a quantized model, or one that holds some (a distiller).
        stages: all that will be trained.

    Raises:
        ValueError: no quantizers, bits below the model's scheme, a pattern that matches nothing.
    """
    sites = sites_of(model)
    if not sites:
        raise ValueError(
            f"CyclicTraining: {model.name} has no quantizer. Quantize it at the scheme to end "
            "with, such as quantize_model(model, 'w2a2')"
        )
    for role, field in (("kernel", "kernel_bits"), ("activation", "activation_bits")):
        targets = [s.quantizer.target_bits for s in sites if s.quantizer.role == role]
        moving = [s.quantizer.target_bits for s in sites if s.quantizer.role == role and _moves(s)]
        floor = min(moving or targets or [1])
        for stage in stages:
            if getattr(stage, field) < floor:
                raise ValueError(
                    f"CyclicTraining: stage {stage.name} asks for {getattr(stage, field)} bits of "
                    f"{role}s, but {model.name} was quantized at {floor} or more. Quantize it at "
                    "the scheme to end with"
                )
    for stage in stages:
        _frozen_parts(model, stage)
    if any(FLOAT_BITS in stage.bits for stage in stages):
        add_switches(model, [site.quantizer for site in sites])


def set_bits(model: keras.Model, stage: Stage) -> None:
    """Bits of a stage: a float one switches off, others go down to each quantizer's own width.

    As under `BitDescent`: `max(bits of the stage, bits of the scheme)`, and quantizers built at 8
    bits stay there. The representable range is kept; while a quantizer is off, bits and scale rest.
    """
    for site in sites_of(model):
        quantizer = site.quantizer
        bits = stage.kernel_bits if quantizer.role == "kernel" else stage.activation_bits
        if quantizer.enabled != (bits != FLOAT_BITS):
            quantizer.set_enabled(bits != FLOAT_BITS)
        if bits != FLOAT_BITS and _moves(site):
            wanted = min(max(bits, quantizer.target_bits), quantizer.largest_bits)
            if quantizer.bits != wanted:
                quantizer.set_bits(wanted)


def _moves(site: Site) -> bool:
    return site.quantizer.target_bits < MAX_EXPORT_BITS and site.quantizer.moves_bits


@contextlib.contextmanager
def frozen(model: keras.Model, stage: Stage):
    """Inside the block what the stage freezes does not train; flags come back afterwards."""
    owners = [layer for _, layer in layers_of(model)]
    owners += [site.quantizer for site in sites_of(model)]
    layer_flags = [(owner, owner.trainable) for owner in owners]
    variable_flags = [(v, v.trainable) for v in model.variables]
    try:
        for part in _frozen_parts(model, stage):
            part.trainable = False
        yield
    finally:
        for owner, flag in layer_flags:
            if owner.trainable != flag:
                owner.trainable = flag
        # A layer's flag moves those of its variables, some of which were off by themselves.
        for variable, flag in variable_flags:
            variable.trainable = flag


def _frozen_parts(model, stage):
    # Pairs: two students of a distiller may have one name.
    parts = [*layers_of(model)]
    parts += [(f"{s.layer_name}.{s.argument}", s.quantizer) for s in sites_of(model)]
    found = {}
    for pattern in stage.frozen:
        # Under a distiller names begin with the model's; the layer's own name is enough.
        matching = {
            id(part): part
            for name, part in parts
            if fnmatch.fnmatchcase(name, pattern)
            or fnmatch.fnmatchcase(name.rsplit("/", 1)[-1], pattern)
        }
        if not matching:
            some = ", ".join(name for name, _ in parts[:12])
            raise ValueError(
                f"CyclicTraining: stage {stage.name} freezes {pattern!r}, which matches no layer "
                f"and no quantizer of {model.name}. Layers: {some} ..."
            )
        found.update(matching)
    return list(found.values())
