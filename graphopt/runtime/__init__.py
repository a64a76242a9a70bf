"""runtime of graphopt."""
