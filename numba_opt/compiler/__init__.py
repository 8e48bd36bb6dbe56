"""The loops that own the memory, and what they are made of. Rules live with their optimizers."""

import numba


def require_compiler(error: type[Exception]) -> None:
    """Raise an error if Numba has been told to compile nothing."""
    if numba.config.DISABLE_JIT:
        raise error(
            "numba_opt needs Numba's compiler: unset NUMBA_DISABLE_JIT, or numba.config.DISABLE_JIT in Python"
        )


require_compiler(ImportError)
