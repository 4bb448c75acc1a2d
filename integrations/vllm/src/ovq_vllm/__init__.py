"""vLLM plugin for OVQ language models: vLLM calls `register` through the entry point of this package."""


def register() -> None:
    """Register the models, the backend that builds the metadata of their states, and the checks at start."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum, register_backend

    # Adds the model to the Auto classes, with which vLLM reads the config.
    import ovq.hf
    from ovq_vllm.checks import ConvertedStartChecks, StartChecks
    from ovq_vllm.detect import CONVERTED, detect_converted

    own = ovq.hf.OVQForCausalLM.__name__
    ModelRegistry.register_model(own, "ovq_vllm.model:OVQForCausalLM")
    ModelRegistry.register_model(CONVERTED, "ovq_vllm.converted:OVQConvertedForCausalLM")
    register_backend(MambaAttentionBackendEnum.CUSTOM, "ovq_vllm.step.StateBackend", is_mamba=True)
    MODELS_CONFIG_MAP[own] = StartChecks
    MODELS_CONFIG_MAP[CONVERTED] = ConvertedStartChecks
    detect_converted()
