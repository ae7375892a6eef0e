"""From a model to a plan: capture, strategies, bounds. Runs nothing; knows no picture."""

from .planner import Planner

__all__ = ["Planner"]
