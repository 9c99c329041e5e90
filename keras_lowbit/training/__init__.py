"""Training in stages (plans, and the driver that runs them), and what its optimizers are told."""

from keras_lowbit.training.cyclic import CyclicTraining
from keras_lowbit.training.plan import Stage, StagePlan, Visit
from keras_lowbit.training.variables import exclude_from_weight_decay, quantizer_rates

__all__ = [
    "CyclicTraining",
    "Stage",
    "StagePlan",
    "Visit",
    "exclude_from_weight_decay",
    "quantizer_rates",
]
