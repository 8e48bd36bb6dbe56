"""Embeddings of the words that programmers write: skip-gram with negative sampling, by GroupAdaGrad.

The text is the source of Python's own standard library, found on every machine. A batch touches only some
rows of the two tables of vectors, often more than once, so a gradient is a `numba_opt.RowSparse`.
"""

from __future__ import annotations

import re
import sysconfig
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import expit
from tqdm import tqdm

import numba_opt

EPOCHS = 5
RATE = 0.2
ASKED = ("thread", "socket", "path", "read", "encode", "month", "warning", "width", "parent", "subprocess")

WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")  # ends at underscores and where camelCase turns
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data"}
SKIPPED |= {"site-packages", "dist-packages"}
LONGEST = 1_000_000  # the text is cut off after so many words
RAREST = 20  # words seen less often are left out
FREQUENT = 1e-4  # words that make up more of the text than this are thinned out

SIZE = 64  # of a vector
WINDOW = 5  # words further apart make no pair
BATCH = 4096
NOISE = 64  # noisy words, drawn for a whole batch
NEGATIVES = 5.0  # what they weigh together, for each pair


class Text(NamedTuple):
    """A text as numbers of words, and the words, the most frequent first."""

    numbers: np.ndarray
    words: list[str]
    counts: np.ndarray


def run(epochs: int | None = None, quiet: bool = False, root: Path | None = None) -> dict[str, list[str]]:
    """Learn the vectors; print the neighbours of some words.

    Parameters
    ----------
    epochs : int, optional
        Passes over the text.
    quiet : bool, default False
        No progress bars.
    root : Path, optional
        A folder of Python files; the standard library's by default.

    Returns
    -------
    dict of str to list of str
        The nearest neighbours of each of `ASKED` that the text holds.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    text = encode(read(root))
    if len(text.words) < 2:
        raise FileNotFoundError(f"found no Python source to learn from in {root}")
    print(f"{len(text.numbers):,} words of source code in {root}, {len(text.words):,} of them different")
    began = time.perf_counter()
    vectors, losses = train(text, epochs or EPOCHS, quiet)
    seconds = time.perf_counter() - began
    print(f"loss of an epoch from {losses[0]:.3f} to {losses[-1]:.3f} in {seconds:.0f} s\n")
    print("nearest neighbours")
    found = {word: neighbours(vectors, text.words, word) for word in ASKED if word in text.words}
    for word, near in found.items():
        print(f"{word:>12}: {', '.join(near)}")
    return found


# ---------------------------------------------------------------- the text


def read(root: Path) -> Iterator[str]:
    """The words in the Python files below a folder, files in order of their paths."""
    for path in sorted(root.rglob("*.py")):
        if SKIPPED.isdisjoint(path.relative_to(root).parts):
            found = WORD.findall(path.read_text("utf-8", errors="replace"))
            yield from (word.lower() for word in found if len(word) > 1)


def encode(words: Iterable[str]) -> Text:
    """The beginning of a text, its words replaced by numbers and rare ones left out."""
    text = list(islice(words, LONGEST))
    counts = {word: count for word, count in Counter(text).most_common() if count >= RAREST}
    number = {word: i for i, word in enumerate(counts)}
    numbers = np.array([number[word] for word in text if word in number])
    return Text(numbers, list(counts), np.array(list(counts.values())))


def pairs(text: Text, rng: np.random.Generator) -> np.ndarray:
    """Pairs of words that stand close to each other, both ways round, in random order."""
    kept = np.sqrt(FREQUENT * len(text.numbers) / text.counts)  # the chance of each word
    numbers = text.numbers[rng.random(len(text.numbers)) < kept[text.numbers]]
    found = []
    for distance in range(1, WINDOW + 1):
        pair = np.stack([numbers[:-distance], numbers[distance:]])
        chosen = rng.random(pair.shape[1]) < 1 - (distance - 1) / WINDOW
        found += [pair[:, chosen], pair[::-1, chosen]]
    return rng.permutation(np.hstack(found), axis=1)


# ---------------------------------------------------------------- the model


def train(text: Text, epochs: int, quiet: bool = False) -> tuple[np.ndarray, list[float]]:
    """Learn a vector for each word. Returns them and the mean losses of the epochs."""
    rng = np.random.default_rng(0)
    shape = (len(text.words), SIZE)
    tables = [rng.uniform(-0.5 / SIZE, 0.5 / SIZE, shape).astype(np.float32), np.zeros(shape, np.float32)]
    trainer = numba_opt.Trainer(tables, "groupadagrad", learning_rate=RATE)
    chances = np.cumsum(text.counts**0.75)
    losses = []
    for epoch in range(epochs):
        found = pairs(text, rng)
        batches = np.array_split(found, -(-found.shape[1] // BATCH), axis=1)
        total = 0.0
        for words, contexts in tqdm(
            batches, f"epoch {epoch + 1} of {epochs}", leave=False, disable=quiet or None
        ):
            noise = np.searchsorted(chances, rng.uniform(0, chances[-1], NOISE))
            loss, gradients = skip_gram(tables, words, contexts, noise)
            trainer.step(gradients)
            total += loss
        losses.append(total / len(batches))
    return tables[0], losses


def skip_gram(
    tables: list[np.ndarray], words: np.ndarray, contexts: np.ndarray, noise: np.ndarray
) -> tuple[float, list[numba_opt.RowSparse]]:
    """The loss of telling words' true contexts from noise, and its gradient for each table."""
    vectors, true, false = tables[0][words], tables[1][contexts], tables[1][noise]
    weight = np.float32(NEGATIVES / len(noise))
    said_true = expit(np.einsum("ij,ij->i", vectors, true))
    said_false = expit(vectors @ false.T)
    loss = -np.log(said_true + 1e-7).mean() - weight * np.log(1 - said_false + 1e-7).sum(axis=1).mean()
    d_true, d_false = (said_true - 1)[:, None], said_false * weight
    d_vectors = d_true * true + d_false @ false
    d_contexts = np.concatenate([d_true * vectors, d_false.T @ vectors])
    return float(loss), [
        numba_opt.RowSparse(words, d_vectors, tables[0].shape),
        numba_opt.RowSparse(np.concatenate([contexts, noise]), d_contexts, tables[1].shape),
    ]


def neighbours(vectors: np.ndarray, words: Sequence[str], word: str, count: int = 7) -> list[str]:
    """The words whose vectors have the smallest angles with a word's, the nearest first."""
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    near = np.argsort(-(units @ units[words.index(word)]))
    return [words[i] for i in near if words[i] != word][:count]
