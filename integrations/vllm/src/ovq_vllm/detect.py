"""Detection of converted models, whose configs name the architecture of the original model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig
from vllm.transformers_utils.config import get_config_parser, register_config_parser

from ovq.convert.config import CONFIG_KEY

#: Architecture of converted models of all families.
CONVERTED = "OVQConvertedForCausalLM"


def detect_converted() -> None:
    """Replace vLLM's config parser by one that sets the architecture of converted models to `CONVERTED`.

    vLLM reads every `config.json` through this parser, so users need no option. vLLM's classes for the
    original models are unchanged.
    """
    parser: Any = type(get_config_parser("hf"))
    if getattr(parser, "detects_converted", False):
        return

    class ConvertedConfigParser(parser):
        """vLLM's parser, with the architecture set where the config has a memory."""

        detects_converted = True

        def parse(self, *args: Any, **kwargs: Any) -> tuple[dict, PreTrainedConfig]:
            """The fields of the file, and the config."""
            fields, config = super().parse(*args, **kwargs)
            if CONFIG_KEY in fields:
                config.architectures = [CONVERTED]
            return fields, config

    register_config_parser("hf")(ConvertedConfigParser)
