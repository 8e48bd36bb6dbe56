"""The loops that own the memory, and what they are made of. Rules live with their optimizers."""
