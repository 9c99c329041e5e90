"""Training quantized models beside, or under, a float one."""

from keras_lowbit.distillation.frozen import Distiller
from keras_lowbit.distillation.mutual import MutualDistiller

__all__ = ["Distiller", "MutualDistiller"]
