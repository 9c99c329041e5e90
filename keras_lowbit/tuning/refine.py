"""Everything at once behind a reconstruction: end-to-end distillation of scales and biases."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from keras_lowbit import walk
from keras_lowbit.layers.packed_kernels import kernels
from keras_lowbit.tuning.block_model import Rates
from keras_lowbit.tuning.plan import plan_calibrated
from keras_lowbit.tuning.reconstruct import Reconstruction, reconstruct

# A fifth of what a block takes; codes rest.
RATES = Rates(codes_4bit=0, codes_8bit=0, biases=2e-4, log_scales=6e-4)


def refine(
    model: keras.Model,
    float_model: keras.Model,
    images,
    *,
    steps: int = 300,
    batch_size: int = 10,
    rates: Rates | None = None,
    seed: int = 0,
    jit_compile: bool | None = None,
) -> Reconstruction:
    """Tune all of a reconstructed model to its float model's logits, without labels, in place.

    The loss is the KL divergence of the softmax; nothing is dropped. Scales of kernels and of
    activations and biases are trained, codes of kernels rest: behind a reconstruction many latent
    kernels lie near the border to the next code, and flips of some per cent of them ruin more than
    a few hundred images can mend. `rates` with rates for codes lets them move too; latent kernels
    are in the middles of their codes by then, which changes no output.

    Measured on MobileNetV2 w4a4 with a few hundred images, the divergence on others fell behind a
    reconstruction that had seen no views of them, and behind the zoo's, which had, no more were
    answered as by the float model (`docs/results.md`): measure on images of your own.

    Args:
        model: a calibrated model that `reconstruct` has tuned.
        float_model: the model that it was made from.
        images: as in `reconstruct`.
        steps: of Adam, rates falling to zero along a cosine.
        batch_size: images a step; activations of the whole model are kept for each.
        rates: `tuning.Rates`; `None`: `refine.RATES`, where codes rest.
        seed: of batches.
        jit_compile: as in `reconstruct`.

    Returns:
        A `Reconstruction` of one block, the whole model.

    Raises:
        ValueError: as in `reconstruct`; the model is then as it was, as whatever is raised.
        FloatingPointError: a loss that is not finite; likewise.

    Reference:
        None for the start in the middle of codes (this library's). Nagel et al., Overcoming
        Oscillations in Quantization-Aware Training, ICML 2022, arXiv:2203.11086, describe kernels
        that end at borders.
    """
    rates = RATES if rates is None else rates
    plan = plan_calibrated(model, float_model, steps=steps, blocks=[], rates=rates)
    held = [(v, np.array(ops.convert_to_numpy(v))) for v in model.variables]
    try:
        _center(plan.quantized)
        return reconstruct(
            model,
            float_model,
            images,
            steps=steps,
            batch_size=batch_size,
            drop=0.0,
            blocks=[],
            rates=rates,
            seed=seed,
            jit_compile=jit_compile,
        )
    except BaseException:
        # All of them: latent kernels from before would be no match for scales that were trained.
        for variable, value in held:
            variable.assign(value)
        raise


def _center(program: walk.Program) -> None:
    """Latent kernels to the values of their codes."""
    for call in program.calls:
        for kernel in kernels(call.operation):
            if kernel.quantizer is not None:
                kernel.latent.assign(kernel.quantizer(kernel.latent))
