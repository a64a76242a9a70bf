"""verify of graphopt."""
