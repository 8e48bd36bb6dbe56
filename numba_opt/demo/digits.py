"""A network of one hidden layer, in NumPy, that learns to read handwritten digits with each optimizer."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from tqdm import tqdm

import numba_opt

from .curves import plot

EPOCHS = 40
HIDDEN = 128
BATCH = 64
RATES = {"NAG": 0.1, "RMSProp": 0.002, "Adamax": 0.01, "FTML": 0.01, "GroupAdaGrad": 0.05}


class Data(NamedTuple):
    """Images as rows of numbers from 0 to 1, and the digits that they show."""

    images: np.ndarray
    digits: np.ndarray


class Result(NamedTuple):
    """The result of one optimizer."""

    losses: list[float]  # on the training images, after 0, 1, ... epochs
    accuracy: float  # on the test images
    seconds: float  # of the optimizer, in the median step


def run(out: Path, epochs: int | None = None, quiet: bool = False) -> dict[str, Result]:
    """Train the network with each optimizer; print a table and save a picture of the losses.

    Parameters
    ----------
    out : Path
        The folder for the picture, ``digits.png``.
    epochs : int, optional
        Passes over the training images.
    quiet : bool, default False
        No progress bars.

    Returns
    -------
    dict of str to Result
        By the optimizers' names.
    """
    out.mkdir(parents=True, exist_ok=True)
    training, test = load()
    print(f"{len(training.images)} handwritten digits to learn from, {len(test.images)} to be tested on;")
    print(f"a network of {sum(weight.size for weight in network()):,} weights, in two matrices\n")
    print(f"{'optimizer':<14}{'final loss':>12}{'test accuracy':>16}{'us per step':>14}")
    results = {}
    for name, rate in RATES.items():
        found = results[name] = train(name, rate, training, test, epochs or EPOCHS, quiet)
        print(f"{name:<14}{found.losses[-1]:12.4f}{found.accuracy:16.3f}{found.seconds * 1e6:14.1f}")
    path = out / "digits.png"
    plot({name: found.losses for name, found in results.items()}, path)
    print(f"\nloss curves in {path}")
    return results


def load() -> tuple[Data, Data]:
    """Scikit-learn's digits, 8 by 8 pixels: four fifths to learn from, the rest for the test."""
    images, digits = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    first, rest = np.split(order, [len(order) * 4 // 5])
    images = (images / 16).astype(np.float32)
    return Data(images[first], digits[first]), Data(images[rest], digits[rest])


def train(
    optimizer: str, rate: float, training: Data, test: Data, epochs: int, quiet: bool = False, **options: Any
) -> Result:
    """Train a network from the same beginning, whatever the optimizer; `options` are its constructor's."""
    rng = np.random.default_rng(1)
    weights = network()
    trainer = numba_opt.Trainer(weights, optimizer, learning_rate=rate, **options)
    losses, seconds = [loss(weights, training)], []
    for _ in tqdm(range(epochs), optimizer, leave=False, disable=quiet or None):
        order = rng.permutation(len(training.images))
        for batch in np.array_split(order, len(order) // BATCH):
            gradients = backward(weights, training.images[batch], training.digits[batch])
            began = time.perf_counter()
            trainer.step(gradients)
            seconds.append(time.perf_counter() - began)
        losses.append(loss(weights, training))
    right = forward(weights, test.images)[-1].argmax(axis=1) == test.digits
    return Result(losses, float(right.mean()), float(np.median(seconds)))


# ---------------------------------------------------------------- the network


def network(hidden: int = HIDDEN) -> list[np.ndarray]:
    """The weights of both layers, before training."""
    rng = np.random.default_rng(0)
    return [layer(rng, 64, hidden), layer(rng, hidden, 10)]


def layer(rng: np.random.Generator, inputs: int, outputs: int) -> np.ndarray:
    """Weights of a layer; the last row is its bias."""
    weight = rng.normal(0, math.sqrt(2 / inputs), (inputs + 1, outputs))
    weight[-1] = 0
    return weight.astype(np.float32)


def with_one(x: np.ndarray) -> np.ndarray:
    """A column of ones put after the last, for the bias."""
    return np.hstack([x, np.ones((len(x), 1), x.dtype)])


def forward(weights: list[np.ndarray], images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what goes into the first layer, what goes into the second, and the digits' probabilities."""
    inputs = with_one(images)
    hidden = with_one(np.maximum(inputs @ weights[0], 0))
    scores = hidden @ weights[1]
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return inputs, hidden, powers / powers.sum(axis=1, keepdims=True)


def backward(weights: list[np.ndarray], images: np.ndarray, digits: np.ndarray) -> list[np.ndarray]:
    """The gradients of the mean cross-entropy."""
    inputs, hidden, probabilities = forward(weights, images)
    d_scores = (probabilities - np.eye(10, dtype=images.dtype)[digits]) / len(images)
    d_hidden = (d_scores @ weights[1].T) * (hidden > 0)
    return [inputs.T @ d_hidden[:, :-1], hidden.T @ d_scores]


def loss(weights: list[np.ndarray], data: Data) -> float:
    """The mean cross-entropy."""
    right = forward(weights, data.images)[-1][np.arange(len(data.digits)), data.digits]
    return float(-np.log(right + 1e-12).mean())
