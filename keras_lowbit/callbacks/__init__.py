"""What happens between the steps of `fit`: schedules, re-estimation, guards, resume."""

from keras_lowbit.callbacks.adam_reset import AdamResetCosine
from keras_lowbit.callbacks.batch_norm import BatchNormReestimation
from keras_lowbit.callbacks.bit_descent import BitDescent
from keras_lowbit.callbacks.channel_balance import ChannelBalanceDecay
from keras_lowbit.callbacks.cyclic_precision import CyclicPrecision
from keras_lowbit.callbacks.dampen_oscillations import DampenOscillations, attach_dampening
from keras_lowbit.callbacks.export_gap import ExportGapMonitor
from keras_lowbit.callbacks.freeze_batch_norm import FreezeBatchNorm
from keras_lowbit.callbacks.freeze_oscillating import FreezeOscillating
from keras_lowbit.callbacks.resume import Resume
from keras_lowbit.callbacks.scale_guard import ScaleError, ScaleGuard
from keras_lowbit.callbacks.stochastic_precision import StochasticPrecision
from keras_lowbit.callbacks.temperature_annealing import TemperatureAnnealing
from keras_lowbit.callbacks.ternary_phases import TernaryPhases, attach_cosine
from keras_lowbit.callbacks.two_stage import TwoStage

__all__ = [
    "AdamResetCosine",
    "BatchNormReestimation",
    "BitDescent",
    "ChannelBalanceDecay",
    "CyclicPrecision",
    "DampenOscillations",
    "ExportGapMonitor",
    "FreezeBatchNorm",
    "FreezeOscillating",
    "Resume",
    "ScaleError",
    "ScaleGuard",
    "StochasticPrecision",
    "TemperatureAnnealing",
    "TernaryPhases",
    "TwoStage",
    "attach_cosine",
    "attach_dampening",
]
