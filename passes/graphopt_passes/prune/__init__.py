"""Pruning: zeros among the weights, whole channels, and what can go without any loss."""

from graphopt_passes.prune.prune import Prune
from graphopt_passes.prune.sweep import SweepChannels
from graphopt_passes.prune.traces import DropTraces

__all__ = ["DropTraces", "Prune", "SweepChannels"]
