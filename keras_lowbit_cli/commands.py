"""The commands, their flags and their help. Nothing here imports Keras."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from absl import flags

BACKENDS = ("tensorflow", "jax", "torch")
XLA = ("auto", "on", "off")
# Said again, as names of the library's own would import Keras before `--help`.
TARGETS = ("android", "builtin", "coral")
METHODS = ("mse", "minmax", "percentile")
WEIGHTS = ("int8", "int4", "int4_all")
TYPES = ("float32", "int8", "uint8")
_DATA = (
    'images: "digits", a keras.datasets name, a .npz (x_train, y_train, x_test, y_test) or a folder'
)
_OTHER_CODES = (
    "Exit code 1 if a code differs; then no file is written. --weights int4_all, whose kernels "
    "round otherwise, counts what differs, writes the file and ends with 0."
)


@dataclass(frozen=True)
class Command:
    """A sub-command.

    Args:
        name: as typed, one word or two.
        argument: the positional argument, in capitals; in brackets where it may be left out.
        summary: one line.
        details: a paragraph.
        define: adds the flags to an absl `FlagValues`.
        examples: command lines.
    """

    name: str
    argument: str
    summary: str
    details: str
    define: Callable[[flags.FlagValues], None]
    examples: tuple[str, ...]

    @property
    def function(self) -> str:
        """Name of the function in `keras_lowbit.cli.handlers`."""
        return self.name.replace(" ", "_")

    def flags(self) -> flags.FlagValues:
        """Fresh flags of this command; they are no part of absl's global ones."""
        values = flags.FlagValues()
        values.set_gnu_getopt(True)  # flags may stand behind the argument
        self.define(values)
        _string(values, "backend", None, "what computes (default: KERAS_BACKEND)", BACKENDS)
        flags.DEFINE_bool("debug", False, "show the traceback of errors", flag_values=values)
        flags.DEFINE_bool("help", False, "show this", short_name="h", flag_values=values)
        return values


def _string(values, name, default, text, choices=None):
    if choices:
        flags.DEFINE_enum(name, default, choices, text, flag_values=values)
    else:
        flags.DEFINE_string(name, default, text, flag_values=values)


def _count(values, name, default, text, least=0):
    flags.DEFINE_integer(name, default, text, lower_bound=least, flag_values=values)


def _bool(values, name, text):
    flags.DEFINE_bool(name, False, text, flag_values=values)


def _train(values):
    _string(values, "out", None, "folder for results (default: runs/<name of the recipe>)")
    _string(values, "data", None, f"in place of the recipe's data; {_DATA}")
    _string(values, "weights", None, "file with float weights, in place of the recipe's")
    _count(values, "epochs", None, "in place of the recipe's [train] epochs")
    _count(values, "seed", None, "in place of the recipe's seeds")
    xla = (
        "TensorFlow: compile whole steps, in place of the recipe's; some processors are faster off"
    )
    _string(values, "xla", None, xla, XLA)
    _bool(values, "tune", "measure on the held-out images; leave the test images alone")


def _quantize(values):
    _string(values, "scheme", "w8a8", "bits of kernels and activations, such as w4a8")
    _string(values, "data", None, f"calibration {_DATA}")
    _string(values, "out", None, "the .keras file to write")
    _string(values, "weights", None, "file with float weights, for an architecture")
    _count(values, "images", 512, "training images to calibrate on", 1)
    _string(values, "method", "mse", "how scales are found", METHODS)
    _bool(values, "packed", "write the release form: low-bit kernels as packed codes")
    _bool(values, "overwrite", "replace an existing file")


def _evaluate(values):
    _string(values, "data", None, _DATA)
    _count(values, "images", 0, "test images to use, the first ones; 0 for all")


def _export(values):
    _string(values, "out", None, "the .tflite file to write")
    _string(values, "target", "android", "where it runs", TARGETS)
    _containers(values)
    _count(values, "verify_images", 16, "images on which every code is compared; 0 for none")
    _string(values, "data", None, f"verify on training {_DATA} (default: noise)")
    _bool(values, "overwrite", "replace an existing file")


def _check(values):
    _string(values, "target", "android", "where it shall run", TARGETS)
    _containers(values)


def _containers(values):
    _string(values, "weights", "int8", "container of kernels", WEIGHTS)
    _string(values, "input_type", None, "uint8 takes raw pixels (default: by the model)", TYPES)
    _string(values, "output_type", "float32", "type of the file's outputs", TYPES)


def _no_flags(values):
    del values


