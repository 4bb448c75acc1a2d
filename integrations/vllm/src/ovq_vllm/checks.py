"""Checks of models and engine settings before anything is loaded; errors name the setting and the reason."""

from __future__ import annotations

from transformers import PreTrainedConfig
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import MambaModelConfig, VerifyAndUpdateConfig

from ovq.convert import MemoryConfig
from ovq.convert.config import CONFIG_KEY
from ovq.convert.step import checked_weight_dtype
from ovq.hf import OVQConfig
from ovq.layers import mixer_class
from ovq.layers.constant import ConstantStateMixer

logger = init_logger("vllm.ovq")

#: Supported mixers, besides those with a state of constant size.
MIXERS = ("ovq", "sliding_attention", "full_attention")

#: Default `--block-size` of converted models with prefix caching: a state is kept after so many tokens.
BLOCK_SIZE = 128

#: Field of vLLM's `--additional-config` with the weight format of a converted model.
WEIGHT_DTYPE = "weight_dtype"


class StartChecks(VerifyAndUpdateConfig):
    """vLLM's config hook of a model; runs in the process that starts the engine, before any worker."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Raise ValueError if the model cannot run; turn off prefix caching unless in mode `align`."""
        check_model(vllm_config.model_config.hf_config)
        check_engine(vllm_config)
        if (found := weight_dtype_of(vllm_config)) is not None:
            raise ValueError(f"{WEIGHT_DTYPE}: expected none for a trained model, found {found!r}")


class ConvertedStartChecks(VerifyAndUpdateConfig):
    """`StartChecks` for converted models."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Raise ValueError if the model cannot run; turn off prefix caching unless in mode `align`."""
        memory_config_of(vllm_config.model_config.hf_config)
        check_engine(vllm_config)
        weight_dtype_of(vllm_config)
        cache = vllm_config.cache_config
        if cache.enable_prefix_caching and not cache.user_specified_block_size:
            # vLLM's default of 16 is meant for keys and values; a state per 16 tokens would take MiB.
            cache.block_size = BLOCK_SIZE
        MambaModelConfig.verify_and_update_config(vllm_config)


def memory_config_of(config: PreTrainedConfig) -> MemoryConfig:
    """The memory config of a converted model, from the model's config.

    Raises:
        ValueError: it is invalid.
    """
    return MemoryConfig.from_dict(getattr(config, CONFIG_KEY))


def weight_dtype_of(vllm_config: VllmConfig) -> str | None:
    """Weight format of a converted model, as `ovq.convert.attach` takes it.

    Raises:
        ValueError: the format is unknown.
    """
    given = vllm_config.additional_config
    return checked_weight_dtype(given.get(WEIGHT_DTYPE) if isinstance(given, dict) else None)


def check_engine(vllm_config: VllmConfig) -> None:
    """Raise ValueError for unsupported engine settings; turn off prefix caching unless in mode `align`."""
    cache, wrong = vllm_config.cache_config, []
    for name, reason in (
        ("tensor_parallel_size", "the heads of the library's layers are not split over processes"),
        ("pipeline_parallel_size", "each process has all layers"),
    ):
        if (found := getattr(vllm_config.parallel_config, name)) > 1:
            wrong.append(f"{name}: expected 1, found {found}: {reason}")
    if vllm_config.speculative_config is not None:
        wrong.append(
            "speculative_config: expected none, found one: rejected tokens cannot be taken out of a state"
        )
    if vllm_config.quant_config is not None or vllm_config.model_config.quantization:
        wrong.append("quantization: expected none, found some: the layers are those of the library")
    if vllm_config.lora_config is not None:
        wrong.append("lora_config: expected none, found one: the layers are those of the library")
    if cache.enable_prefix_caching and cache.prefix_match_unit is not None:
        wrong.append(
            f"prefix_match_unit: expected none, found {cache.prefix_match_unit}: states are kept only at the "
            "ends of blocks"
        )
    if cache.cache_dtype not in ("auto", "float16", "bfloat16", "float32"):
        wrong.append(
            f"kv_cache_dtype: expected 'auto', found {cache.cache_dtype!r}: narrower keys are untested, and "
            "states are float32 anyway"
        )
    if wrong:
        raise ValueError("; ".join(wrong))
    if cache.enable_prefix_caching and cache.mamba_cache_mode != "align":
        cache.enable_prefix_caching = False
        logger.info(
            "Prefix caching is off for OVQ models, as each block that is kept has a whole state, MiB per "
            "layer: --mamba-cache-mode align turns it on."
        )


def check_model(config: OVQConfig) -> None:
    """Raise ValueError unless the plugin supports all layers of a model."""
    others = sorted(set(config.mixer_types) - set(MIXERS))
    if refused := [name for name in others if not issubclass(mixer_class(name), ConstantStateMixer)]:
        raise ValueError(
            f"expected mixer_types among {MIXERS}, or with a state of constant size (mamba2, gated_deltanet, "
            f"...), found {refused}: the plugin has no state blocks for them; `ovq serve` runs all mixers"
        )
    if "ovq" not in config.mixer_types:
        raise ValueError(
            f"expected at least one layer 'ovq', found mixer_types {config.mixer_types}: what other layers "
            "keep besides keys is kept with the states of OVQ layers"
        )
