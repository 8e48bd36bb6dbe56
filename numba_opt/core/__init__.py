"""The parts with no device and no compiled code: rules, the form that torch has of them, turns of callers."""
