"""Looking at models: what it costs, what stayed float, and which integers a layer holds."""

from keras_lowbit.analysis.integer_weights import LayerCodes, integer_weights
from keras_lowbit.analysis.rows import Row
from keras_lowbit.analysis.summary import Summary, summary

__all__ = ["LayerCodes", "Row", "Summary", "integer_weights", "summary"]
