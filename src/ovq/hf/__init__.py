"""OVQ models for Hugging Face transformers. Importing this registers them with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ovq.hf.assignments import model_assignments
from ovq.hf.cache import OVQCache
from ovq.hf.configuration_ovq import OVQConfig
from ovq.hf.context import Context, build_context, load_context, save_context
from ovq.hf.context_file import ContextInfo, context_info
from ovq.hf.modeling_ovq import OVQForCausalLM, OVQModel

AutoConfig.register(OVQConfig.model_type, OVQConfig)
AutoModel.register(OVQConfig, OVQModel)
AutoModelForCausalLM.register(OVQConfig, OVQForCausalLM)
# By these names alone, the Trainer knows whose labels it has to shift for label smoothing, and pipelines know
# what they support.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[OVQConfig.model_type] = OVQForCausalLM.__name__

__all__ = [
    "Context",
    "ContextInfo",
    "OVQCache",
    "OVQConfig",
    "OVQForCausalLM",
    "OVQModel",
    "build_context",
    "context_info",
    "load_context",
    "model_assignments",
    "save_context",
]
