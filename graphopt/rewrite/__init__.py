"""rewrite of graphopt."""
