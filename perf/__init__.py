"""Benchmarks of numba_opt beside its competitors: ``python -m perf``.

`workloads` says what is done, `competitors` by whom, with a module for each library; `bare` what the memory
allows; `harness` how it is timed; `goals` what must be reached; `report` and `pictures` how it is shown.
Nothing here is shipped.
"""
