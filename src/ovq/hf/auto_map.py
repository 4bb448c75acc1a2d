"""Lets transformers find these classes in a process that has not imported `ovq.hf`.

The `auto_map` of a saved config names classes of a module in the same folder. The Auto classes import that
module if `trust_remote_code=True` is passed; it only imports `ovq.hf`. A copy of the model's code would need
no package, but would miss later fixes, and a process could hold two classes of the same name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MODULE_FILE = "modeling_ovq.py"
"""Name of the module in the folder of a saved config or model."""

AUTO_MAP = {
    "AutoConfig": "modeling_ovq.OVQConfig",
    "AutoModel": "modeling_ovq.OVQModel",
    "AutoModelForCausalLM": "modeling_ovq.OVQForCausalLM",
}
"""The `auto_map` of a saved config."""

# In a try statement, because transformers checks other imports itself: its message would say
# `pip install ovq`, whether or not the index has the package.
MODULE = '''"""Lets `trust_remote_code=True` load this model. All code is in the Python package `ovq`."""

try:
    from ovq.hf import OVQConfig, OVQForCausalLM, OVQModel
except ModuleNotFoundError as error:
    raise ImportError(
        f"expected the Python package ovq to be installed, which this model needs, found: {error}"
    ) from error

__all__ = ["OVQConfig", "OVQForCausalLM", "OVQModel"]
'''


def without_own_entries(auto_map: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a saved `auto_map` that differ from `AUTO_MAP`, such as those of a derived class.

    Example:
        >>> without_own_entries(AUTO_MAP | {"AutoModel": "mine.Model"})
        {'AutoModel': 'mine.Model'}
        >>> without_own_entries({"AutoConfig": "someone/model--modeling_ovq.OVQConfig"})
        {}
    """
    # transformers puts the repository before the two hyphens.
    return {name: ref for name, ref in auto_map.items() if str(ref).split("--")[-1] != AUTO_MAP.get(name)}
