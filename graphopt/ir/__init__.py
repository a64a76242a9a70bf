"""ir of graphopt."""
