"""usage: python evals/bench_prepare.py [--size 1GB] [--corpus PATH ...] [--workers 2] [--vocab-size 4096]

Speed and memory of `launch/prepare.py` beside `datasets.map` with the same tokenizer, the same text and as many
processes, at a quarter of the size and at the size. One JSON line per run and size.

The text is a JSON-lines file that repeats a corpus (default: the Python standard library) up to the size. Ours is timed
from the start of the command to its end, so with reading, joining, hashing and the manifest; of datasets, mb_per_s is
that of `map` alone and mb_per_s_total includes `load_dataset`. peak_rss_mb and peak_uss_mb are sums over all processes;
files that are mapped into memory count in the first and not in the second. correct: both gave the same tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from evals.command import run_command

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llm.config.base import parse_count  # noqa: E402
from llm.core.errors import UserError  # noqa: E402
from llm.data.prepare.config import PrepareConfig  # noqa: E402
from llm.data.prepare.run import prepare  # noqa: E402
from llm.data.store import open_split, read_manifest  # noqa: E402
from llm.data.tokenizer import load_tokenizer  # noqa: E402

_MAP = """
import json, sys, time
import datasets
from transformers import AutoTokenizer
path, folder, cache, workers = sys.argv[1:4] + [int(sys.argv[4])]
datasets.disable_progress_bars()
tokenizer = AutoTokenizer.from_pretrained(folder)
start = time.monotonic()
data = datasets.load_dataset("json", data_files=path, split="train", cache_dir=cache)
loaded = time.monotonic()
def encode(batch):
    return {"input_ids": tokenizer(batch["text"], split_special_tokens=True, add_special_tokens=False)["input_ids"]}
