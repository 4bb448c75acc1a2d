"""Presets: memory configs found by a probe of a pretrained model, to convert the same model without a probe.

A preset is a folder with `preset.json`, `preset.safetensors` and a card. Those in this folder come with the
package.
"""

from ovq.convert.presets.preset import (
    Preset,
    find_preset,
    load_preset,
    packaged_presets,
    presets_of,
    save_preset,
)

__all__ = [
    "Preset",
    "find_preset",
    "load_preset",
    "packaged_presets",
    "presets_of",
    "save_preset",
]
