"""The CPU: NumPy's arrays read in bulk, the loops over them, the threads that share these, and steps."""
