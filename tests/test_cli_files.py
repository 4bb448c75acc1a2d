"""Files that commands read and write: what is wrong with them is said at once, not after the work."""

import tempfile

import pytest
from safetensors.torch import load_file, save_file

from tests.test_cli import fail
from tests.tiny import save_reader


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that reads bytes, a text, what is no text, and a file in the place of a folder."""
    folder = tmp_path_factory.mktemp("files")
    save_reader(folder / "model")
    (folder / "text.txt").write_text("one two three " * 400)
    (folder / "latin.txt").write_bytes("Où est-ce?".encode("latin-1"))
    (folder / "file").write_text("")
    return folder


def failed(capsys, folder, arguments):
    return fail(capsys, *(word.format(f=folder) for word in arguments.split()))


@pytest.mark.parametrize(
    "arguments",
    [
        "generate --model {f}/model --prompt-file {f}/latin.txt",
        "context build --model {f}/model --text {f}/latin.txt --out {f}/new.ctx",
        "inspect --model {f}/model --text {f}/latin.txt --out {f}/new.html",
        "convert --model {f}/model --probe {f}/latin.txt --out {f}/new",
        "train {f}/latin.yaml",
    ],
)
def test_text_in_another_encoding_is_refused(capsys, folder, arguments):
    (folder / "latin.yaml").write_bytes((folder / "latin.txt").read_bytes())
    found = failed(capsys, folder, arguments)
    flag = next((word for word in arguments.split() if word in ("--prompt-file", "--text", "--probe")), None)
    if flag is None:
        assert f"{folder}/latin.yaml: expected YAML or JSON, found what is none" in found
    else:
        assert (
            found
            == f"{flag}: expected text in UTF-8, found other bytes in {folder}/latin.txt (from byte 1 on)"
        )
    assert not list(folder.glob("new*"))


@pytest.mark.parametrize("place", ["file", "file/below"])
@pytest.mark.parametrize(
    ("arguments", "work"),
    [
        (
            "eval lm --model {f}/model --dataset {f}/text.txt --split all",
            "ovq_lab.eval.language.evaluate_language",
        ),
        ("eval needle --model {f}/model", "ovq_lab.eval.needle.evaluate_needle"),
        ("eval harness --model {f}/model --tasks x", "ovq_lab.eval.harness.evaluate_tasks"),
        ("bench --what forward --lengths 64", "ovq_lab.bench.suite.run_suite"),
    ],
)
def test_a_folder_that_cannot_be_made_is_refused_before_the_work(
    capsys, folder, monkeypatch, arguments, work, place
):
    def began(*_args, **_kwargs):
        raise AssertionError("it began")

    pytest.importorskip("lm_eval" if "harness" in work else "torch")
    monkeypatch.setattr(work, began)
    found = failed(capsys, folder, f"{arguments} --out {{f}}/{place}")
    assert found == f"--out: expected a folder, found a file: {folder}/file"


def test_damaged_weights_are_not_converted(capsys, folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1)).save_pretrained(folder / "llama")
    weights = folder / "llama/model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "few", metadata={"format": "pt"})
    for content, message in (
        (weights.read_bytes()[:100], "--model: expected a causal language model, found"),
        ((folder / "few").read_bytes(), "describes, found no model.layers.0.mlp.up_proj.weight)"),
    ):
        weights.write_bytes(content)
        capsys.readouterr()
        found = failed(capsys, folder, "convert -q --model {f}/llama --out {f}/converted")
        assert message in found


def refuse(*_args, **_kwargs):
    raise OSError(30, "Read-only file system", "/some/temporary/name")


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        ("convert --model {f}/model --out {f}/new", "{f}"),
        ("context build --model {f}/model --text {f}/text.txt --out {f}/new", "{f}"),
        ("bench --out {f}/new/below", "{f}"),
    ],
)
def test_a_folder_that_cannot_be_written_is_named_before_the_work(
    capsys, folder, monkeypatch, arguments, place
):
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    found = failed(capsys, folder, arguments)
    assert found == f"[Errno 30] Read-only file system: '{place.format(f=folder)}'"


def test_a_file_cannot_be_written_through_a_link_to_a_folder_that_is_not_there(capsys, folder):
    (folder / "page").symlink_to(folder / "nowhere" / "page.html")
    found = failed(capsys, folder, "inspect --model {f}/model --prompt 1 --out {f}/page")
    assert found == f"--out: expected a file in a folder that exists, found {folder}/page"


def test_a_link_to_nowhere_is_not_replaced(capsys, folder):
    (folder / "link").unlink(missing_ok=True)
    (folder / "link").symlink_to(folder / "nowhere")
    found = failed(capsys, folder, "convert --model {f}/model --out {f}/link")
    assert found == f"--out: expected a folder that does not exist yet, found {folder}/link"
