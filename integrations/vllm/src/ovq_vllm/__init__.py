"""Runs OVQ language models on vLLM's engine: vLLM finds `register` by the entry point of this package."""


def register() -> None:
    """Tell vLLM of the models, of the metadata of their states, and of what to check before it starts."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum, register_backend

    # With the Auto classes, so that vLLM can read the config.
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
