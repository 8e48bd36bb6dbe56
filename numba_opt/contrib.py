"""The optimizers that MXNet keeps in `mxnet.optimizer.contrib`."""

from __future__ import annotations

from .optimizers.group_adagrad import GroupAdaGrad

__all__ = ["GroupAdaGrad"]
