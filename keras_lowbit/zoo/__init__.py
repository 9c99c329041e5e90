"""The zoo: architectures, and trained low-bit models to load."""

from keras_lowbit.zoo.build import ARCHITECTURES, build
from keras_lowbit.zoo.load import load
from keras_lowbit.zoo.registry import Entry, info
from keras_lowbit.zoo.registry import list_models as list

__all__ = ["ARCHITECTURES", "Entry", "build", "info", "list", "load"]
