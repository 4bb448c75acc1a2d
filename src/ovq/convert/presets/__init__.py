"""Presets: memories of pretrained models as a probe has found them, for everyone who converts the same model.

A preset is a folder of two files, `preset.json` and `preset.safetensors`, and a card. Those in this folder
come with the package.
"""

from ovq.convert.presets.card import preset_card
from ovq.convert.presets.preset import (
    MAX_MISMATCH,
    Preset,
    find_preset,
    load_preset,
    packaged_presets,
    presets_of,
    save_preset,
)

__all__ = [
    "MAX_MISMATCH",
    "Preset",
    "find_preset",
    "load_preset",
    "packaged_presets",
    "preset_card",
    "presets_of",
    "save_preset",
]
