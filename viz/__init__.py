"""Draws timelines, comparisons and sweeps. Imports no planner.

`save_timeline`, `save_comparison` and `save_sweep` write PNG or SVG; `save_trace` writes JSON for Perfetto.
"""

from .compare import save_comparison
from .sweep import save_sweep
from .timeline import save_timeline
from .trace import save_trace

__all__ = ["save_comparison", "save_sweep", "save_timeline", "save_trace"]
