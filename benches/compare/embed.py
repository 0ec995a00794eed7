"""Embeddings on this machine's CPU: examples/embed_bench against sentence-transformers (PyTorch), in turns.

    embed.py MODEL_FOLDER [--bench target/release/examples/embed_bench] [--threads 2] [--turns 5] [--texts 256]

Two sets of made-up texts: lengths evenly spread from 16 to 256 tokens, and all of 128 tokens. Each turn times one pass of
either program over all texts after one to warm up, tokenising included; the table has medians, and the median and the range of
the ratios of each turn. `--bench` may be given several times, to compare builds.
sentence-transformers sorts by length and pads batches of 32, as it does by default, and of 8, which suits a few cores.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import tempfile
import time


# Texts that sentence-transformers pads together.
BATCHES = (32, 8)


def made_up(tokenizer, lengths, seed):
    """Texts of exactly so many tokens, of whole words that are one token each."""
    words = sorted(w for w in tokenizer.get_vocab() if w.isascii() and w.isalpha() and len(w) > 2)
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(words, k=n - 2)) for n in lengths]
    found = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    assert found == list(lengths), "a word is more than one token"
    return texts


def ours(bench, folder, path, threads, out):
    command = [bench, folder, path, "--rounds", "1", "--threads", str(threads), "--out", out]
    return min(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["seconds"])


def theirs(model, texts, size):
    model.encode(texts, batch_size=size, show_progress_bar=False)
    start = time.perf_counter()
    model.encode(texts, batch_size=size, show_progress_bar=False)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--bench", action="append")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--texts", type=int, default=256)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"
    import numpy as np
    import sentence_transformers
    import torch

    torch.set_num_threads(arguments.threads)
    model = sentence_transformers.SentenceTransformer(arguments.folder, device="cpu")
    print(f"torch {torch.__version__}, sentence-transformers {sentence_transformers.__version__}, "
          f"{arguments.threads} threads, {arguments.texts} texts")
    rng, n = random.Random(1), arguments.texts
    benches = arguments.bench or ["target/release/examples/embed_bench"]
    sets = {"mixed 16-256": [rng.randint(16, 256) for _ in range(n)], "equal 128": [128] * n}
    for name, lengths in sets.items():
        texts = made_up(model.tokenizer, lengths, 2)
        with tempfile.TemporaryDirectory() as folder:
            path, out = os.path.join(folder, "texts"), os.path.join(folder, "vectors")
            with open(path, "w") as file:
                file.write("\n".join(texts) + "\n")
            times = {key: [] for key in [*benches, *BATCHES]}
            for _ in range(arguments.turns):
                for bench in benches:
                    times[bench].append(ours(bench, arguments.folder, path, arguments.threads, out))
                for size in BATCHES:
                    times[size].append(theirs(model, texts, size))
            vectors = np.fromfile(out, np.float32).reshape(n, -1)
        reference = model.encode(texts, show_progress_bar=False)
        cosine = (vectors * reference).sum(1) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(reference, axis=1)
        tokens = sum(lengths)
        print(f"{name}: {tokens} tokens, least cosine {cosine.min():.7f}")
        for size in BATCHES:
            print(f"  sentence-transformers, {size:2}  {tokens / statistics.median(times[size]):8.0f} tokens/s")
        for bench in benches:
            print(f"  {bench}  {tokens / statistics.median(times[bench]):8.0f} tokens/s")
            for size in BATCHES:
                ratios = [b / a for a, b in zip(times[bench], times[size])]
                print(f"    {statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f}) as fast as with {size:2}")


if __name__ == "__main__":
    main()
