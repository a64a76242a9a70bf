"""The compiler driver: one run from source to verified output."""

from graphopt.driver.api import optimize
from graphopt.driver.request import Request, VerifyMode
from graphopt.driver.result import Result

__all__ = ["Request", "Result", "VerifyMode", "optimize"]
