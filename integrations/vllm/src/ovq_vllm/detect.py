"""How vLLM knows the folder of a converted model, whose config names the architecture of the original."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig
from vllm.transformers_utils.config import get_config_parser, register_config_parser

from ovq.convert.config import CONFIG_KEY

#: The architecture of converted models, whatever they were.
CONVERTED = "OVQConvertedForCausalLM"


def detect_converted() -> None:
    """From now on, a config with the memory of a converted model names that architecture.

    All that reads `config.json` for vLLM comes by here, so that nobody has to ask for it. The classes of vLLM
    for original models stay as they are.
    """
    parser: Any = type(get_config_parser("hf"))
    if getattr(parser, "detects_converted", False):
        return

    class ConvertedConfigParser(parser):
        """vLLM's own, which looks once more at what it has read."""

        detects_converted = True

        def parse(self, *args: Any, **kwargs: Any) -> tuple[dict, PreTrainedConfig]:
            """The fields in the file and the config."""
            fields, config = super().parse(*args, **kwargs)
            if CONFIG_KEY in fields:
                config.architectures = [CONVERTED]
            return fields, config

    register_config_parser("hf")(ConvertedConfigParser)
