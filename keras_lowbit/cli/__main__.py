"""`python -m keras_lowbit.cli` is `keras-lowbit`."""

from keras_lowbit.cli.main import entry

entry()
