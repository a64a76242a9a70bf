"""The rewrites that ship with graphopt."""
