"""Saved models load where nothing of ours is imported, have a card, and refuse to be another model."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM, pipeline
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

from ovq.hf import OVQConfig, OVQForCausalLM, OVQModel
from ovq.hf.auto_map import AUTO_MAP, MODULE_FILE
from ovq.hf.card import CARD_FILE, is_untouched, model_card, save_card
from ovq.layers.products import Linear
from ovq_lab.text import byte_tokenizer
from tests.hf.common import BASELINES, make_config, make_model, random_ids

FRESH = """
import json, sys
from pathlib import Path
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

folder, again = sys.argv[1:]
# As where the package is not installed.
sys.modules["ovq"] = None
try:
    AutoConfig.from_pretrained(folder, trust_remote_code=True)
except ImportError as error:
    missing = str(error)
del sys.modules["ovq"]
assert not [name for name in sys.modules if name.startswith("ovq")]
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    refused = str(error)
assert not [name for name in sys.modules if name.startswith("ovq")]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
generate = pipeline("text-generation", model=folder, trust_remote_code=True)
[answer] = generate("It was", max_new_tokens=3, do_sample=False)
model.save_pretrained(again)
# As after `import ovq.hf`, without the argument.
AutoModelForCausalLM.from_pretrained(again)
classes = [f"{type(each).__module__}.{type(each).__name__}" for each in (config, model, base)]
said = {"missing": missing, "refused": refused, "classes": classes, "answer": answer["generated_text"]}
print(json.dumps(said))
"""


def in_a_fresh_process(*arguments, hub_folder):
    """Run Python without the network and with an empty cache of modules; its standard output."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(hub_folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def byte_model():
    torch.manual_seed(0)
    return OVQForCausalLM(make_config(vocab_size=257)).eval()


@pytest.fixture(scope="module")
def folder(byte_model, tmp_path_factory):
    """A saved model with a tokenizer."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    byte_model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_process_that_imports_nothing_of_ours(folder, byte_model, tmp_path):
    found = json.loads(in_a_fresh_process("-c", FRESH, folder, tmp_path / "again", hub_folder=tmp_path))
    assert found["classes"] == [
        "ovq.hf.configuration_ovq.OVQConfig",
        "ovq.hf.modeling_ovq.OVQForCausalLM",
        "ovq.hf.modeling_ovq.OVQModel",
    ]
    assert found["missing"].startswith(
        "expected the Python package ovq to be installed, which this model needs, found: "
    )
    assert "trust_remote_code=True" in found["refused"]
    prompt = torch.tensor([list(b"It was")])
    said = byte_model.generate(prompt, max_new_tokens=3, do_sample=False)[0]
    assert found["answer"] == byte_tokenizer().decode(said, skip_special_tokens=True)
    # The copy is as the original is: no code of ours beside it, and the same names in its config.
    names = {path.name for path in folder.iterdir() if not path.name.startswith("tokenizer")}
    assert {path.name for path in (tmp_path / "again").iterdir()} == names
    assert (tmp_path / "again" / MODULE_FILE).read_text() == (folder / MODULE_FILE).read_text()
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "again")]
    assert configs[0] == configs[1]
    assert configs[0]["auto_map"] == AUTO_MAP


def test_a_pipeline_answers_prompts_side_by_side_as_each_alone(folder):
    generate = pipeline("text-generation", model=str(folder))
    prompts = ["It was", "A longer prompt, so that the other one is padded"]
    options = {"max_new_tokens": 8, "do_sample": False}
    alone = [generate(prompt, **options) for prompt in prompts]
    assert generate(prompts, batch_size=2, **options) == alone


@pytest.mark.slow
def test_the_harness_of_others_as_it_is(folder, tmp_path):
    rows = [{"text": "ab", "choices": [" red", " b"], "label": 0}] * 2
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "task.yaml").write_text(f"""
task: local_choice
output_type: multiple_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path}/data.jsonl
  cache_dir: {tmp_path}/cache
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: label
doc_to_choice: choices
metric_list:
  - metric: acc
