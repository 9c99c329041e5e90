"""Variables that a quantizer gets late: a switch, and the strength of a penalty."""

from __future__ import annotations

from keras import ops


class Switched:
    """Mixin of `Quantizer`: what is switched on and off, or pulled, while a model trains.

    Attributes:
        switch: variable, above 0.5 where reals are quantized; `None` where nobody switches, so
            that nothing more is computed.
        pull: variable, the strength of a penalty; `None` without one.
        off_for_a_step: set by whoever switches off for a step and on again: a config does not
            remember it.
    """

    switch = None
    pull = None
    off_for_a_step = False

    def add_switch(self) -> bool:
        """Create the variable `switch`, on; `set_enabled` moves it and compiled steps see it.

        While it is off, reals pass unchanged with the scale 1, so that the gradient to `x` is 1,
        and all other gradients are 0. A step compiled before does not know the switch: compile
        again, or add switches to a whole model by `callbacks.switches.add_switches`.

        The switch is no weight in files: they are those of a model without. A config remembers
        that it is off. In `get_weights()` it is one: lists taken before and clones made later are
        shorter. Go back to a start by a file, or by a list taken after `add_switch`.

        Returns:
            Whether the variable is new.

        Raises:
            ValueError: the quantizer is not built.
        """
        if self.switch is not None:
            return False
        self.switch = self._add_late("switch", 1.0)
        return True

    def add_pull(self) -> None:
        """Create the variable `pull`, 0: the strength of a penalty on the kernel.

        Here, because compiled steps see variables of layers only. It is no weight in files. A
        quantizer that has one keeps it.

        Raises:
            ValueError: the quantizer is not built.
        """
        if self.pull is None:
            self.pull = self._add_late("pull", 0.0)

    def _add_late(self, name, value):
        if not self.built:
            raise ValueError(f"{self.name}: build the model before its quantizers get a {name}")
        self._tracker.unlock()  # a built layer takes no variables otherwise
        try:
            return self.add_state(name, value)
        finally:
            self._tracker.lock()

    @property
    def enabled(self) -> bool:
        """Whether reals are quantized now."""
        if self.switch is None:
            return self._initially_enabled
        return bool(ops.convert_to_numpy(self.switch) > 0.5)

    def set_enabled(self, enabled: bool) -> None:
        """Switch quantization on or off; compiled steps see it.

        Raises:
            ValueError: off, without a switch.
        """
        if self.switch is not None:
            self.switch.assign(float(enabled))
        elif not enabled:
            raise ValueError(
                f"{self.path or self.name} has no switch: call add_switch() before the model is "
                "compiled"
            )

    def _check_enabled(self):
        # What an exporter reads of every quantizer asks here: reals never pass for codes.
        if not self.enabled:
            raise ValueError(
                f"{self.path or self.name}: quantization is switched off, so there are no codes "
                "to export. Train to the stage that quantizes it, or call set_enabled(True)"
            )
