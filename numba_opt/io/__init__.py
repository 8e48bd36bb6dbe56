"""Files: checkpoints of this package's own, and the states that MXNet wrote."""
