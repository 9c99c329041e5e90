"""Images and labels for training, choices and evaluation.

    dataset = keras_lowbit.data.load("digits")        # or "cifar10", "x.npz", "folder/"
    choices = keras_lowbit.data.holdout(dataset, 500)  # look at the test images once
    batches = keras_lowbit.data.AugmentedBatches(choices.x_train, choices.y_train, 128)

Nothing here imports a backend; folders are read with Pillow, digits with scikit-learn.
"""

from keras_lowbit.data.augment import RandomCropFlip, crop_flip
from keras_lowbit.data.batches import AugmentedBatches, Batches
from keras_lowbit.data.dataset import Dataset, holdout
from keras_lowbit.data.sources import NAMES, load
from keras_lowbit.data.views import zoomed_views

__all__ = [
    "NAMES",
    "AugmentedBatches",
    "Batches",
    "Dataset",
    "RandomCropFlip",
    "crop_flip",
    "holdout",
    "load",
    "zoomed_views",
]