COMMANDS = {
    command.name: command
    for command in (
        Command(
            "train",
            "CONFIG",
            "make the model of a TOML recipe: train, quantize, export, verify, measure",
            "Writes model.keras, the .tflite files, history.csv and metrics.json into --out. "
            "Started again after an interruption it goes on where it was.",
            _train,
            ("keras-lowbit train configs/digits_w4a4.toml --out runs/digits",),
        ),
        Command(
            "quantize",
            "MODEL",
            "quantize and calibrate a float model",
            "MODEL is a float .keras file, or the name of an architecture together with --weights.",
            _quantize,
            ("keras-lowbit quantize float.keras --scheme w8a8 --data images/ --out w8a8.keras",),
        ),
        Command(
            "evaluate",
            "FILE",
            "accuracy of a .keras (float, quantized, frozen) or a .tflite on test images",
            "Prints right answers and accuracy with its 95 % interval. A .tflite is run as it is. "
            "Pixels 0..255 become what the input was made for; reals of another range are refused, "
            "except by float models, which know no range.",
            _evaluate,
            ("keras-lowbit evaluate w8a8.tflite --data cifar10.npz",),
        ),
        Command(
            "export",
            "MODEL",
            "write a quantized .keras as a .tflite and compare every code",
            _OTHER_CODES,
            _export,
            ("keras-lowbit export w4a4.keras --out w4a4.tflite --weights int4 --data cifar10.npz",),
        ),
        Command(
            "check",
            "MODEL",
            "name every objection to exporting a .keras, before anyone trains it",
            "MODEL may be float or quantized. Exit code 1 if there are objections.",
            _check,
            ("keras-lowbit check float.keras --target builtin",),
        ),
        Command(
            "inspect",
            "FILE",
            "what is in a .keras or a .tflite: layers, bits, bytes",
            "Needs no data.",
            _no_flags,
            ("keras-lowbit inspect w4a4.tflite",),
        ),
        Command(
            "zoo list",
            "[PATTERN]",
            "released models: bits, accuracy, bytes",
            "PATTERN is that of a shell, in quotes; without one all are listed.",
            _no_flags,
            ("keras-lowbit zoo list 'resnet8*'",),
        ),
        Command(
            "zoo info",
            "NAME",
            "what is known about a released model",
            "Names are those of `keras-lowbit zoo list`.",
            _no_flags,
            ("keras-lowbit zoo info resnet8_cifar10_w4a4",),
        ),
        Command(
            "zoo export",
            "NAME",
            "write a released model as a .tflite and compare every code",
            f"{_OTHER_CODES} A model that does not ship with the package comes from the cache, or "
            "from the URL in KERAS_LOWBIT_URL.",
            _export,
            ("keras-lowbit zoo export resnet8_cifar10_w4a4 --out resnet8.tflite --weights int4",),
        ),
    )
}

EXIT_CODES = (
    "Exit codes: 0 done; 1 a check failed (wrong codes, objections, training that broke); "
    "2 bad input; 130 interrupted; 143 terminated."
)


def group(word: str) -> list[Command]:
    """Commands of two words whose first one is `word`."""
    return [command for name, command in COMMANDS.items() if name.startswith(f"{word} ")]


def overview(commands: Iterable[Command] = COMMANDS.values()) -> str:
    """Text of `keras-lowbit --help`, or of the help of a group."""
    commands = list(commands)
    width = max(len(f"{c.name} {c.argument}") for c in commands)
    lines = [f"  {f'{c.name} {c.argument}':<{width}}  {c.summary}" for c in commands]
    return "\n".join(
        [
            "keras-lowbit: low-bit Keras models whose trained integers are the phone's.",
            "",
            "usage: keras-lowbit COMMAND ARGUMENT [flags]",
            "",
            *lines,
            "",
            "keras-lowbit COMMAND --help lists a command's flags; --version tells the version.",
            *textwrap.wrap(EXIT_CODES, 96),
        ]
    )


def help_of(command: Command) -> str:
    """Text of `keras-lowbit COMMAND --help`."""
    values = command.flags()
    lines = [
        f"usage: keras-lowbit {command.name} {command.argument} [flags]",
        "",
        *textwrap.wrap(f"{command.summary[0].upper()}{command.summary[1:]}.", 96),
        *textwrap.wrap(command.details, 96),
        "",
        "flags:",
    ]
    names = [name for name in values if name != "h"]
    last = ("backend", "debug", "help")
    for name in (*(n for n in names if n not in last), *last):
        lines += _flag_lines(values[name])
    lines += ["", *(f"example: {line}" for line in command.examples), ""]
    return "\n".join([*lines, *textwrap.wrap(EXIT_CODES, 96)])


def _flag_lines(flag):
    kinds = {"bool": "", "int": " N", "string": " TEXT"}
    kind = kinds.get(flag.flag_type(), "")
    if isinstance(flag, flags.EnumFlag):
        kind = " " + "|".join(flag.parser.enum_values)
    head = f"  --{flag.name}{kind}"
    text = flag.help
    if isinstance(flag, flags.EnumFlag):
        text = text.partition(">: ")[2]  # absl puts the choices in front
    if flag.default is not None and flag.flag_type() != "bool":
        text += f" (default: {flag.default})"
    wrapped = textwrap.wrap(text, 66)
    if len(head) > 28:
        return [head, *(f"{'':30}{line}" for line in wrapped)]
    return [f"{head:<30}{wrapped[0]}", *(f"{'':30}{line}" for line in wrapped[1:])]