""")
    arguments = ["--model", "hf", "--model_args", f"pretrained={folder},trust_remote_code=True,max_length=64"]
    arguments += ["--include_path", tmp_path, "--tasks", "local_choice", "--device", "cpu"]
    arguments += ["--output_path", tmp_path / "out.json"]
    in_a_fresh_process("-m", "lm_eval", "run", *arguments, hub_folder=tmp_path)
    [path] = tmp_path.glob("out_*.json")
    assert json.loads(path.read_text())["results"]["local_choice"]["acc,none"] in (0.0, 1.0)


def test_saving_leaves_the_config_in_memory_as_it_was(tmp_path):
    model = make_model()
    before = model.config.to_dict()
    model.config.save_pretrained(tmp_path)
    assert model.config.to_dict() == before
    # trl reads this of a loaded config.
    assert OVQConfig.from_pretrained(tmp_path).to_dict() == before | {"auto_map": AUTO_MAP}
    # What transformers calls after it has loaded a class by `auto_map`.
    OVQConfig.register_for_auto_class()
    OVQForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert not (tmp_path / "configuration_ovq.py").exists()


def test_classes_derived_from_ours_are_published_with_their_code(tmp_path, monkeypatch):
    (tmp_path / "derived.py").write_text(
        "from ovq.hf import OVQForCausalLM\n\n\nclass Derived(OVQForCausalLM):\n    is_derived = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    from derived import Derived

    Derived.register_for_auto_class("AutoModelForCausalLM")
    Derived(make_config()).save_pretrained(tmp_path / "one")
    assert (tmp_path / "one" / "derived.py").is_file()
    expected = AUTO_MAP | {"AutoModelForCausalLM": "derived.Derived"}
    assert json.loads((tmp_path / "one" / "config.json").read_text())["auto_map"] == expected
    loaded = OVQForCausalLM.from_pretrained(tmp_path / "one")
    loaded.config.save_pretrained(tmp_path / "two")
    assert json.loads((tmp_path / "two" / "config.json").read_text())["auto_map"] == expected


@pytest.mark.parametrize("load", [OVQModel, OVQForCausalLM])
def test_another_model_is_refused_with_a_config_too(tmp_path, load):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)).save_pretrained(tmp_path)
    config = OVQConfig(vocab_size=8, **sizes)
    with pytest.raises(ValueError, match="expected a model of type 'ovq', found 'llama'"):
        load.from_pretrained(tmp_path, config=config)
    with pytest.raises(ValueError, match="expected the config of a model of type 'ovq', found 'llama'"):
        load.from_pretrained(tmp_path)


def test_weights_without_a_config_load_with_the_one_given(tmp_path):
    model, ids = make_model(), random_ids(1, 9)
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    loaded = OVQForCausalLM.from_pretrained(tmp_path, config=make_config(), dtype=torch.float64).eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_quantizers_replace_the_projections():
    """Some replace PyTorch's own class alone, and would leave the model as it is."""
    quantization = FineGrainedFP8Config()
    model = OVQForCausalLM(make_config(output_gate=True, quantization_config=quantization))
    replace_with_fp8_linear(model, ["lm_head"], quantization)
    left = [name for name, module in model.named_modules() if type(module) in (torch.nn.Linear, Linear)]
    assert left == ["lm_head"]


def test_a_card_says_what_the_model_is(folder, byte_model):
    text = (folder / CARD_FILE).read_text()
    assert is_untouched(text)
    card = ModelCard(text)
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert "ovq" in card.data.tags
    assert card.data.datasets is None
    config = byte_model.config
    for line in (
        "# model",
        f"| parameters | {byte_model.num_parameters():,} |",
        "| layers | sliding_attention, ovq, full_attention, ovq |",
        f"| slots per head | {config.num_slots} |",
        f"| 16,384 | {byte_model.state_bytes(16384) / 2**20:.1f} MiB | 6.0 MiB |",
    ):
        assert line in text.splitlines()
    assert "trust_remote_code=True" in text
    assert 'model.set_merge("nearest")' in text


@pytest.mark.parametrize("options", [{"merge": "nearest"}, {"init": "random"}, {"ablation": {"rate": 0.1}}])
def test_a_card_names_a_better_rule_only_where_there_is_one(options):
    model = make_model(**options)
    assert "set_merge" not in model_card(model, name="x").text
    with contextlib.suppress(ValueError):
        model.set_merge("nearest")
    assert model.config.merge == options.get("merge", "existing")


def test_the_card_of_a_model_without_an_output_layer(tmp_path):
    make_model().model.save_pretrained(tmp_path)
    card = ModelCard((tmp_path / CARD_FILE).read_text())
    assert card.data.pipeline_tag == "feature-extraction"
    assert 'model = AutoModel.from_pretrained("path/to/' in card.text


@pytest.mark.parametrize(
    ("mixers", "said"),
    [
        (["sliding_attention", "ovq"] * 2, "2 x (sliding_attention, ovq)"),
        (["ovq"] * 4, "4 x ovq"),
        (["ovq", "ovq", "full_attention", "ovq"], "2 x ovq, full_attention, ovq"),
    ],
)
def test_layers_in_words(mixers, said):
    assert f"| layers | {said} |" in model_card(make_model(mixer_types=mixers), name="x").text


def test_a_card_without_ovq_layers_does_not_speak_of_slots():
    text = model_card(make_model(**BASELINES), name="x", has_tokenizer=False).text
    assert "slots" not in text
    assert "reads and writes token ids" in text


