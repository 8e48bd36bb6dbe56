"""Optimizer update kernels for Python: plain scalar rules, run by Numba at the speed of memory."""

from __future__ import annotations

from . import contrib, lr_scheduler
from .cpu.row_sparse import RowSparse
from .io import checkpoint
from .optimizer import Optimizer, create, register
from .optimizers import FTML, NAG, Adamax, GroupAdaGrad, RMSProp
from .tools.warmup import warmup
from .trainer import Trainer
from .updater import Updater, get_updater

__all__ = [
    "FTML",
    "NAG",
    "Adamax",
    "GroupAdaGrad",
    "Optimizer",
    "RMSProp",
    "RowSparse",
    "Trainer",
    "Updater",
    "checkpoint",
    "contrib",
    "create",
    "get_updater",
    "lr_scheduler",
    "register",
    "warmup",
]

__version__ = "0.1.0"
