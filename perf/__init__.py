"""Benchmarks of numba_opt beside its competitors: ``python -m perf``.

`workloads` says what is updated, `competitors` by whom, `bare` what the memory allows, `harness` how it
is timed, `goals` what it must reach, `report` how it is written down. Nothing here is shipped.
"""
