"""The parameters of well-known networks, by their shapes: what an optimizer sees of a model.

All in the order of the models' own `parameters()`, biases and normalisation included, so that the many
small tensors between the large ones are there as in life.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Shape = tuple[int, ...]


def resnet50() -> list[Shape]:
    """ResNet-50 for 1000 classes: 161 tensors, 25,557,032 parameters.

    K. He et al., "Deep residual learning for image recognition", CVPR 2016.
    """
    shapes: list[Shape] = _convolution(3, 64, 7)
    before = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            shapes += _convolution(before, width, 1)
            shapes += _convolution(width, width, 3)
            shapes += _convolution(width, 4 * width, 1)
            if block == 0:
                shapes += _convolution(before, 4 * width, 1)  # where the shortcut changes its width
            before = 4 * width
    return [*shapes, (1000, before), (1000,)]


def _convolution(before: int, after: int, size: int) -> list[Shape]:
    """A convolution without bias, then the scale and the shift of its batch normalisation."""
    return [(after, before, size, size), (after,), (after,)]


def gpt2_small() -> list[Shape]:
    """GPT-2 small, its head tied to the embedding: 148 tensors, 124,439,808 parameters.

    A. Radford et al., "Language models are unsupervised multitask learners", 2019.
    """
    width, shapes = 768, [(50257, 768), (1024, 768)]
    for _ in range(12):
        shapes += _norm(width)
        shapes += [(width, 3 * width), (3 * width,), (width, width), (width,)]  # attention
        shapes += _norm(width)
        shapes += [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [*shapes, *_norm(width)]


def bert_base() -> list[Shape]:
    """BERT base, uncased, with its pooler: 199 tensors, 109,482,240 parameters.

    J. Devlin et al., "BERT: pre-training of deep bidirectional transformers", NAACL 2019.
    """
    width = 768
    shapes: list[Shape] = [(30522, width), (512, width), (2, width), *_norm(width)]
    for _ in range(12):
        shapes += [(width, width), (width,)] * 4  # query, key, value, output
        shapes += _norm(width)
        shapes += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
        shapes += _norm(width)
    return [*shapes, (width, width), (width,)]


def _norm(width: int) -> list[Shape]:
    """The scale and the shift of a layer normalisation."""
    return [(width,), (width,)]


def total(shapes: Sequence[Shape]) -> int:
    """How many parameters there are."""
    return sum(map(math.prod, shapes))


MODELS: dict[str, tuple[Callable[[], list[Shape]], int]] = {
    "ResNet-50": (resnet50, 25_557_032),
    "GPT-2 small": (gpt2_small, 124_439_808),
    "BERT base": (bert_base, 109_482_240),
}


def model(name: str) -> list[Shape]:
    """The shapes of a model; its published number of parameters is checked."""
    make, parameters = MODELS[name]
    shapes = make()
    if total(shapes) != parameters:
        raise AssertionError(f"{name} has {total(shapes):,} parameters; expected {parameters:,}")
    return shapes
