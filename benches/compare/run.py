#!/usr/bin/env python3
"""Times omlx, llama.cpp and mlx-lm in turn, on models of the same shape, and prints how they compare.

    run.py --rounds 5 --shape qwen3-0.6b --bits 4 --prompt 512,2048 --batch 1,4,8 [--skip mlx-lm]

Standard output gets every figure as a JSON line, then a Markdown table. A ratio is omlx over the peer; the table has the
median of the rounds' ratios and their range. Every second round runs in the opposite order. mlx-lm takes minutes for a
few tokens on x86, so it has lengths of its own (`--mlx-lm-prompt` and so on), at which omlx is timed too.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PEERS = ["llama.cpp", "mlx-lm"]


@dataclass(frozen=True)
class Lengths:
    """What is timed: prompts of these many tokens, and these batches for some steps after a context."""

    prompt: str
    batch: str
    context: int
    steps: int

    def options(self):
        lengths = ["--prompt", self.prompt, "--batch", self.batch]
        return [*lengths, "--context", str(self.context), "--steps", str(self.steps)]


@dataclass(frozen=True)
class Job:
    """One engine at some lengths."""

    engine: str
    lengths: Lengths
    command: tuple


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", default="qwen3-0.6b", help="one of make_model.py's")
    parser.add_argument("--bits", type=int, choices=[4, 8, 16], default=4)
    parser.add_argument("--prompt", default="512,2048", help="prompt lengths")
    parser.add_argument("--batch", default="1,4,8", help="sequences that decode together")
    parser.add_argument("--context", type=int, default=512, help="tokens before decoding")
    parser.add_argument("--steps", type=int, default=32, help="decoding steps")
    parser.add_argument("--mlx-lm-prompt", default="8")
    parser.add_argument("--mlx-lm-batch", default="1")
    parser.add_argument("--mlx-lm-context", type=int, default=8)
    parser.add_argument("--mlx-lm-steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of omlx and llama.cpp, so that neither crowds the cores")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--precision", choices=["fast", "exact"], default="fast", help="of omlx's products")
    parser.add_argument("--skip", action="append", choices=PEERS, default=[])
    parser.add_argument("--models", type=Path, default=ROOT / "target/compare", help="made there if missing")
    parser.add_argument("--omlx", type=Path, default=ROOT / "target/release/examples/bench")
    parser.add_argument("--llama-cpp-python", default=sys.executable, help="an interpreter that has llama-cpp-python")
    parser.add_argument("--mlx-lm-python", default=sys.executable, help="an interpreter that has mlx-lm")
    return parser.parse_args()


def has(python, module):
    """Whether an interpreter finds a module."""
    probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    try:
        return subprocess.run([python, "-c", probe], capture_output=True).returncode == 0
    except OSError:
        return False


def make(option, path, args):
    """Makes a model unless it is there."""
    if path.exists():
        return path
    print(f"making {path}", file=sys.stderr)
    # Under another name first: half a model must not be taken for one.
    partial = path.with_name(f"partial-{os.getpid()}-{path.name}")
    shape = ["--shape", args.shape, "--bits", str(args.bits)]
    subprocess.run([sys.executable, HERE / "make_model.py", *shape, option, partial], check=True)
    partial.rename(path)
    return path


def jobs(args, peers):
    """What a round runs, in order."""
    name = f"{args.shape}-" + ("bf16" if args.bits == 16 else f"{args.bits}bit")
    threads = ["--threads", str(args.threads)] if args.threads else []
    folder = make("--folder", args.models / name, args)
    long = Lengths(args.prompt, args.batch, args.context, args.steps)
    short = Lengths(args.mlx_lm_prompt, args.mlx_lm_batch, args.mlx_lm_context, args.mlx_lm_steps)

    def job(engine, lengths, *command):
        return Job(engine, lengths, (*map(str, command), "--device", args.device, *lengths.options()))

    def ours(lengths):
        return job("omlx", lengths, args.omlx, folder, "--precision", args.precision, *threads)

    found = [ours(long)]
    if "llama.cpp" in peers:
        gguf = make("--gguf", args.models / f"{name}.gguf", args)
        found.append(job("llama.cpp", long, args.llama_cpp_python, HERE / "time_llama_cpp.py", gguf, *threads))
    if "mlx-lm" in peers:
        if short != long:
            found.append(ours(short))
        found.append(job("mlx-lm", short, args.mlx_lm_python, HERE / "time_mlx_lm.py", folder))
    return found


def measure(job, number):
    """Runs a job; prints its lines and returns tokens/s by measure."""
    print(f"round {number}: {job.engine}", file=sys.stderr)
    done = subprocess.run(job.command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(job.command)}\nended with {done.returncode}:\n{done.stderr[-2000:]}")
    rates = {}
    for text in done.stdout.splitlines():
        line = json.loads(text)
        if line["name"] == "decode":
            line |= {"context": job.lengths.context, "steps": job.lengths.steps}
            rates[f"decode after {line['context']}, B = {line['batch']}"] = line["tok_s"]
        elif "tok_s" in line:
            rates[line["name"].replace("prefill", "prefill ")] = line["tok_s"]
        print(json.dumps({"round": number, **line}), flush=True)
    return rates


def table(results, peers, rounds):
    """Markdown: a row for each measure and peer. `results` holds each round's rates by engine and lengths."""
    print(f"\n| measure | omlx, tok/s | peer | tok/s | omlx / peer, median of {rounds} | range |\n|---|---|---|---|---|---|")
    for engine, lengths in results[0]:
        if engine == "omlx" and any((peer, lengths) in results[0] for peer in peers):
            continue  # its figures stand beside the peer's
        for measure_name in results[0][engine, lengths]:
            ours = [rates["omlx", lengths][measure_name] for rates in results]
            row = f"| {measure_name} | {statistics.median(ours):.2f} |"
            if engine == "omlx":
                print(f"{row} | | | |")
                continue
            theirs = [rates[engine, lengths][measure_name] for rates in results]
            ratios = [a / b for a, b in zip(ours, theirs)]
            row += f" {engine} | {statistics.median(theirs):.2f} | {statistics.median(ratios):.2f} |"
            print(f"{row} {min(ratios):.2f} to {max(ratios):.2f} |")


def processor():
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main():
    args = parse()
    if args.rounds < 1:
        raise SystemExit("--rounds must be at least 1")
    if not args.omlx.exists():
        raise SystemExit(f"{args.omlx} is missing: cargo build --release --example bench")
    pythons = {"llama.cpp": (args.llama_cpp_python, "llama_cpp"), "mlx-lm": (args.mlx_lm_python, "mlx_lm")}
    wanted = [peer for peer in PEERS if peer not in args.skip]
    missing = [peer for peer in wanted if not has(*pythons[peer])]
    peers = [peer for peer in wanted if peer not in missing]
    args.models.mkdir(parents=True, exist_ok=True)
    order = jobs(args, peers)
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    settings = {key: getattr(args, key) for key in ("shape", "bits", "precision", "threads", "rounds")}
    print(json.dumps({"name": "machine", "time": now, "processor": processor(), "cpus": os.cpu_count(), **settings}))
    results = []
    for number in range(args.rounds):
        rates = {}
        for job in order if number % 2 == 0 else order[::-1]:
            rates[job.engine, job.lengths] = measure(job, number)
        results.append(rates)
    table(results, peers, args.rounds)
    for peer in missing:
        print(f"\n{peer}: missing ({pythons[peer][0]} has no {pythons[peer][1]})")


if __name__ == "__main__":
    main()
