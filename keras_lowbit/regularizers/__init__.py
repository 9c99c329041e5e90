"""Penalties on latent kernels that prepare them for their grid."""

from keras_lowbit.regularizers.cosine_ternary import CosineTernaryRegularizer
from keras_lowbit.regularizers.dampening import Dampening

__all__ = ["CosineTernaryRegularizer", "Dampening"]
