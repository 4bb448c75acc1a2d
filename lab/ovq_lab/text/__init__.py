"""Real text: corpora from files, the package index or the hub; tokenizers; documents as token arrays."""

from ovq_lab.text.corpus import Corpus, load_corpus
from ovq_lab.text.documents import Document, split_of
from ovq_lab.text.readers import read_documents
from ovq_lab.text.source import TextSource
from ovq_lab.text.tokenizers import (
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
