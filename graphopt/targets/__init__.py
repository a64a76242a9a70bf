"""targets of graphopt."""
