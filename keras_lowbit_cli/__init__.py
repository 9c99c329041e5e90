"""The front of the command line: flags, help, exit codes, and nothing that imports Keras.

It stands beside `keras_lowbit` because importing anything inside that package imports Keras, which
takes seconds; the work itself is in `keras_lowbit.cli.handlers`.
"""
