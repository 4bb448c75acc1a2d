"""transformers' own tests of models and of generation, run on models of five sets of mixers."""

import contextlib
import functools
import re
import unittest
from unittest import mock

import pytest
import torch
from transformers import set_seed
from transformers.models.auto import modeling_auto

from ovq.hf import OVQCache, OVQConfig, OVQForCausalLM, OVQModel
from ovq.hf.auto_map import AUTO_MAP
from ovq_lab.mixers.vq import StaticDictionary
from tests.generation import test_utils as generation
from tests.hf.common import of_mixers
from tests.peers import sources
from tests.peers.models import SETS
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, global_rng, ids_tensor
from tests.test_training_mixin import TrainingTesterMixin

#: What is skipped: tests whose names match, the error that each must still end in, and why that is right.
#: A test that no longer ends so fails: nothing stays here longer than it must.
SKIPS = [
    (
        r"test_torch_export(_generate)?_(static|dynamic)",
        "data-dependent expression",
        "torch.export traces no value, and masks are checked by value before anything is computed",
    ),
]

#: Tests that ask for attention matrices of models that have some; our mixers form none, and refuse. With
#: `has_attentions = False`, as transformers has it for Mamba, they test everything else.
ASK_FOR_ATTENTIONS = [
    r"test_attention_outputs",
    r"test_model_outputs_equivalence",
    r"test_retain_grad_hidden_states_attentions",
    r"test_\w+_dict_output\w*",
]


class OVQModelTester:
    """Makes the configs and inputs that the mixins ask for."""

    causal_lm_class = OVQForCausalLM
    base_model_class = OVQModel
    is_training = True
    batch_size = 3
    seq_length = 11
    vocab_size = 99
    hidden_size = 32
    num_attention_heads = 4
    pad_token_id = 0

    def __init__(self, mixer_types):
        self.mixer_types = mixer_types
        self.num_hidden_layers = len(mixer_types)

    def get_config(self):
        return OVQConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=48,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            # Shorter than the inputs, all of these: windows pass, chunks end, slots are read.
            **of_mixers(list(self.mixer_types), sink_window=5, num_sinks=2),
            sliding_window=6,
            num_slots=8,
            chunk_size=4,
            pad_token_id=self.pad_token_id,
            bos_token_id=1,
        )

    def prepare_config_and_inputs_for_common(self):
        # No padding tokens: without a mask `generate` takes them for padding, which may not be in the middle.
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size).clamp(min=self.pad_token_id + 1)
        # Rows of unequal length, padded left as `generate` wants them.
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids).triu()}


class Suite(ModelTesterMixin, generation.GenerationTesterMixin, TrainingTesterMixin):
    """Mixed into a test case for each set; the methods below are the hooks that the mixins have for this."""

    all_model_classes = (OVQModel, OVQForCausalLM)
    model_tester = None
    mixer_types = None
    # A setting, not a test: to run one that is left out by default.
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        self.model_tester = OVQModelTester(self.mixer_types)
        self.has_attentions = not any(re.fullmatch(p, self._testMethodName) for p in ASK_FOR_ATTENTIONS)
        set_seed(0)
        for generator in (global_rng, getattr(generation, "global_rng", global_rng)):
            generator.seed(0)

    def test_config(self):
        # Every loaded config has an `auto_map`, as saved ones do.
        ConfigTester(self, config_class=OVQConfig, hidden_size=32, auto_map=AUTO_MAP).run_common_tests()

    def test_init_weights_can_init_buffers(self):
        """The test is for buffers without chance; the slots of a vq layer begin at random."""
        draw = StaticDictionary.reset_parameters

        def draw_the_same(dictionary):
            torch.manual_seed(0)
            draw(dictionary)

        with mock.patch.object(StaticDictionary, "reset_parameters", draw_the_same):
            super().test_init_weights_can_init_buffers()

    def attention_mask_padding_matches_padding_free_with_position_ids(self, *args, **kwargs):
        """Left out for models with a state, which transformers expects not to pack rows: ours do."""
        with mock.patch.object(OVQForCausalLM, "_supports_attention_backend", True):
            super().attention_mask_padding_matches_padding_free_with_position_ids(*args, **kwargs)

    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config):
        assert isinstance(past_key_values, OVQCache)
        assert past_key_values.get_seq_length() == seq_length
        assert past_key_values.num_rows == batch_size
        assert past_key_values.nbytes == batch_size * OVQModel(config).state_bytes(seq_length)

    def _check_caches_are_equal(self, cache1, cache2):
        for one, other in zip(cache1.layers, cache2.layers, strict=True):
            torch.testing.assert_close(one.tensors(), other.tensors())


#: Parameterized tests leave a None under their own name.
TESTS = [name for name in dir(Suite) if name.startswith("test_") and callable(getattr(Suite, name))]


def skipping(test, error, reason):
    """The test, skipped after it has been seen to end in `error`."""

    @functools.wraps(test)
    def run(self):
        # As errors in subtests are reported, not raised.
        self.subTest = lambda *args, **kwargs: contextlib.nullcontext()
        try:
            test(self)
        except unittest.SkipTest as skip:
            pytest.fail(f"SKIPS: expected {error!r}, found that transformers skips the test itself: {skip}")
        except Exception as found:
            if error not in str(found):
                raise
            self.skipTest(reason)
        pytest.fail(f"SKIPS: expected {error!r}, found that the test passes: its entry is no longer needed")

    return run


def case(name, mixer_types):
    """The test case of one set of mixers."""
    content = {"mixer_types": mixer_types, "__module__": __name__}
    for pattern, error, reason in SKIPS:
        for test in TESTS:
            if re.fullmatch(pattern, test):
                content[test] = skipping(getattr(Suite, test), error, reason)
    return type(f"Test_{name}", (Suite, unittest.TestCase), content)


globals().update({f"Test_{name}": case(name, mixer_types) for name, mixer_types in SETS.items()})


@pytest.mark.skipif(
    sources.is_missing("tests.generation.test_utils"), reason="needs the tests of a checkout, see sources.py"
)
@pytest.mark.parametrize("pattern", [pattern for pattern, _, _ in SKIPS] + ASK_FOR_ATTENTIONS)
def test_every_pattern_names_a_test(pattern):
    assert any(re.fullmatch(pattern, name) for name in TESTS)


@pytest.fixture(autouse=True)
def of_transformers(monkeypatch):
    """Let the mixins take our classes for their own, which tells them what each is for."""
    monkeypatch.setitem(modeling_auto.MODEL_MAPPING_NAMES, "ovq", "OVQModel")
    monkeypatch.setitem(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "ovq", "OVQForCausalLM")


pytestmark = pytest.mark.peers
