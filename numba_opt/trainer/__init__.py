"""`Trainer`: parameters bound once, stepped many times."""

from __future__ import annotations

from .trainer import Trainer as Trainer