@pytest.mark.parametrize(
    ("mixer", "packages"), [("ovq", "The package `ovq`"), ("vq", "The packages `ovq` and `ovq-lab`")]
)
def test_a_card_names_the_packages_that_have_its_mixers(mixer, packages):
    text = model_card(make_model(mixer_types=["ovq", mixer] * 2), name="x").text
    assert f"## Load it\n\n{packages} must be installed." in text
    assert "```python\nfrom transformers import" in text


def test_cards_of_users_stay(tmp_path):
    model = make_model()
    path = tmp_path / CARD_FILE
    model.save_pretrained(tmp_path)
    ours = path.read_text()
    model.set_num_slots(77)
    model.save_pretrained(tmp_path)
    # One of ours is brought up to date, an edited one is not.
    assert "| slots per head | 77 |" in path.read_text()
    assert "| slots per head | 9 |" in ours
    path.write_text(ours.replace("# ", "# My "))
    model.save_pretrained(tmp_path)
    assert path.read_text() == ours.replace("# ", "# My ")
    path.write_text("# My model\n")
    assert not save_card(model_card(model, name="x"), tmp_path)
    model.save_pretrained(tmp_path)
    assert path.read_text() == "# My model\n"
    # What a model cannot know about its training is not lost.
    path.unlink()
    assert save_card(model_card(model, name="x", sections={"Training": "long"}), tmp_path)
    model.save_pretrained(tmp_path)
    assert "## Training" in path.read_text()
    assert save_card(model_card(model, name="y"), tmp_path, replaces=["Training"])
    assert path.read_text().count("# y") == 1


class FakeHub:
    """What of the hub's interface an upload calls; remembers what was uploaded."""

    def __init__(self, monkeypatch, card=None):
        self.files, self.options, self.branches = {}, {}, []
        hub = self

        def create_repo(self, repo_id, **_):
            return type("Repository", (), {"repo_id": f"me/{repo_id}"})()

        def hf_hub_download(self, repo_id, filename, **_):
            assert (repo_id, filename) == ("me/model", CARD_FILE)
            if card is None:
                raise EntryNotFoundError("none")
            return card

        def upload_folder(self, *, folder_path, **options):
            hub.options = options
            hub.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}

        monkeypatch.setattr(HfApi, "create_repo", create_repo)
        monkeypatch.setattr(HfApi, "create_branch", lambda self, _, branch, **__: hub.branches.append(branch))
        monkeypatch.setattr(HfApi, "hf_hub_download", hf_hub_download)
        monkeypatch.setattr(HfApi, "upload_folder", upload_folder)


def test_an_upload_has_a_card(monkeypatch, tmp_path):
    hub = FakeHub(monkeypatch)
    model = make_model()
    model.push_to_hub("model", revision="new", tags=["mine", "ovq"])
    assert set(hub.files) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        MODULE_FILE,
        CARD_FILE,
    }
    card = ModelCard(hub.files[CARD_FILE].decode())
    assert card.data.tags == ["ovq", "long-context", "mine"]
    assert 'from_pretrained("me/model", trust_remote_code=True)' in card.text
    assert hub.branches == ["new"]
    assert (hub.options["repo_id"], hub.options["revision"]) == ("me/model", "new")
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    ids = random_ids(1, 9)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, model(ids).logits)


def test_an_upload_leaves_the_card_in_the_repository(monkeypatch, tmp_path):
    (tmp_path / "card.md").write_text("---\nlicense: mit\n---\n\n# Theirs\n")
    hub = FakeHub(monkeypatch, card=tmp_path / "card.md")
    make_model().push_to_hub("model")
    assert hub.files[CARD_FILE].decode() == (tmp_path / "card.md").read_text()


def test_an_upload_brings_our_own_card_up_to_date(monkeypatch, tmp_path):
    model, path = make_model(), tmp_path / "card.md"
    hub = FakeHub(monkeypatch)
    model.push_to_hub("model", tags=["mine"])
    path.write_bytes(hub.files[CARD_FILE])
    assert is_untouched(path.read_text())
    hub = FakeHub(monkeypatch, card=path)
    model.set_num_slots(77)
    model.push_to_hub("model")
    found = hub.files[CARD_FILE].decode()
    assert is_untouched(found)
    assert "| slots per head | 77 |" in found
    # Tags of the earlier upload are not lost, nor what a model cannot know about its training.
    assert ModelCard(found).data.tags == ["ovq", "long-context", "mine"]
    path.write_text(model_card(model, name="me/model", sections={"Training": "long"}).content)
    model.push_to_hub("model", tags=["more"])
    card = ModelCard(hub.files[CARD_FILE].decode())
    assert "## Training" in card.text
    assert card.data.tags == ["ovq", "long-context", "more"]
