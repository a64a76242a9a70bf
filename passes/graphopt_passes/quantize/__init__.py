"""Quantisation: what may be stored in few bits on each runtime, with which parameters, and proof that it pays."""
