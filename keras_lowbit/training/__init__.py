"""Training in stages: plans as data, and the driver that runs them through `fit`."""

from keras_lowbit.training.cyclic import CyclicTraining
from keras_lowbit.training.plan import Stage, StagePlan, Visit

__all__ = ["CyclicTraining", "Stage", "StagePlan", "Visit"]
