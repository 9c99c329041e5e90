"""`python -m keras_lowbit_cli` is `keras-lowbit`."""

from keras_lowbit_cli.main import entry

entry()
