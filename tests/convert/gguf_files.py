"""A tiny Llama in a GGUF file, quantised as those of llama.cpp are."""

import gguf
import numpy as np

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def write_gguf(path, *, kind="Q4_1", has_tokenizer=True, base=10000.0, more=lambda writer: None):
    """Write it, with all matrices in one kind of numbers, and what `more` adds."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(base)
    writer.add_vocab_size(SIZES["vocab_size"])
    if has_tokenizer:
        _add_tokenizer(writer)
    width, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    kept = width * SIZES["num_key_value_heads"] // SIZES["num_attention_heads"]
    shapes = {"token_embd": (SIZES["vocab_size"], width)}
    for i in range(SIZES["num_hidden_layers"]):
        shapes |= {f"blk.{i}.attn_{name}": (n, width) for name, n in (("q", width), ("k", kept), ("v", kept))}
        shapes[f"blk.{i}.attn_output"] = (width, width)
        shapes |= {f"blk.{i}.ffn_{name}": (inner, width) for name in ("gate", "up")}
        shapes[f"blk.{i}.ffn_down"] = (width, inner)
    random = np.random.default_rng(0)
    number = gguf.GGMLQuantizationType[kind]
    for name, shape in shapes.items():
        weights = (random.standard_normal(shape) * 0.3).astype(np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weights, number), raw_dtype=number)
    norms = [
        f"blk.{i}.{name}" for i in range(SIZES["num_hidden_layers"]) for name in ("attn_norm", "ffn_norm")
    ]
    for name in [*norms, "output_norm"]:
        writer.add_tensor(f"{name}.weight", np.ones(width, dtype=np.float32))
    more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer):
    """The bytes, written as GPT-2's tokenizer writes them, a few pairs, and what begins and ends a text."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letters = [*map(chr, printable), *(chr(256 + i) for i in range(len(others)))]
    merges = ["t h", "th e", "a n", "i n"]
    tokens = ["<s>", "</s>", *letters, *(pair.replace(" ", "") for pair in merges)]
    tokens += [f"<unused{i}>" for i in range(SIZES["vocab_size"] - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
