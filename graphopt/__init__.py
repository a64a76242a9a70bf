"""graphopt of graphopt."""
