"""`Optimizer`: the base class of all optimizers, and the registry of their names."""

from __future__ import annotations

from .optimizer import Optimizer as Optimizer
from .optimizer import create as create
from .optimizer import register as register
