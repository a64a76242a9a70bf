"""emit of graphopt."""
