"""`python -m keras_lowbit.cli` is `keras-lowbit`, later by the seconds that Keras takes to load."""

import os
import sys

# A fresh start: by now Keras is imported and has read its backend, which `--backend` may change.
os.execv(sys.executable, [sys.executable, "-m", "keras_lowbit_cli", *sys.argv[1:]])
