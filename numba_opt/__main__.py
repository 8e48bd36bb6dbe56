"""``python -m numba_opt``: the same as the command ``numba-opt``."""

from .tools.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
