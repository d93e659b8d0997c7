"""How a model trains in the memory there is: what a step takes by each method, counted without allocating it."""

from .answer import Fit, Row, fit, parse_memory
from .methods import METHODS

__all__ = ["METHODS", "Fit", "Row", "fit", "parse_memory"]
