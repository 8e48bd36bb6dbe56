"""What people do with the package beside training: the command line, warming up, information, benchmarks."""
