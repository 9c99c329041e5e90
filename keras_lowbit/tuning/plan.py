"""What `reconstruct` will do with two models: blocks, steps and rates, before images are seen."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

from keras_lowbit import walk
from keras_lowbit.checks import checked_count, checked_number
from keras_lowbit.layers.packed_kernels import kernels
from keras_lowbit.transform.calibrate import activation_quantizers
from keras_lowbit.transform.ready import check_ready
from keras_lowbit.tuning import programs
from keras_lowbit.tuning.block_model import Rates
from keras_lowbit.tuning.blocks import Block
from keras_lowbit.tuning.blocks import find as find_blocks
from keras_lowbit.tuning.losses import ends_in_logits
from keras_lowbit.tuning.variables import check_kernel, check_scale, is_fixed


@dataclass(frozen=True)
class Plan:
    """Blocks in order, with the steps and the rates of each.

    Args:
        quantized: program of the quantized model, up to its logits.
        floating: program of its float model, likewise.
        blocks: stretches of both.
        steps: one number a block.
        rates: likewise.
    """

    quantized: walk.Program
    floating: walk.Program
    blocks: list[Block]
    steps: list[int]
    rates: list[Rates]

    @property
    def names(self) -> list[str]:
        """The layers whose outputs end the blocks."""
        return [block.name for block in self.blocks]


def plan(
    model,
    float_model,
    *,
    steps=200,
    block_steps=None,
    logit_weight=0.0,
    logit_blocks=1,
    blocks=None,
    rates=None,
    block_rates=None,
) -> Plan:
    """The plan of a `reconstruct` with these arguments; the model need not be calibrated yet.

    Raises:
        ValueError: models that do not correspond layer by layer, quantizers without a scale
            variable, a block name that is no cut, arguments out of range, a pattern that matches no
            block, `logit_weight` for a model without logits.
    """
    steps = checked_count(steps, who="reconstruct: steps", least=1)
    block_steps = {
        str(pattern): checked_count(n, who=f"reconstruct: block_steps[{pattern!r}]", least=1)
        for pattern, n in dict(block_steps or {}).items()
    }
    checked_number(logit_weight, who="reconstruct: logit_weight", least=0)
    quantized, floating = map(programs.logits, programs.pair(model, float_model))
    found = find_blocks(quantized, floating, blocks)
    logit_blocks = checked_count(logit_blocks, who="reconstruct: logit_blocks", least=1)
    if logit_blocks > len(found):
        raise ValueError(
            f"reconstruct: logit_blocks must be at most {len(found)}, the blocks of "
            f"{float_model.name}. Got {logit_blocks}"
        )
    if logit_blocks > 1:  # once more, with the last cuts left out
        found = find_blocks(quantized, floating, [block.name for block in found[:-logit_blocks]])
    names = [block.name for block in found]
    counts = _by_pattern(names, steps, block_steps, "block_steps")
    rates = _by_pattern(names, Rates() if rates is None else rates, block_rates, "block_rates")
    odd = [one for one in rates if not isinstance(one, Rates)]
    if odd:
        raise ValueError(f"reconstruct: rates and block_rates are of tuning.Rates. Got {odd[0]!r}")
    if logit_weight and not ends_in_logits(floating):
        raise ValueError(
            f"reconstruct: logit_weight needs a model with one output (batch, classes). "
            f"{float_model.name} has {[ref.shape for ref in walk.refs(floating.outputs)]}"
        )
    _check_quantizers(quantized)
    return Plan(quantized, floating, found, counts, rates)


def plan_calibrated(model, float_model, **given) -> Plan:
    """`plan` of a model that is to be tuned now.

    Raises:
        ValueError: as in `plan`; the model saw no data, or a quantizer is switched off.
    """
    made = plan(model, float_model, **given)
    check_ready(model, who="reconstruct")
    return made


def _by_pattern(names, default, by_pattern, who):
    """A value for each name: that of the last pattern that matches it, or the default."""
    chosen = dict.fromkeys(names, default)
    for pattern, value in dict(by_pattern or {}).items():
        matching = fnmatch.filter(names, pattern)
        if not matching:
            raise ValueError(
                f"reconstruct: {who} has {pattern!r}, which matches no block. Blocks: {list(names)}"
            )
        chosen.update(dict.fromkeys(matching, value))
    return list(chosen.values())


def _check_quantizers(program):
    """Refuse grids that cannot be trained, of all blocks before the first is."""
    for call in program.calls:
        for kernel in kernels(call.operation):
            if kernel.quantizer is not None:
                check_kernel(call.name, kernel.quantizer)
        for quantizer in activation_quantizers(call.operation):
            if not is_fixed(quantizer):
                check_scale(call.name, quantizer)
