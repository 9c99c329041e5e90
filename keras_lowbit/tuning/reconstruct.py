"""Block reconstruction: a low-bit model learns its float model's activations, block after block.

A block's target is the float block's output on float inputs; its input is, element by element with
probability `drop`, the float or the quantized stream so far, and inside it the activation grids
are dropped likewise. `tuning.variables` says what is trained, in which units; where asked, a bias
brings the means of the output's channels in order before and behind it (`tuning.means`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import keras
import numpy as np
from keras import ops

from keras_lowbit.checks import checked_choice, checked_count, checked_number
from keras_lowbit.progress import table, track
from keras_lowbit.transform.batches import checked_batches
from keras_lowbit.transform.snap_biases import snap_biases
from keras_lowbit.tuning import means, streams
from keras_lowbit.tuning import rounding as data_rounding
from keras_lowbit.tuning.block_model import BlockModel, Rates
from keras_lowbit.tuning.folder import Folder
from keras_lowbit.tuning.losses import Losses
from keras_lowbit.tuning.plan import plan_calibrated

ROUNDINGS = ("nearest", "data")
# Streams alive at once: the block's two inputs and its target or its outputs.
_STREAMS = 3
# Images that a block's errors are of; the last block's stream is of no more: nothing reads it.
_MEASURED = 256


@dataclass(frozen=True)
class BlockResult:
    """One block.

    Args:
        name: the layer whose output ends it.
        products: layers with a kernel in it.
        before: relative squared error of its output against the float model's, with the quantized
            stream as input, before the block was trained. Of the first 256 images at most.
        after: the same afterwards.
        seconds: time of its steps; 0 for a block that a folder held.
    """

    name: str
    products: int
    before: float
    after: float
    seconds: float


@dataclass(frozen=True)
class Reconstruction:
    """What `reconstruct` did; prints as a table."""

    blocks: tuple[BlockResult, ...]

    def __str__(self):
        rows = [
            (b.name, b.products, f"{b.before:.4f}", f"{b.after:.4f}", f"{b.seconds:.1f}")
            for b in self.blocks
        ]
        columns = ("block", "products", "error before", "error after", "seconds")
        return table("Relative squared error of each block's output", columns, rows)


def reconstruct(
    model: keras.Model,
    float_model: keras.Model,
    images,
    *,
    steps: int = 200,
    block_steps: Mapping[str, int] | None = None,
    batch_size: int = 20,
    drop: float = 0.5,
    rounding: str = "nearest",
    logit_weight: float = 0.0,
    logit_blocks: int = 1,
    match_means: bool = False,
    blocks: Sequence[str] | None = None,
    rates: Rates | None = None,
    block_rates: Mapping[str, Rates] | None = None,
    folder: str | os.PathLike | None = None,
    memory: float = 2**30,
    seed: int = 0,
    jit_compile: bool | None = None,
) -> Reconstruction:
    """Tune a calibrated model to its float model, block by block, without labels, in place.

    Loss of a block: mean squared error over the variance of the target; of the last block, where
    it ends in logits `(batch, classes)`: the KL divergence of their softmax, of which the other
    blocks get `logit_weight` times. Adam, rates falling to zero along a cosine. Batch norms may be
    folded or not: they compute with their moving statistics, and their `beta` is trained as the
    bias that it will be.

    Args:
        model: a calibrated model of `quantize_model`.
        float_model: the model that it was made from.
        images: array `(n, ...)`, list of arrays for several inputs, or an iterable of batches; a
            few hundred, kept in memory.
        steps: for each block.
        block_steps: other numbers for some blocks, by patterns of their names, of which the last
            that matches counts. A step on large images costs ten times one of a late block.
        batch_size: images a step.
        drop: share of elements that stay real while training (0.5 for few bits; at 8 bits 0 serves
            better), 0..1.
        rounding: where kernels of 2 to 4 bits start: `"nearest"`, as calibrated, or `"data"`, at
            the codes that cost their layers' outputs least (`tuning.rounding`), where that makes
            the block's error smaller and images have positions enough for each input of its
            kernels: with fewer the codes fit those images and no others. MobileNetV2 ends nearer at
            w4a8; at w4a4 its blocks do, and the whole net does not (`docs/results.md`).
        logit_weight: beside its own error, a block's loss gets so much of the KL divergence of the
            logits that the float model's other blocks make of its output: of two outputs as near
            to the float model's, the one that the logits feel less is the better. For models that
            end in logits. A step then costs the float model behind the block too, both ways; and a
            few hundred images may be too few for it (`docs/results.md`: MobileNetV2 w4a4).
        logit_blocks: how many of the last blocks are trained as one, for the logits. Of what blocks
            in front of the last gain in squared error the logits may feel nothing.
        match_means: whether a bias brings the channel means of each block's output in order, before
            its training and once more behind it with nothing real: a constant a channel, which
            training leaves where its rates are small against the values. Squared errors fall by it,
            most in front (a third of MobileNetV2's first block at w4a4), which the logits need not
            feel: its w4a4 as a whole is no nearer for it (`docs/results.md`).
        blocks: names of layers whose outputs end a block; `None`: found in the graph, residual
            blocks as they are, chains up to their next linear tensor.
        rates: `tuning.Rates`.
        block_rates: other `Rates` for some blocks, as `block_steps`.
        folder: finished blocks are kept there, and a run that was killed goes on behind them:
            those are taken as they are, however this model was calibrated.
        memory: bytes for activations; what does not fit is kept as float16, or on disk.
        seed: of batches and of dropping.
        jit_compile: `None` compiles with XLA on JAX only: on TensorFlow it makes depthwise
            convolutions several times slower on a CPU.

    Returns:
        A `Reconstruction`.

    Raises:
        ValueError: models that do not correspond layer by layer, an uncalibrated model, quantizers
            without a scale variable or switched off, images that do not fit, a block name that is
            no cut, arguments out of range, a pattern that matches no block, a folder of another
            run.
        FloatingPointError: a loss that is not finite, with the block's name; the block is then as
            it was.

    Reference:
        Li et al., BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction,
        ICLR 2021, arXiv:2102.05426 (blocks in order against float outputs), and Wei et al., QDrop,
        ICLR 2022, arXiv:2203.05740 (dropping). Deviations: kernels themselves are trained, not
        rounding offsets; the float model's own stream is the input that quantization is mixed
        with; no Fisher weights. `logit_weight`: Liu et al., PD-Quant: Post-Training Quantization
        Based on Prediction Difference Metric, CVPR 2023, arXiv:2212.07048, which chooses scales of
        activations by it; here everything in the block is trained with it.
    """
    batch_size = checked_count(batch_size, who="reconstruct: batch_size", least=1)
    _check(drop, memory)
    checked_choice(rounding, ROUNDINGS, who="reconstruct: rounding")
    plan = plan_calibrated(
        model,
        float_model,
        steps=steps,
        block_steps=block_steps,
        logit_weight=logit_weight,
        logit_blocks=logit_blocks,
        blocks=blocks,
        rates=rates,
        block_rates=block_rates,
    )
    batches = checked_batches(plan.quantized, images, batch_size)
    inputs = [streams.Given(np.concatenate(column)) for column in zip(*batches, strict=True)]
    if jit_compile is None:
        jit_compile = keras.backend.backend() == "jax"
    settings = {
        "steps": plan.steps,
        "batch_size": batch_size,
        "drop": drop,
        "rounding": rounding,
        "logit_weight": logit_weight,
        "match_means": bool(match_means),
        "seed": seed,
        "rates": [vars(one) for one in plan.rates],
        "blocks": plan.names,
    }
    kept = Folder.open(folder, settings, float_model, model, [i.array for i in inputs])
    budget = memory / _STREAMS
    losses = Losses(plan.blocks, plan.floating, logit_weight)
    runner = _Runner(
        steps=plan.steps,
        batch_size=batch_size,
        drop=drop,
        rounding=rounding,
        matches=match_means,
        losses=losses,
        rates=plan.rates,
        budget=budget,
        seed=seed,
        jit_compile=jit_compile,
        kept=kept,
    )
    result = runner.run(plan.blocks, inputs)
    snap_biases(model)
    return result


def _check(drop, memory):
    checked_number(drop, who="reconstruct: drop", least=0, most=1)
    checked_number(memory, who="reconstruct: memory, in bytes,", above=0)


@dataclass(frozen=True, kw_only=True)
class _Runner:
    """Goes through the blocks with the two streams; `steps` and `rates` have one of each block."""

    steps: list[int]
    batch_size: int
    drop: float
    rounding: str
    matches: bool
    losses: Losses
    rates: list[Rates]
    budget: float
    seed: int
    jit_compile: bool
    kept: Folder
    done: set[int] = field(default_factory=set)

    def run(self, found, inputs):
        results = []
        bar = track(range(sum(self.steps)), "reconstruct")
        quantized = floating = inputs
        try:
            self.losses.prepare(inputs, self.batch_size, self.budget)
            for i, block in enumerate(found):
                wanted = streams.propagate(block.floating, floating, self.batch_size, self.budget)
                result, got = self.block(i, block, quantized, floating, wanted, bar)
                results.append(result)
                spent, quantized, floating = (*quantized, *floating), got, wanted
                for stream in spent:
                    stream.close()
            next(bar, None)  # past the last step, so that the bar counts it
        finally:
            bar.close()
            for stream in (*quantized, *floating, self.losses):
                stream.close()
        return Reconstruction(tuple(results))

    def block(self, i, block, quantized, floating, wanted, bar):
        """The block's result and the quantized streams of its outputs."""
        variances = [max(streams.variance(stream), 1e-12) for stream in wanted]
        loss, further, context = self.losses.of(i, variances)
        before = None
        if not self.kept.holds(i):
            before = self.start(i, block, quantized, floating, wanted, variances)
        model = BlockModel(
            block.quantized,
            loss=loss,
            drop=self.drop,
            mix=i > 0,
            seed=_seed(self.seed, i),
            rates=self.rates[i],
            done=self.done,
        )
        seconds = 0.0
        if before is None:
            before = self.kept.load(i, model.targets())
            for _ in range(self.steps[i]):
                next(bar, None)
        else:
            with context:
                targets = [*wanted, *further]
                seconds = self.train(i, block, model, quantized, floating, targets, bar)
            self.kept.save(i, model.targets(), before)
        count = _MEASURED if self.losses.is_last(i) else None
        got = streams.propagate(block.quantized, quantized, self.batch_size, self.budget, count)
        after = streams.relative_error(wanted, got, variances, _MEASURED)
        return BlockResult(block.name, block.products, before, after, seconds), got

    def start(self, i, block, quantized, floating, wanted, variances):
        """The block's error before anything is done to it; rounds its kernels to data, if asked."""

        def error():
            size, budget = self.batch_size, self.budget
            got = streams.propagate(block.quantized, quantized, size, budget, _MEASURED)
            found = streams.relative_error(wanted, got, variances, _MEASURED)
            for stream in got:
                stream.close()
            return found

        before = error()
        rows = len(quantized[0])
        if self.rounding == "data" and data_rounding.is_covered(block, rows):
            held = [(v, np.array(ops.convert_to_numpy(v))) for v in data_rounding.variables(block)]
            seed, size, nearer = _seed(self.seed, i), self.batch_size, False
            try:
                data_rounding.round_block(block, quantized, floating, size, seed, self.done)
                nearer = error() < before
            finally:
                # Each layer is nearer to its target, yet not the block. Or something was raised,
                # and a run that goes on later must find the block untouched.
                if not nearer:
                    for variable, value in held:
                        variable.assign(value)
        return before

    def match(self, i, block, model, quantized, wanted):
        """Bring channel means of the outputs in order, where asked; logits have their own loss."""
        if self.matches and not (self.losses.is_last(i) and self.losses.by_logits):
            means.match_means(block.quantized, model.biases, quantized, wanted, self.batch_size)

    def train(self, i, block, model, quantized, floating, wanted, bar):
        """Seconds that the steps took."""
        start = [np.array(ops.convert_to_numpy(v)) for v in model.targets()]
        random = np.random.default_rng(_seed(self.seed, i))
        began = time.monotonic()
        if model.trainable_variables:
            model.prepare(self.steps[i], self.jit_compile)
        try:
            self.match(i, block, model, quantized, wanted)  # what follows begins near
            for step in range(self.steps[i] if model.trainable_variables else 0):
                rows = random.choice(len(wanted[0]), min(self.batch_size, len(wanted[0])), False)
                rows.sort()
                feeds = [stream[rows] for stream in (*quantized, *(floating if model.mix else ()))]
                targets = [stream[rows] for stream in wanted]
                value = float(model.train_on_batch(feeds, targets))
                if not np.isfinite(value):
                    raise FloatingPointError(
                        f"reconstruct: the loss of block {block.name} is {value} at step {step}. "
                        "Lower the rates, and check the calibration"
                    )
                next(bar, None)
            model.write()
            self.match(i, block, model, quantized, wanted)  # once more, with nothing real
        except BaseException:
            # A run that goes on later must find the block untouched.
            for variable, value in zip(model.targets(), start, strict=True):
                variable.assign(value)
            raise
        return time.monotonic() - began


def _seed(seed, i):
    """A seed for each block, so that a resumed run draws what an unbroken one would."""
    return int(np.random.SeedSequence([seed, i]).generate_state(1)[0] % 2**31)
