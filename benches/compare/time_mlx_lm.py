#!/usr/bin/env python3
"""Times mlx-lm on a model folder: JSON lines as examples/bench prints them.

    time_mlx_lm.py FOLDER [--prompt 8] [--batch 1,4,8] [--context 8] [--steps 4] [--device cpu|gpu]

`prefillN` is N over the time of a forward pass of N tokens with the logits of its last one, in chunks of 2048 tokens.
`decode` is BatchGenerator's, from the moment when every sequence has had some tokens. On a GPU each prompt length runs
twice and the second run counts: the first one compiles. MLX takes no number of threads.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

CHUNK = 2048


def numbers(text):
    return [int(part) for part in text.split(",")]


def prompt(length, sequence):
    return [7 + (i * 31 + sequence * 97) % 900 for i in range(length)]


def prefill(model, length):
    """Seconds of a prompt."""
    tokens, cache = mx.array([prompt(length, 0)]), make_prompt_cache(model)
    mx.eval(tokens)
    start = time.perf_counter()
    for first in range(0, length, CHUNK):
        logits = model(tokens[:, first : first + CHUNK], cache=cache)
        last = first + CHUNK >= length
        mx.eval([layer.state for layer in cache], mx.argmax(logits[:, -1], axis=-1) if last else [])
    return time.perf_counter() - start


def decode(model, batch, context, steps):
    """Tokens and seconds of `steps` steps."""
    generator = BatchGenerator(
        model, max_tokens=steps + 64, completion_batch_size=batch, prefill_batch_size=min(batch, 8)
    )
    generator.insert([prompt(context, sequence) for sequence in range(batch)])
    while len(generator.next_generated()) < batch:
        pass
    generator.next_generated()
    start = time.perf_counter()
    tokens = sum(len(generator.next_generated()) for _ in range(steps))
    seconds = time.perf_counter() - start
    generator.close()
    return tokens, seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt", type=numbers, default=[8])
    parser.add_argument("--batch", type=numbers, default=[1])
    parser.add_argument("--context", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    args = parser.parse_args()

    def line(**fields):
        print(json.dumps({"engine": "mlx-lm", "device": args.device, **fields}), flush=True)

    mx.set_default_device(mx.cpu if args.device == "cpu" else mx.gpu)
    start = time.perf_counter()
    model = load_model(args.model)[0]
    mx.eval(model.parameters())
    versions = f"mlx-lm {version('mlx-lm')}, mlx {version('mlx')}"
    line(name="load", seconds=round(time.perf_counter() - start, 3), version=versions)
    for length in args.prompt:
        if args.device == "gpu":
            prefill(model, length)
        line(name=f"prefill{length}", batch=1, tok_s=round(length / prefill(model, length), 2))
    for batch in args.batch:
        tokens, seconds = decode(model, batch, args.context, args.steps)
        line(name="decode", batch=batch, tok_s=round(tokens / seconds, 2))
        mx.clear_cache()


if __name__ == "__main__":
    main()
