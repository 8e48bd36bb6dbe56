"""Utilities beside training: the command line, warming up, information, benchmarks."""
