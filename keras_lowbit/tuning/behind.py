"""What is behind a block: the float model's other blocks, so that a loss sees the logits."""

from __future__ import annotations

import contextlib

from keras_lowbit.tuning import programs
from keras_lowbit.tuning.block_model import logit_error


class Behind:
    """The float blocks behind a block, as one differentiable function of its outputs.

    Args:
        blocks: what is left of the model, in order; with none the tensors come back as they are.
    """

    def __init__(self, blocks):
        self.programs = [block.floating for block in blocks]

    def __call__(self, tensors):
        """The model's outputs from the block's, lists of tensors."""
        for program in self.programs:
            tensors = programs.run(program, tensors)
        return tensors

    @contextlib.contextmanager
    def fixed(self):
        """Inside the block PyTorch computes no gradients of these float weights, a third of all."""
        variables = {
            id(v): v
            for program in self.programs
            for call in program.calls
            for v in getattr(call.operation, "variables", ())
        }
        held = [v for v in variables.values() if v.trainable]
        for variable in held:
            variable.trainable = False
        try:
            yield
        finally:
            for variable in held:
                variable.trainable = True


def with_logits(loss, behind: Behind, weight: float):
    """`loss(wanted, got) + weight * KL` of the logits that the float model gives behind the block.

    `wanted` ends with the float model's logits.
    """

    def both(wanted, got):
        *own, logits = wanted
        return loss(own, got) + weight * logit_error([logits], behind(got))

    return both
