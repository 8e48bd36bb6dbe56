"""Learning-rate schedules: the learning rate as a function of the number of updates.

What belongs here: schedulers, which are pure Python and know nothing of optimizers, arrays or
devices. An optimizer calls ``scheduler(num_update)`` before each update.

The constructors are those of MXNet 2.0, and so are the values in the order of a training run.
Unlike MXNet's, a scheduler here never changes itself: its value depends only on ``num_update``
and on its attributes, which are exactly its constructor's arguments. So one scheduler can be
shared between optimizers, asked about any update in any order, resumed in the middle of a run,
and rebuilt with ``type(scheduler)(**vars(scheduler))``. MXNet's running state (``count``,
``cur_step_ind``, ``base_lr_orig``, ``warmup_final_lr``, ``max_steps``) is gone, its ``power`` is
``pwr`` as in the constructor, and nothing is logged.
"""

from __future__ import annotations

from .base import LRScheduler
from .decays import CosineScheduler, PolyScheduler
from .steps import FactorScheduler, MultiFactorScheduler

__all__ = [
    "CosineScheduler",
    "FactorScheduler",
    "LRScheduler",
    "MultiFactorScheduler",
    "PolyScheduler",
]
