"""The same training on one and on eight virtual devices: run by `test_parallel`, as a program."""

import json

import keras
import numpy as np
from keras import ops

from keras_lowbit.callbacks import BitDescent, FreezeBatchNorm, StochasticPrecision
from keras_lowbit.quantizers.sites import sites_of
from tests.callbacks import tiny

EPOCHS = 4
PLAN = {0: 8, 1: 6, 3: 4}


class Record(keras.callbacks.Callback):
    """Loss, bits and scales at the end of each epoch."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def on_epoch_end(self, epoch, logs=None):
        self.rows.append({"loss": logs["loss"], **tiny.bits(self.model), **scales(self.model)})


def scales(model):
    return {
        f"{site.layer_name}.{site.argument}.scale": _numbers(site.quantizer.scale)
        for site in sites_of(model)
    }


def _numbers(variable):
    return np.ravel(ops.convert_to_numpy(variable)).tolist()


def run(distribution):
    """Rows of `Record`, and how many devices hold a kernel; calibration is part of the run."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    keras.distribution.set_distribution(distribution)
    model, record = tiny.model("w4a4"), Record()
    noise = StochasticPrecision(p0=0.5, ramp=0.5)
    tiny.train(model, [BitDescent(PLAN), noise, FreezeBatchNorm(2), record], epochs=EPOCHS)
    devices = len(model.get_layer("middle").kernel.value.sharding.device_set)
    return {"devices": devices, "rows": record.rows}


if __name__ == "__main__":
    print(json.dumps([run(None), run(keras.distribution.DataParallel())]))
