"""Recovery by distillation: a smaller model is trained to compute what the original computes, without labels.

Importing this package does not import torch; `graphopt.distill.recover.distill` does, when it is called.
"""
