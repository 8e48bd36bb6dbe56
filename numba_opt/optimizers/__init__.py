"""The optimizers: one file each, with its rules, its class, and the form that torch has of it.

A new one is a file here and a line below.
"""

from __future__ import annotations

from .adamax import Adamax
from .ftml import FTML
from .group_adagrad import GroupAdaGrad
from .nag import NAG
from .rmsprop import RMSProp

__all__ = ["FTML", "NAG", "Adamax", "GroupAdaGrad", "RMSProp"]
