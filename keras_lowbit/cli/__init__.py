"""What the commands of `keras-lowbit` do; their flags and help are in `keras_lowbit_cli`."""
