"""The zoo: architectures, and trained low-bit models to load."""

from keras_lowbit.zoo.build import ARCHITECTURES, build

__all__ = ["ARCHITECTURES", "build"]
