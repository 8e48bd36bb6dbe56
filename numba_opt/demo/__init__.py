"""The optimizers on real data: a network that reads digits, and embeddings of words.

Run it by ``numba-opt demo``. `digits` shows `Updater` at work on a model written in NumPy; `words` shows
`Optimizer.update` on the few rows of a large table that a batch touches. It needs the extra ``demo``.
"""

from __future__ import annotations

from pathlib import Path

from ..core import arguments

__all__ = ["PARTS", "run"]

PARTS = ("digits", "words")


def run(part: str = "all", out: str | Path = "demo", epochs: int | None = None, quiet: bool = False) -> None:
    """Run the demo, printing what it finds.

    Parameters
    ----------
    part : str, default "all"
        One of `PARTS`, or "all".
    out : path, default "demo"
        The folder that pictures are saved in; it is made if need be.
    epochs : int, optional
        Passes over the data, in place of each part's own number.
    quiet : bool, default False
        No progress bars.

    Raises
    ------
    ModuleNotFoundError
        A package of the extra ``demo`` is missing.
    """
    if part not in (*PARTS, "all"):
        raise ValueError(f"part must be one of {', '.join(PARTS)} or all, got {part!r}")
    if epochs is not None:
        arguments.count("epochs", epochs, 1)
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    from .digits import run as digits
    from .words import run as words

    # BLAS shares even small products among threads that wait by spinning. On two processors that others
    # used too this made the words 3 to 15 times slower than one thread. The optimizers keep their threads.
    with threadpool_limits(1, "blas"):
        if part != "words":
            digits(Path(out), epochs, quiet)
        if part == "all":
            print()
        if part != "digits":
            words(epochs, quiet)
