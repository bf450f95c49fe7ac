"""Whatever prompt, layout and knobs the engine is given."""

from hostile_checks import *  # noqa: F403
