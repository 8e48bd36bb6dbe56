"""What has no device and is not compiled: rules, the form that torch has of them, turns of callers."""
