"""Channel-balanced activations (a reconstruction of arXiv:2012.13762): the outlier channel."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_lowbit.callbacks import ChannelBalanceDecay
from keras_lowbit.numerics import ranges, uniform
from keras_lowbit.quantizers import LSQ, ChannelBalanced
from keras_lowbit.quantizers.channel_balanced import relative_error
from keras_lowbit.scheme import Scheme
from keras_lowbit.transform import calibrate, freeze, quantize_model
from tests.callbacks import tiny
from tests.gradients import gradient


def numpy(x):
    return np.array(ops.convert_to_numpy(x))


def built(shape=(None, 3), bits=2, **options):
    quantizer = ChannelBalanced(bits, signed=False, **options)
    quantizer.build(shape)
    return quantizer


def encoded_losses(quantizer, x):
    """What a call alone adds to the losses."""
    before = len(quantizer.losses)
    quantizer.encode(ops.convert_to_tensor(x))
    return [float(numpy(loss)) for loss in quantizer.losses[before:]]


def half_gaussian(outlier=1.0):
    """32 channels of |N(0, 1)|, one of which is `outlier` times as wide."""
    x = np.abs(np.random.default_rng(0).normal(size=(4096, 32))).astype(np.float32)
    x[:, 5] *= outlier
    return x


class TestTheOutlierChannel:
    """2 bits: plain squared error moves the best step ninefold, relative errors hardly."""

    steps = np.linspace(0.02, 6.0, 599)

    def best(self, x, error):
        return self.steps[int(np.argmin([error(x, s) for s in self.steps]))]

    def test_plain_squared_error_follows_the_outlier_to_the_edge(self):
        def plain(x, step):
            return ranges.squared_error(x, step, 0, 3).mean()

        # Two steps of the search.
        assert self.best(half_gaussian(), plain) == pytest.approx(0.66, abs=0.02)
        assert self.best(half_gaussian(10.0), plain) > 5.5

    @pytest.mark.parametrize("agg", ["mean", "median", "trimmed"])
    def test_relative_errors_do_not(self, agg):
        def balanced(x, step):
            return relative_error(x, step, 0, 3, agg)

        assert self.best(half_gaussian(), balanced) == pytest.approx(0.655, abs=0.02)  # two steps
        # Two steps.
        assert self.best(half_gaussian(10.0), balanced) == pytest.approx(0.66, abs=0.02)

    @pytest.mark.parametrize("agg", ["mean", "median", "trimmed"])
    @pytest.mark.parametrize("outlier", [1.0, 10.0, 100.0])
    def test_calibration_finds_that_step(self, agg, outlier):
        quantizer = built((None, 32), agg=agg)
        quantizer.fit_scale(half_gaussian(outlier))
        # As near as the steps of the search above; J is flat there.
        assert quantizer.grid().scale == pytest.approx(0.66, abs=0.01)

    def test_lsq_is_what_it_is_compared_with(self):
        plain = LSQ(2, role="activation", signed=False)
        plain.build((None, 32))
        plain.fit_scale(half_gaussian(10.0))
        assert plain.grid().scale > 3


class TestTheObjective:
    x = np.float32([[0.2, 1.0, 5.0], [0.4, 3.0, 5.0], [1.6, 5.0, 5.0]])

    def value(self, agg, x=x, scale=1.0):
        x = ops.convert_to_tensor(x)
        codes = uniform.nearest(x / scale, 0.0, 3.0)
        return float(numpy(built(agg=agg).objective(x, codes, ops.full((), scale))))

    def test_by_hand(self):
        """Step 1, codes 0..3.

        Channel 0: 0, 0, 2: errors .04, .16, .16, mean .12; variance .3822: rho .3140.
        Channel 1: 1, 3, 3: errors 0, 0, 4, mean 4/3; variance 8/3: rho .5. Channel 2 is dead.
        """
        rho = [0.12 / np.var([0.2, 0.4, 1.6]), 0.5]
        np.testing.assert_allclose(rho, [0.3140, 0.5], atol=1e-4)  # four digits by hand
        for agg in ("mean", "median", "trimmed"):
            assert self.value(agg) == pytest.approx(np.mean(rho), rel=1e-5)  # float32

    def test_the_ranks_are_those_of_live_channels(self):
        """Channels of rho .1, .2, ... by errors at variances that are equal."""
        x = np.abs(np.random.default_rng(2).normal(size=(50, 23))).astype(np.float32)
        x[:, ::4] *= 7
        alive = x.copy()
        x[:, 3] = 2.0
        alive = np.delete(x, 3, axis=1)
        for agg in ("mean", "median", "trimmed"):
            wanted = relative_error(alive, 1.0, 0, 3, agg)
            assert self.value(agg, x) == pytest.approx(wanted, rel=1e-4)  # float32 against float64

    def test_it_does_not_feel_a_common_factor(self):
        for agg in ("mean", "median"):
            assert self.value(agg, self.x * 8, 8.0) == self.value(agg)  # a power of two is exact

    @pytest.mark.parametrize("x", [np.zeros((3, 3)), np.full((3, 3), 2.0)])
    def test_dead_tensors_cost_nothing(self, x):
        for agg in ("mean", "median", "trimmed"):
            assert self.value(agg, np.float32(x)) == 0
        quantizer = built()
        quantizer.fit_scale(np.float32(x))
        assert np.isfinite(quantizer.grid().scale)

    @pytest.mark.filterwarnings(r"ignore:var\(\)")  # PyTorch's own, of the variance of nothing
    @pytest.mark.parametrize("agg", ["mean", "median", "trimmed"])
    def test_an_empty_batch_costs_nothing_and_has_no_gradient(self, agg):
        quantizer = built(agg=agg)

        def loss(x):
            codes, scale = quantizer.encode(x)
            return ops.sum(codes) + quantizer.objective(x, codes, scale)

        empty = np.zeros((0, 3), "float32")
        to_x, to_scale = gradient(loss, empty, variables=[quantizer.scale])
        assert to_x.shape == (0, 3)
        assert to_scale == 0

    def test_off_it_costs_nothing(self):
        quantizer = built(weight=0.5)
        quantizer.add_switch()
        for on in (True, False):
            quantizer.set_enabled(on)
            (loss,) = encoded_losses(quantizer, self.x)
            # By hand J is (.3140 + .5) / 2.
            assert loss == pytest.approx(0.5 * 0.4070 * on, abs=1e-4)

    @pytest.mark.parametrize("agg", ["mean", "median", "trimmed"])
    def test_its_gradient_is_that_of_finite_differences_and_passes_the_input_by(self, agg):
        quantizer = built(agg=agg)
        quantizer.scale.assign(0.9)

        def objective(x):
            codes, _ = quantizer.to_codes(x)
            return quantizer.objective(x, codes, ops.convert_to_tensor(quantizer.scale))

        to_x, to_scale = gradient(
            objective,
            self.x,
            variables=[quantizer.scale],
        )
        alive = self.x[:, :2].astype(float)
        above, below = (relative_error(alive, 0.9 + h, 0, 3, agg) for h in (1e-5, -1e-5))
        # Float32 against float64.
        np.testing.assert_allclose(to_scale, (above - below) / 2e-5, rtol=1e-3)
        assert not to_x.any()


class TestInTraining:
    def model(self, **options):
        scheme = Scheme(4, 2, activation="channel_balanced", activation_options=options)
        quantized = calibrate(quantize_model(tiny.float_model(), scheme), tiny.images()[0])
        tiny.compile_(quantized)
        return quantized

    def balances(self, quantized):
        found = [getattr(layer, "quantizer", None) for layer in quantized.layers]
        return [q for q in found if isinstance(q, ChannelBalanced)]

    def test_compiled_steps_add_the_objective_with_the_balance_of_the_moment(self):
        """The loss at a learning rate of 0: cross-entropy + balance * sum of J."""
        quantized = self.model(weight=0.5)
        x, y = tiny.images(8)
        quantized.optimizer.learning_rate.assign(0.0)
        fit = {"batch_size": 8, "epochs": 1, "shuffle": False, "verbose": 0}
        losses = []
        for balance in (0.0, 0.5, 1.0):
            for quantizer in self.balances(quantized):
                quantizer.balance.assign(balance)
            losses.append(quantized.fit(x, y, **fit).history["loss"][0])
        assert losses[1] - losses[0] > 0.01
        # Differences of float32 losses.
        assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-3)

    def test_the_balance_decays_by_a_half_cosine(self):
        quantized = self.model(weight=0.2)
        seen = []
        (first, *_) = self.balances(quantized)
        watch = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: seen.append(float(numpy(first.balance)))
        )
        tiny.train(quantized, [ChannelBalanceDecay(2), watch], epochs=3)
        np.testing.assert_allclose(seen, [0.2, 0.1, 0.0], atol=1e-8)  # float32

    def test_files_and_the_frozen_model_keep_the_codes(self, tmp_path):
        quantized = self.model(agg="median")
        tiny.train(quantized, [], epochs=1)
        x = tiny.images()[0]
        quantized.save(tmp_path / "m.keras")
        again = keras.models.load_model(tmp_path / "m.keras")
        np.testing.assert_array_equal(*(numpy(freeze(m)(x)) for m in (quantized, again)))
        assert [q.agg for q in self.balances(again)] == ["median"] * len(self.balances(quantized))


@pytest.mark.once
class TestArguments:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"agg": "meen"}, r"agg must be one of .*Did you mean 'mean'"),
            ({"weight": -0.1}, r"weight must be a finite number, at least 0\. Got -0\.1"),
            ({"axis": -1}, r"channels share one scale.*Got -1"),
            ({"role": "kernel"}, r"role must be one of \('activation',\)"),
        ],
    )
    def test_what_means_nothing_is_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            ChannelBalanced(4, **options)

    def test_a_model_without_them_has_nothing_to_decay(self):
        with pytest.raises(ValueError, match="tiny_quantized has no channel-balanced activations"):
            tiny.train(tiny.model("w4a4"), [ChannelBalanceDecay()], epochs=1)
