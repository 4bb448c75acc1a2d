"""A little training for converted models: first heads by their outputs, then the model by its logits.

`run.py` is where to start reading; `heads.py` and `logits.py` are the two stages.
"""

from ovq.convert.adapt.run import AdaptProgress, adapt
from ovq.convert.adapt.settings import PRESETS, AdaptSettings

__all__ = ["PRESETS", "AdaptProgress", "AdaptSettings", "adapt"]
