"""What happens between the steps of `fit`: schedules, re-estimation, guards, resume."""

from keras_lowbit.callbacks.batch_norm import BatchNormReestimation
from keras_lowbit.callbacks.bit_descent import BitDescent
from keras_lowbit.callbacks.export_gap import ExportGapMonitor
from keras_lowbit.callbacks.freeze_batch_norm import FreezeBatchNorm
from keras_lowbit.callbacks.resume import Resume
from keras_lowbit.callbacks.scale_guard import ScaleError, ScaleGuard

__all__ = [
    "BatchNormReestimation",
    "BitDescent",
    "ExportGapMonitor",
    "FreezeBatchNorm",
    "Resume",
    "ScaleError",
    "ScaleGuard",
]
