"""Real text: corpora from files, the package index or the hub; tokenizers; documents as token arrays."""

from ovq.text.corpus import Corpus, load_corpus
from ovq.text.documents import Document, split_of
from ovq.text.readers import read_documents
from ovq.text.source import TextSource
from ovq.text.tokenizers import (
    byte_tokenizer,
    encode_bytes,
    get_tokenizer,
    source_tokenizer,
    train_tokenizer,
)

__all__ = [
    "Corpus",
    "Document",
    "TextSource",
    "byte_tokenizer",
    "encode_bytes",
    "get_tokenizer",
    "load_corpus",
    "read_documents",
    "source_tokenizer",
    "split_of",
    "train_tokenizer",
]
