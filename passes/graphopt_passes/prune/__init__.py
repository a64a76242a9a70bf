"""Pruning: zeros among the weights, whole channels, and what can go without any loss."""

from graphopt_passes.prune.prune import Prune

__all__ = ["Prune"]
