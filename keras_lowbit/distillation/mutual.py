"""One float net and several quantized ones that learn from each other."""

from __future__ import annotations

from collections.abc import Sequence

import keras
from keras import ops

from keras_lowbit import walk
from keras_lowbit.checks import checked_number, did_you_mean
from keras_lowbit.distillation.divergence import divergence, on_grid_of, squared_distance
from keras_lowbit.distillation.task_loss import KeepsTaskLoss
from keras_lowbit.kinds import TRANSPARENT, activation_name, walk_back
from keras_lowbit.layers import Quantize

# Calls behind which probabilities are still probabilities.
_KEEP_VALUES = TRANSPARENT | {"quantize", "dequantize"}


@keras.saving.register_keras_serializable(package="keras_lowbit")
class MutualDistiller(KeepsTaskLoss, keras.Model):
    """Trains quantized models and their float twin together, each following the others.

        L_j = a_s CE(z_j, y) + b_s T_j^2 KL(softmax(sg(z_f) / T_j) || softmax(z_j / T_j))
        L_f = a_t CE(z_f, y) + b_t mean_j T_j^2 KL(softmax(sg(z_j) / T_j) || softmax(z_f / T_j))

    for the logits `z_f` of the float model and `z_j` of each quantized one; KL summed over classes,
    mean over the batch. What is minimized is `L_f + sum_j L_j`: each divergence holds the other
    net still (`sg`), so every net gets the gradient of its own loss alone.

    With `hints`, feature maps guide too: at each pair, `Q` the activation quantizer there,

        L_j += hint_weight mean (sg(Q(f)) - Q(s))^2        f: the float net's map
        L_f += hint_weight mean_j mean (Q(f) - sg(Q(s)))^2   s: the quantized net's

        model = MutualDistiller(float_model, [quantized])
        model.compile(optimizer, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.fit(...); quantized.save(...)

    Callbacks find the quantizers inside. The compiled metrics are those of the first quantized
    model; losses are logged for each. All nets share one optimizer. Sample weights weigh
    CE only.

    Args:
        float_model: ends in logits.
        quantized_models: list of models with the same inputs and outputs.
        a_s: weight of the quantized models' task loss.
        b_s: weight of their divergence from the float model.
        a_t: weight of the float model's task loss.
        b_t: weight of its divergence from the quantized models.
        temperature: T, or one for each quantized model.
        frozen_teacher: the float model stays as it is, in inference mode, and `L_f` is left out:
            ordinary distillation (`float_model.trainable` becomes False).
        hints: pairs `(layer of the float model, Quantize layer of the quantized models)`, names.
        hint_weight: weight of the hints.

    Raises:
        ValueError: models of other inputs or outputs, or one that ends in a softmax; shared
            variables, weights below 0, a temperature not positive, unknown hint layers; in
            `compile`, a loss on probabilities.

    Reference:
        Zhuang et al., arXiv:1908.04680, joint knowledge distillation, as in the authors' code;
        defaults are those of its CIFAR-100 configuration. Hints: guided training of Zhuang et al.,
        CVPR 2018, arXiv:1711.00205, from memory, confirmed by a third party's code. Deviations: one
        optimizer for all nets; hints split by `sg` as divergences are, so that gradients stay
        separate; the float twin keeps its ReLU, where the paper clips it to 0..1.
    """

    def __init__(
        self,
        float_model: keras.Model,
        quantized_models: Sequence[keras.Model],
        *,
        a_s: float = 0.7,
        b_s: float = 0.7,
        a_t: float = 1.0,
        b_t: float = 0.5,
        temperature: float | Sequence[float] = 1.0,
        frozen_teacher: bool = False,
        hints: Sequence[tuple[str, str]] = (),
        hint_weight: float = 2.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        students = _checked_models(float_model, quantized_models)
        weights = {"a_s": a_s, "b_s": b_s, "a_t": a_t, "b_t": b_t, "hint_weight": hint_weight}
        for name, value in weights.items():
            setattr(self, name, checked_number(value, who=f"MutualDistiller: {name}", least=0))
        self.temperatures = _checked_temperatures(temperature, len(students))
        self.frozen_teacher = bool(frozen_teacher)
        self.float_model, self.quantized_models = float_model, students
        if self.frozen_teacher:
            float_model.trainable = False
        self.hints = pairs = _checked_hints(float_model, students, hints)
        self._float_net = _Net(float_model, [name for name, _ in pairs])
        self._quantized_nets = [_Net(net, [name for _, name in pairs]) for net in students]
        names = ["loss_float", *(f"loss_{i}" for i in range(len(students)))]
        self._trackers = [keras.metrics.Mean(name) for name in names[self.frozen_teacher :]]
        self.task_loss = None
        self.built = True

    def get_config(self):
        """The models, and the arguments."""
        models = [self.float_model, *self.quantized_models]
        float_model, *quantized = map(keras.saving.serialize_keras_object, models)
        return {
            "name": self.name,
            "float_model": float_model,
            "quantized_models": quantized,
            **{name: getattr(self, name) for name in ("a_s", "b_s", "a_t", "b_t", "hint_weight")},
            "temperature": self.temperatures,
            "frozen_teacher": self.frozen_teacher,
            "hints": [list(pair) for pair in self.hints],
        }

    @classmethod
    def from_config(cls, config):
        """The reverse."""
        config = dict(config)
        read = keras.saving.deserialize_keras_object
        float_model = read(config.pop("float_model"))
        return cls(float_model, [read(one) for one in config.pop("quantized_models")], **config)

    def compile(self, optimizer="rmsprop", loss=None, **kwargs):
        """As Keras' `compile`; `loss` is CE above, of one model's logits.

        Args:
            optimizer: for all nets.
            loss: a `keras.losses.Loss` on logits.
            **kwargs: those of `keras.Model.compile`.

        Raises:
            ValueError: no loss object, or one that takes probabilities.
        """
        if not isinstance(loss, keras.losses.Loss) or not getattr(loss, "from_logits", True):
            raise ValueError(
                "MutualDistiller: loss must be an object that takes logits, such as "
                f"keras.losses.SparseCategoricalCrossentropy(from_logits=True). Got {loss!r}"
            )
        self.task_loss = loss
        # Not given to Keras, which would apply it to the outputs of all nets.
        super().compile(optimizer=optimizer, **kwargs)

    def call(self, inputs, training=None):
        """`{"float": [logits, maps...], "quantized": [[logits, maps...] of each net]}`."""
        teaching = False if self.frozen_teacher else training
        return {
            "float": self._float_net(inputs, teaching),
            "quantized": [net(inputs, training) for net in self._quantized_nets],
        }

    def losses_of(self, y, outputs, sample_weight=None):
        """`[L_f, L_1, ..., L_J]` of the outputs of a call; no `L_f` for a frozen teacher."""
        (teacher, *maps), students = outputs["float"], outputs["quantized"]
        mutual, found = 0.0, []
        for i, (logits, *seen) in enumerate(students):
            temperature = self.temperatures[i]
            loss = self.a_s * self.task_loss(y, logits, sample_weight)
            loss = loss + self.b_s * divergence(teacher, logits, temperature)
            back = self.b_t * divergence(logits, teacher, temperature)
            for quantizer, theirs, ours in zip(
                self._quantized_nets[i].quantizers, maps, seen, strict=True
            ):
                target = on_grid_of(quantizer, theirs)
                hint = squared_distance(ops.stop_gradient(target), ours)
                loss = loss + self.hint_weight * hint
                hint = squared_distance(target, ops.stop_gradient(ours))
                back = back + self.hint_weight * hint
            found.append(loss)
            mutual = mutual + back
        if self.frozen_teacher:
            return found
        own = self.a_t * self.task_loss(y, teacher, sample_weight)
        return [own + mutual / len(students), *found]

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """`L_f + sum_j L_j`, and the penalties of the layers."""
        found = self.losses_of(y, y_pred, sample_weight)
        for tracker, loss in zip(self._trackers, found, strict=True):
            tracker.update_state(loss)
        return sum([*found, *(ops.sum(ops.cast(loss, "float32")) for loss in self.losses)])

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        """The compiled metrics, of the first quantized model."""
        return super().compute_metrics(x, y, y_pred["quantized"][0][0], sample_weight)


class _Net:
    """A model and its maps at the hints in one pass; no layer, so Keras tracks nothing twice."""

    def __init__(self, model, hints):
        held = [model.get_layer(name) for name in hints]
        self.quantizers = [layer.quantizer for layer in held if isinstance(layer, Quantize)]
        self.model = model
        if held:
            outputs = [model.outputs[0], *(layer.output for layer in held)]
            self.model = keras.Model(model.input, outputs, name=f"{model.name}_hints")

    def __call__(self, inputs, training):
        """`[logits, maps...]`."""
        outputs = self.model(inputs, training=training)
        if not isinstance(outputs, (list, tuple)):
            return [outputs]
        return [out if not isinstance(out, (list, tuple)) else _real(*out) for out in outputs]


def _real(codes, scale):
    return codes * ops.stop_gradient(scale)


def _checked_models(float_model, quantized_models) -> list[keras.Model]:
    given = quantized_models
    if not isinstance(given, (list, tuple)) or not given:
        raise ValueError(f"MutualDistiller: quantized_models is a list of models. Got {given!r}")
    for model in (float_model, *given):
        if not isinstance(model, keras.Model) or len(getattr(model, "outputs", None) or ()) != 1:
            raise ValueError(
                "MutualDistiller takes functional or Sequential models of one output. "
                f"Got {getattr(model, 'name', model)!r}"
            )
        if _ends_in_probabilities(model):
            raise ValueError(
                f"MutualDistiller: {model.name} ends in probabilities; distillation compares "
                "logits. Make the models without the last softmax or sigmoid "
                "(classifier_activation=None in keras.applications)"
            )
    for model in given:
        for what in ("input_shape", "output_shape"):
            ours, theirs = getattr(model, what), getattr(float_model, what)
            if ours != theirs:
                raise ValueError(
                    f"MutualDistiller: {model.name} has the {what} {ours}, but {float_model.name} "
                    f"has {theirs}. Distill between models of the same task"
                )
    seen: dict[int, str] = {}
    for model in (float_model, *given):
        for variable in model.weights:
            if id(variable) in seen:
                raise ValueError(
                    f"MutualDistiller: {seen[id(variable)]} and {model.name} share the variable "
                    f"{variable.path}. Give each model its own weights (keras.models.clone_model)"
                )
        seen.update({id(variable): model.name for variable in model.weights})
    return list(given)


def _ends_in_probabilities(model):
    program = walk.flatten(model)
    (output,) = walk.refs(program.outputs)
    last = walk_back(program.producers(), output, _KEEP_VALUES)
    probabilities = ("softmax", "softmax_variant", "sigmoid")
    return last is not None and activation_name(last.operation) in probabilities


def _checked_temperatures(temperature, count) -> list[float]:
    given = temperature if isinstance(temperature, (list, tuple)) else [temperature] * count
    numbers = all(isinstance(t, (int, float)) and not isinstance(t, bool) and t > 0 for t in given)
    if len(given) != count or not numbers:
        raise ValueError(
            f"MutualDistiller: temperature is one positive number, or {count} of them, one for "
            f"each quantized model. Got {temperature!r}"
        )
    return [float(t) for t in given]


def _checked_hints(float_model, students, hints) -> list[tuple[str, str]]:
    for pair in hints:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(
                "MutualDistiller: a hint is a pair of names, a layer of the float model and a "
                f"Quantize layer of the quantized ones. Got {pair!r}"
            )
        theirs = _layer(float_model, pair[0]).output
        for student in students:
            layer = _layer(student, pair[1])
            if not isinstance(layer, Quantize):
                raise ValueError(
                    f"MutualDistiller: {pair[1]} of {student.name} is a {type(layer).__name__}. "
                    "A hint needs a Quantize layer, whose grid the float map is put on"
                )
            ours = layer.output[0]
            if getattr(theirs, "shape", None) != ours.shape:
                raise ValueError(
                    f"MutualDistiller: a hint compares maps of equal shape. {pair[0]} has "
                    f"{getattr(theirs, 'shape', None)}, {pair[1]} has {ours.shape}"
                )
    return [tuple(pair) for pair in hints]


def _layer(model, name):
    known = [layer.name for layer in model.layers]
    if name in known:
        return model.get_layer(name)
    hint = did_you_mean(name, known)
    raise ValueError(f"MutualDistiller: {model.name} has no layer {name!r}.{hint}")
