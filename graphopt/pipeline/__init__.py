"""pipeline of graphopt."""