out = data.map(encode, batched=True, num_proc=workers, remove_columns=data.column_names)
mapped = time.monotonic()
first = [list(map(int, out[i]["input_ids"])) for i in range(min(20, len(out)))]
from pyarrow import compute
tokens = sum(compute.sum(compute.list_value_length(chunk)).as_py() for chunk in out.data.column("input_ids").chunks)
print(json.dumps({"load_seconds": loaded - start, "map_seconds": mapped - loaded, "tokens": tokens, "first": first}))
"""


def size_of(text: str) -> int:
    """Bytes of a size such as 1GB or 250MB."""
    try:
        return int(parse_count(text.upper().removesuffix("B").replace("G", "b")))
    except ValueError as error:
        raise UserError(f"--size {text!r} is not a size such as 250MB or 1GB") from error


def write_text(path: Path, documents: list[str], size: int) -> tuple[int, float]:
    """Repeat documents as JSON lines up to `size` bytes of text; returns (bytes of text, how often it repeats)."""
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents]
    sizes = [len(text.encode()) for text in documents]
    written = n = 0
    with open(path, "w", encoding="utf-8") as stream:
        while written < size:
            stream.write(lines[n % len(lines)])
            written += sizes[n % len(lines)]
            n += 1
    return written, n / len(lines)


def measure(command: list[str], environment: dict[str, str]) -> tuple[float, float, float, str]:
    """Run a command; (seconds, peak RSS and peak USS of all its processes together in MB, its output)."""
    start = time.monotonic()
    # A file, not a pipe: nobody reads while the command runs, and a full pipe would stop it.
    output = tempfile.TemporaryFile("w+")
    process = subprocess.Popen(command, env=os.environ | environment, stdout=output, cwd=ROOT)
    watched = psutil.Process(process.pid)
    peak_rss = peak_uss = 0.0
    while process.poll() is None:
        rss = uss = 0
        for each in [watched, *_children(watched)]:
            try:
                memory = each.memory_full_info()
            except psutil.Error:
                continue
            rss, uss = rss + memory.rss, uss + memory.uss
        peak_rss, peak_uss = max(peak_rss, rss / 1e6), max(peak_uss, uss / 1e6)
        time.sleep(0.2)
    seconds = time.monotonic() - start
    output.seek(0)
    if process.returncode:
        raise UserError(f"{command[1]} ended with code {process.returncode}")
    return seconds, peak_rss, peak_uss, output.read()


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def corpus(paths: list[str], vocab_size: int, folder: Path) -> list[str]:
    """Documents of the corpus, and a tokenizer trained on it in folder/base/tokenizer."""
    source: dict[str, Any] = {"type": "text", "paths": paths} if paths else {"type": "stdlib"}
    tokenizer = {"kind": "bpe", "vocab_size": vocab_size}
    tree = {"sources": source, "tokenizer": tokenizer, "out": str(folder / "base")}
    prepare(PrepareConfig.model_validate(tree), quiet=True)
    store, tokens = open_split(folder / "base", "train"), load_tokenizer(folder / "base")
    documents = [tokens.decode(store.document(i)) for i in range(len(store))]
    pieces = [text[at : at + 100_000] for text in documents for at in range(0, len(text), 100_000)]
    return [piece for piece in pieces if piece.strip()]


def compare(folder: Path, documents: list[str], size: int, workers: int) -> None:
    """Both tools on one size; prints two lines."""
    path, tokenizer = folder / "text.jsonl", folder / "base" / "tokenizer"
    n_bytes, repeats = write_text(path, documents, size)
    conditions = {
        "bench": "prepare",
        "text_mb": round(n_bytes / 1e6, 1),
        "corpus_repeats": round(repeats, 1),
        "workers": workers,
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("tokenizers", "datasets", "transformers")},
    }
    out = folder / "ours"
    tree = {
        "sources": [{"type": "jsonl", "paths": [str(path)]}],
        "tokenizer": {"kind": "bpe", "path": str(tokenizer)},
        "out": str(out),
        "workers": workers,
    }
    config = folder / "prepare.yaml"
    config.write_text(json.dumps(tree))
    command = [sys.executable, "launch/prepare.py", str(config)]
    load = os.getloadavg()[0]
    seconds, rss, uss, _ = measure(command, {})
    manifest = read_manifest(out)
    assert manifest is not None
    totals = manifest["splits"]["train"]
    ours = {
        "tool": "manyformer",
        "seconds": round(seconds, 1),
        "mb_per_s": round(n_bytes / 1e6 / seconds, 2),
        "peak_rss_mb": round(rss),
        "peak_uss_mb": round(uss),
        "tokens": totals["tokens"] - totals["documents"],
        "load_before": round(load, 1),
    }
    load = os.getloadavg()[0]
    cache = folder / "cache"
    command = [sys.executable, "-c", _MAP, str(path), str(tokenizer), str(cache), str(workers)]
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "TOKENIZERS_PARALLELISM": "false"}
    seconds, rss, uss, text = measure(command, environment)
    said = json.loads(text.strip().splitlines()[-1])
    theirs = {
        "tool": "datasets.map",
        "seconds": round(said["load_seconds"] + said["map_seconds"], 1),
        "mb_per_s": round(n_bytes / 1e6 / said["map_seconds"], 2),
        "mb_per_s_total": round(n_bytes / 1e6 / (said["load_seconds"] + said["map_seconds"]), 2),
        "peak_rss_mb": round(rss),
        "peak_uss_mb": round(uss),
        "tokens": said["tokens"],
        "load_before": round(load, 1),
    }
    store = open_split(out, "train")
    same = all(store.document(i)[:-1].tolist() == ids for i, ids in enumerate(said["first"]))
    correct = same and ours["tokens"] == theirs["tokens"]
    for line in (ours, theirs):
        print(json.dumps(conditions | line | {"correct": correct}), flush=True)
    del store
    for each in (out, cache):
        shutil.rmtree(each)


def main(arguments: list[str]) -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1GB")
    parser.add_argument("--corpus", nargs="*", default=[])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--keep", help="work in this folder instead of a temporary one")
    options = parser.parse_args(arguments)
    size = size_of(options.size)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.keep or temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        documents = corpus(options.corpus, options.vocab_size, folder)
        for each in (size // 4, size):
            compare(folder, documents, each, options.workers)
    return 0


if __name__ == "__main__":
    run_command(main, "bench_prepare")
