#!/usr/bin/env python3
"""Writes a model of random weights in Qwen3's form, for omlx and mlx-lm (a folder) and for llama.cpp (a GGUF file).

    make_model.py --shape qwen3-0.6b --bits 4 --folder OUT [--gguf OUT.gguf]

Computing takes as long as with real weights. The GGUF file has the format nearest to the folder's: Q4_0 for 4 bits,
Q8_0 for 8, BF16 for 16. There is no tokenizer; prompts are token ids.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import TensorSpec, serialize_file


@dataclass(frozen=True)
class Shape:
    hidden: int
    layers: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    vocab: int = 151_936
    tied: bool = True


SHAPES = {
    "qwen3-tiny": Shape(256, 8, 768, 4, 2, head_dim=64, vocab=4096),
    "qwen3-0.6b": Shape(1024, 28, 3072, 16, 8),
    "qwen3-1.7b": Shape(2048, 28, 6144, 16, 8),
    "qwen3-4b": Shape(2560, 36, 9728, 32, 8),
    "qwen3-8b": Shape(4096, 36, 12288, 32, 8, tied=False),
}
GROUP = 64
GGUF_TYPES = {4: "Q4_0", 8: "Q8_0", 16: "BF16"}
GGUF_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def norms_and_matrices(shape):
    """Name in the folder, name in the GGUF file, and [rows, columns], or [width] of a norm."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer = {
        "input_layernorm": (shape.hidden,),
        "post_attention_layernorm": (shape.hidden,),
        "self_attn.q_norm": (shape.head_dim,),
        "self_attn.k_norm": (shape.head_dim,),
        "self_attn.q_proj": (queries, shape.hidden),
        "self_attn.k_proj": (keys, shape.hidden),
        "self_attn.v_proj": (keys, shape.hidden),
        "self_attn.o_proj": (shape.hidden, queries),
        "mlp.gate_proj": (shape.mlp, shape.hidden),
        "mlp.up_proj": (shape.mlp, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.mlp),
    }
    yield "model.embed_tokens", "token_embd", (shape.vocab, shape.hidden)
    for index in range(shape.layers):
        for name, size in layer.items():
            yield f"model.layers.{index}.{name}", f"blk.{index}.{GGUF_LAYER[name]}", size
    yield "model.norm", "output_norm", (shape.hidden,)
    if not shape.tied:
        yield "lm_head", "output", (shape.vocab, shape.hidden)


def to_bf16(numbers):
    """Bits of bf16, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def folder_tensors(shape, bits, rng):
    """Name, dtype, bits as an array, and shape of each tensor of the folder."""
    for name, _, size in norms_and_matrices(shape):
        if len(size) == 1:
            yield f"{name}.weight", "bfloat16", to_bf16(np.ones(size)), size
        elif bits == 16:
            yield f"{name}.weight", "bfloat16", to_bf16(0.02 * rng.standard_normal(size, dtype=np.float32)), size
        else:
            rows, columns = size
            words = (rows, columns * bits // 32)
            yield f"{name}.weight", "uint32", rng.integers(0, 2**32, words, dtype=np.uint32), words
            # Weights are spread evenly over a range around zero, of about the width that real ones have.
            groups, largest = (rows, columns // GROUP), 2**bits - 1
            scales = rng.uniform(0.5, 1.5, groups).astype(np.float32) * 0.06 / largest
            yield f"{name}.scales", "bfloat16", to_bf16(scales), groups
            yield f"{name}.biases", "bfloat16", to_bf16(scales * (-largest / 2)), groups


def write_folder(shape, bits, out):
    out.mkdir(parents=True, exist_ok=True)
    arrays, specs = [], {}
    for name, dtype, array, size in folder_tensors(shape, bits, np.random.default_rng(1)):
        arrays.append(array)  # a spec holds an address only
        specs[name] = TensorSpec(dtype=dtype, shape=list(size), data_ptr=array.ctypes.data, data_len=array.nbytes)
    serialize_file(specs, out / "model.safetensors", {"format": "mlx"})
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "intermediate_size": shape.mlp,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 40_960,
        "attention_bias": False,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": [0],
    }
    if bits != 16:
        config["quantization"] = {"group_size": GROUP, "bits": bits}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_gguf(shape, bits, out):
    import gguf

    out.parent.mkdir(parents=True, exist_ok=True)
    kind = gguf.GGMLQuantizationType[GGUF_TYPES[bits]]
    writer = gguf.GGUFWriter(out, "qwen3")
    writer.add_block_count(shape.layers)
    writer.add_context_length(40_960)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.mlp)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(shape.vocab)
    rng = np.random.default_rng(1)
    for _, name, size in norms_and_matrices(shape):
        if len(size) == 1:
            writer.add_tensor(f"{name}.weight", np.ones(size, np.float32))
        else:
            numbers = 0.02 * rng.standard_normal(size, dtype=np.float32)
            writer.add_tensor(f"{name}.weight", gguf.quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--bits", type=int, choices=GGUF_TYPES, default=4, help="16: bf16")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--gguf", type=Path)
    args = parser.parse_args()
    if not (args.folder or args.gguf):
        parser.error("give --folder or --gguf")
    if args.folder:
        write_folder(SHAPES[args.shape], args.bits, args.folder)
    if args.gguf:
        write_gguf(SHAPES[args.shape], args.bits, args.gguf)


if __name__ == "__main__":
    main()
