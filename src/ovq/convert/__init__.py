"""Any pretrained decoder in constant memory: slots, sinks and a window instead of a growing KV cache.

    model = AutoModelForCausalLM.from_pretrained(NAME)
    model = ovq.convert.attach(model, num_slots=256, window=256, num_sinks=4)
    model.save_pretrained("converted")
    model = ovq.convert.load("converted")

`docs/use/convert.md` says what this costs, `docs/results/convert.md` how that was measured. `memory.py` is
where to start reading.
"""

from ovq.convert.attach import ConvertedMixin, attach, load
from ovq.convert.cache import MemoryCache
from ovq.convert.captures import Captures
from ovq.convert.config import MemoryConfig
from ovq.convert.masses import fitted_bias
from ovq.convert.probe import Probe, default_options, probe
from ovq.convert.trials import Option
from ovq.hf.context import build_context, load_context, save_context
from ovq.hf.context_file import context_info
from ovq.hidden_values import hidden_numbers

__all__ = [
    "Captures",
    "ConvertedMixin",
    "MemoryCache",
    "MemoryConfig",
    "Option",
    "Probe",
    "attach",
    "build_context",
    "context_info",
    "default_options",
    "fitted_bias",
    "hidden_numbers",
    "load",
    "load_context",
    "probe",
    "save_context",
]
