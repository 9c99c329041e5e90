"""What `reconstruct` trains each block for."""

from __future__ import annotations

import contextlib

from keras_lowbit import walk
from keras_lowbit.tuning import block_model, streams
from keras_lowbit.tuning.behind import Behind, with_logits


def ends_in_logits(program):
    """Whether a program has one output `(batch, classes)`."""
    shapes = [ref.shape for ref in walk.refs(program.outputs)]
    return len(shapes) == 1 and len(shapes[0]) == 2 and (shapes[0][1] or 0) > 1


class Losses:
    """What each block is trained for.

    Args:
        blocks: all of the model, in order.
        floating: the float model's program.
        logit_weight: as in `reconstruct`.
    """

    def __init__(self, blocks, floating, logit_weight):
        self.blocks, self.floating, self.weight = blocks, floating, logit_weight
        self.by_logits = ends_in_logits(floating)
        self.logits = None

    def prepare(self, inputs, batch_size, budget):
        """The float model's logits of all images, if losses ask for them."""
        if self.weight:
            (self.logits,) = streams.propagate(self.floating, inputs, batch_size, budget)

    def close(self):
        """Give the logits' memory or file back."""
        if self.logits is not None:
            self.logits.close()

    def is_last(self, i):
        """Whether block `i` ends the model."""
        return i == len(self.blocks) - 1

    def of(self, i, variances):
        """`(loss, further targets, context to train in)` of block `i`."""
        if self.is_last(i) and self.by_logits:
            return block_model.logit_error, [], contextlib.nullcontext()
        loss = block_model.squared_error(variances)
        if not self.weight:
            return loss, [], contextlib.nullcontext()
        behind = Behind(self.blocks[i + 1 :])
        return with_logits(loss, behind, self.weight), [self.logits], behind.fixed()
