"""Penalties on latent kernels that prepare them for their grid."""

from keras_lowbit.regularizers.cosine_ternary import CosineTernaryRegularizer

__all__ = ["CosineTernaryRegularizer"]
