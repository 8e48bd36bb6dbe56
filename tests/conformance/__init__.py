"""What every backend promises: the same results, whatever runs an optimizer and whatever a gradient is."""
