"""Accuracy of a released model on test images, measured by running its exported file.

python zoo/evaluate.py resnet8_cifar10_w4a4 --data cifar10.npz [--weights int8] [--images N]
"""

from __future__ import annotations

import argparse

import numpy as np

import tflite_export
from keras_lowbit import data, zoo
from keras_lowbit.cli import measure
from keras_lowbit.cli.pixels import Intake
from tflite_export import runtime


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", default="int8", choices=("int8", "int4", "int4_all"))
    parser.add_argument("--images", type=int, default=0, help="the first ones; 0 for all")
    arguments = parser.parse_args()
    entry = zoo.info(arguments.name)
    dataset = data.load(arguments.data, size=entry.input_shape[0], channels=entry.input_shape[-1])
    count = arguments.images or len(dataset.x_test)
    x, y = np.asarray(dataset.x_test[:count]), np.asarray(dataset.y_test[:count])
    content = tflite_export.convert(zoo.load(entry.name), weights=arguments.weights).content
    print(entry)
    intake = Intake.of_file(content)
    answers = measure.file_answers(runtime.Session(content), x, intake=intake)
    print(f"{arguments.weights} file: {measure.shown(measure.score(answers, y))}")


if __name__ == "__main__":
    main()
