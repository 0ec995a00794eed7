#!/usr/bin/env python3
"""Times llama.cpp on a GGUF file, through llama-cpp-python's C functions: JSON lines as examples/bench prints them.

    time_llama_cpp.py MODEL.gguf [--prompt 512,2048] [--batch 1,4,8] [--context 512] [--steps 32] [--threads N]

`prefillN` is N over the time of a prompt of N tokens with the logits of its last one. `decode` feeds one token to each
sequence and waits, `--steps` times. No token is sampled, so that Python is not in the figures.
"""

import argparse
import ctypes
import json
import time

import llama_cpp as llama


@llama.llama_log_callback
def ignore(_level, _text, _user_data):
    pass


def numbers(text):
    return [int(part) for part in text.split(",")]


class Context:
    """Room for some sequences of some tokens."""

    def __init__(self, model, sequences, tokens, largest_batch, threads):
        params = llama.llama_context_default_params()
        # Contexts of sequences are rounded up to 256 tokens.
        params.n_ctx = sequences * -(-tokens // 256) * 256
        params.n_seq_max = sequences
        params.n_batch = max(params.n_batch, largest_batch)
        # Sequences share nothing: each has keys and values of its own, which is the faster mode for them.
        params.kv_unified = False
        if threads:
            params.n_threads = params.n_threads_batch = threads
        self.context = llama.llama_init_from_model(model, params)
        if not self.context:
            raise SystemExit("llama.cpp makes no context")
        self.run([(token, token, 0) for token in range(16)], {15})  # warm up
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)

    def run(self, tokens, wanted):
        """Computes tokens, (id, position, sequence) each, with the logits of the wanted ones; returns seconds."""
        batch = llama.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = i in wanted
        start = time.perf_counter()
        status = llama.llama_decode(self.context, batch)
        llama.llama_synchronize(self.context)
        seconds = time.perf_counter() - start
        llama.llama_batch_free(batch)
        if status != 0:
            raise SystemExit(f"llama_decode returns {status}")
        return seconds

    def prompt(self, length, sequence=0):
        """Computes a prompt."""
        tokens = [(7 + (i * 31 + sequence * 97) % 900, i, sequence) for i in range(length)]
        return self.run(tokens, {length - 1})

    def close(self):
        llama.llama_free(self.context)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompt", type=numbers, default=[512])
    parser.add_argument("--batch", type=numbers, default=[1])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--threads", type=int, help="llama.cpp's own choice if not given")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    args = parser.parse_args()

    def line(**fields):
        print(json.dumps({"engine": "llama.cpp", "device": args.device, **fields}), flush=True)

    llama.llama_log_set(ignore, ctypes.c_void_p(0))
    llama.llama_backend_init()
    params = llama.llama_model_default_params()
    params.n_gpu_layers = 0 if args.device == "cpu" else 999
    start = time.perf_counter()
    model = llama.llama_model_load_from_file(args.model.encode(), params)
    if not model:
        raise SystemExit(f"llama.cpp does not load {args.model}")
    line(name="load", seconds=round(time.perf_counter() - start, 3), version=f"llama-cpp-python {llama.__version__}")
    for length in args.prompt:
        context = Context(model, 1, length, length, args.threads)
        line(name=f"prefill{length}", batch=1, tok_s=round(length / context.prompt(length), 2))
        context.close()
    for batch in args.batch:
        context = Context(model, batch, args.context + args.steps + 1, args.context, args.threads)
        for sequence in range(batch):
            context.prompt(args.context, sequence)
        times = []
        for step in range(args.steps + 1):
            tokens = [(5, args.context + step, sequence) for sequence in range(batch)]
            times.append(context.run(tokens, set(range(batch))))
        seconds = sum(times[1:])  # the first step makes the graph for this batch
        line(name="decode", batch=batch, tok_s=round(batch * args.steps / seconds, 2))
        context.close()
    llama.llama_model_free(model)


if __name__ == "__main__":
    main()
