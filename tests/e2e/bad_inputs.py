"""Bad data, checkpoints, prompts and folders. See test_user_errors.py for what $NAMES stand for."""

from __future__ import annotations

import shutil
import sys

import torch

from tests.e2e.bad import (
    Case,
    damage_all,
    flip,
    hf_folder,
    no_holdout,
    other_corpus,
    pickled_weights,
    short_safetensors,
    spoiled_data,
    spoiled_run,
    text_file,
    truncate,
)

DATA = [
    Case("no-data", "train $BASE data.path=$TMP/nowhere", ["no prepared data", "$TMP/nowhere", "prepare"]),
    Case(
        "no-data-check", "train $BASE data.path=$TMP/nowhere --check", ["no prepared data", "$TMP/nowhere", "prepare"]
    ),
    Case("raw-text-as-data", "train $BASE data.path=$TEXT", ["no manifest.json", "$TEXT", "prepare"]),
    Case("vocabulary", "train $BASE model.vocab_size=100", ["model.vocab_size is 100", "257 tokens"]),
    Case(
        "short-bin",
        "train $BASE data.path=$TMP/data",
        ["train.bin", "bytes", "truncated"],
        make=spoiled_data(lambda d: truncate(d / "train.bin")),
    ),
    Case(
        "short-bin-check",
        "train $BASE data.path=$TMP/data --check",
        ["train.bin", "bytes", "truncated"],
        make=spoiled_data(lambda d: truncate(d / "train.bin")),
    ),
    Case(
        "short-idx",
        "train $BASE data.path=$TMP/data",
        ["train.idx", "bytes", "truncated"],
        make=spoiled_data(lambda d: truncate(d / "train.idx")),
    ),
    Case(
        "no-idx",
        "train $BASE data.path=$TMP/data",
        ["no such file", "train.idx"],
        make=spoiled_data(lambda d: (d / "train.idx").unlink()),
    ),
    Case(
        "flipped-bin",
        "train $BASE data.path=$TMP/data data.verify=true",
        ["train.bin", "sha256", "damaged"],
        make=spoiled_data(lambda d: flip(d / "train.bin")),
    ),
    Case(
        "broken-manifest",
        "train $BASE data.path=$TMP/data",
        ["manifest.json", "damaged"],
        make=spoiled_data(lambda d: (d / "manifest.json").write_text('{"splits": {')),
    ),
    Case(
        "empty-manifest",
        "train $BASE data.path=$TMP/data",
        ["manifest.json", "not a manifest"],
        make=spoiled_data(lambda d: (d / "manifest.json").write_text("{}")),
    ),
    Case(
        "no-tokenizer",
        "train $BASE data.path=$TMP/data",
        ["tokenizer", "$TMP/data"],
        make=spoiled_data(lambda d: shutil.rmtree(d / "tokenizer")),
    ),
    Case(
        "evaluation-without-held-out",
        "train $BASE data.path=$TMP/data eval.every_steps=2",
        ["eval.every_steps", "held-out", "prepare"],
        make=no_holdout,
    ),
    Case("no-match", "prepare $PREPARE sources.0.paths=[$TMP/*.txt] out=$TMP/out", ["no text file", "$TMP/*.txt"]),
    Case(
        "all-rejected",
        "prepare $PREPARE sources.0.paths=[$TMP/bad.txt] out=$TMP/out",
        ["reject"],
        make=text_file("bad.txt", b"\xff\xff\n"),
    ),
    Case(
        "unknown-source",
        "prepare $PREPARE sources.0.type=txt out=$TMP/out",
        ["sources", "'txt'", "did you mean 'text'"],
    ),
    Case(
        "unknown-tokenizer",
        "prepare $PREPARE tokenizer.kind=bep out=$TMP/out",
        ["tokenizer.kind", "'bpe'", "given 'bep'"],
    ),
    Case(
        "vocabulary-too-small",
        ["prepare", "$PREPARE", "tokenizer={kind: bpe, vocab_size: 100}", "out=$TMP/out"],
        ["vocab_size is 100", "at least 257"],
    ),
    Case(
        "jsonl-field",
        ["prepare", "$PREPARE", "sources=[{type: jsonl, paths: [$TMP/a.jsonl], field: body}]", "out=$TMP/out"],
        ["reject", "body"],
        make=text_file("a.jsonl", '{"text": "one"}\n{"text": "two"}\n'),
    ),
    Case("out-is-a-file", "prepare $PREPARE out=$TMP/out", ["$TMP/out"], make=text_file("out", "x")),
    Case("out-holds-others", "prepare $PREPARE seed=9 out=$DATA", ["$DATA", "another config", "overwrite"]),
    Case(
        "no-tokenizer-folder",
        ["prepare", "$PREPARE", "tokenizer={kind: bpe, path: $TMP/tok}", "out=$TMP/out"],
        ["no tokenizer", "$TMP/tok"],
    ),
    Case("no-out", "prepare $PREPARE out=null", ["out", "text"]),
]


RESUME = [
    Case(
        "runs-dir-is-a-file", "train $BASE runs_dir=$TMP/file", ["$TMP/file", "runs_dir"], make=text_file("file", "x")
    ),
    Case(
        "runs-dir-is-a-file-check",
        "train $BASE runs_dir=$TMP/file --check",
        ["runs_dir", "$TMP/file", "cannot be written"],
        make=text_file("file", "x"),
    ),
    Case(
        "runs-dir-not-writable",
        "train $BASE runs_dir=/proc/runs",
        ["/proc/runs", "runs_dir"],
        needs=lambda: sys.platform == "linux",
    ),
    Case(
        "changed-data",
        "train $BASE runs_dir=$TMP/runs data.path=$TMP/data train.steps=6",
        ["fingerprint", "data"],
        make=other_corpus,
    ),
    Case(
        "changed-seed",
        "train $BASE runs_dir=$TMP/runs seed=7 train.steps=6",
        ["fingerprint", "seed"],
        make=spoiled_run(lambda run: None),
    ),
    Case(
        "all-checkpoints-damaged",
        "train $BASE runs_dir=$TMP/runs train.steps=6",
        ["none of the 2 checkpoints", "model"],
        make=spoiled_run(damage_all),
        lines=3,
    ),
    Case(
        "other-shape",
        ["train", "$BASE", "runs_dir=$TMP/runs", "train.steps=6", "model.d_model=32"],
        ["does not fit", "shape", "[257, 16]", "[257, 32]"],
        make=spoiled_run(lambda run: None),
    ),
    Case(
        "other-optimizer",
        "train $BASE runs_dir=$TMP/runs train.steps=6 optim.type=muon",
        ["does not fit", "optim/"],
        make=spoiled_run(lambda run: None),
    ),
    Case(
        "init-from-nothing",
        "train $BASE runs_dir=$TMP/runs checkpoint.init_from=$TMP/nowhere",
        ["no checkpoint", "$TMP/nowhere"],
    ),
    Case(
        "init-from-other-shape",
        "train $BASE runs_dir=$TMP/runs checkpoint.init_from=$RUN model.d_model=32",
        ["checkpoint.init_from $RUN", "of another shape"],
    ),
]


USE = [
    Case("prompt-not-utf8", ["generate", "$RUN", "--prompt", "caf\udce9"], ["not valid UTF-8", "\\xe9"]),
    Case(
        "prompt-file-not-utf8",
        "generate $RUN --file $TMP/p.txt",
        ["$TMP/p.txt", "not valid UTF-8", "0xe9"],
        make=text_file("p.txt", b"caf\xe9"),
    ),
    Case("stdin-not-utf8", "generate $RUN", ["stdin", "not valid UTF-8"], stdin=b"\xff\xfe"),
    Case("no-prompt-file", "generate $RUN --file $TMP/p.txt", ["cannot read the prompt file", "$TMP/p.txt"]),
    Case(
        "empty-prompt-lines",
        "generate $RUN --file $TMP/p.txt lines=true",
        ["no prompt", "no lines"],
        make=text_file("p.txt", ""),
    ),
    Case("generate-from-text", "generate $TEXT --prompt a", ["no checkpoint", "$TEXT", "run folder"]),
    Case("generate-from-nothing", "generate $RUN-x --prompt a", ["does not exist", "did you mean $RUN"]),
    Case("no-model", ["generate", "--prompt", "a"], ["model"]),
    Case("temperature", "generate $RUN --prompt a temperature=-1", ["temperature", "greater than or equal to 0", "-1"]),
    Case("top-p", "generate $RUN --prompt a top_p=1.5", ["top_p", "less than or equal to 1", "1.5"]),
    Case("greedy-top-k", "generate $RUN --prompt a temperature=0 top_k=5", ["top_k", "no effect", "temperature=0"]),
    Case(
        "sampling-typo",
        "generate $RUN --prompt a temprature=1",
        ["temprature", "unknown key", "did you mean 'temperature'"],
    ),
    Case("stray-word", "generate $RUN hello", ["'hello'", "--prompt"]),
    Case(
        "generate-no-gpu",
        "generate $RUN --prompt a device=cuda",
        ["device=cuda", "no CUDA"],
        needs=lambda: not torch.cuda.is_available(),
    ),
    Case("wrong-tokenizer", "generate $RUN --prompt a tokenizer=$TMP", ["no tokenizer", "$TMP"]),
    Case("evaluate-no-text", "evaluate $RUN $TMP/x.txt", ["no such file", "$TMP/x.txt"]),
    Case("evaluate-empty-text", "evaluate $RUN $TMP/x.txt", ["$TMP/x.txt", "no text"], make=text_file("x.txt", "")),
    Case(
        "evaluate-not-utf8",
        "evaluate $RUN $TMP/x.txt",
        ["$TMP/x.txt", "not valid UTF-8"],
        make=text_file("x.txt", b"\xff"),
    ),
    Case("evaluate-stride", "evaluate $RUN $TEXT/00.txt stride=100", ["stride=100", "32"]),
    Case("evaluate-split", "evaluate $RUN split=test", ["'test'", "train, valid"]),
    Case("evaluate-nothing", "evaluate", ["no model given"]),
    Case(
        "evaluate-damaged",
        "evaluate $TMP/runs/tiny",
        ["none of the 2 checkpoints"],
        make=spoiled_run(damage_all),
        lines=3,
    ),
    Case("export-out-not-empty", "export $RUN $TEXT", ["$TEXT", "not empty"]),
    Case("export-one-path", "export $RUN", ["a run and the folder"]),
    Case("export-dtype", "export $RUN $TMP/out dtype=fp16", ["dtype", "'fp32' or 'bf16'", "'fp16'"]),
    Case(
        "import-pickle",
        "export import $TMP/hf $TMP/run",
        ["pytorch_model.bin", "pickle", "safetensors"],
        make=hf_folder(pickled_weights),
    ),
    Case(
        "import-short",
        "export import $TMP/hf $TMP/run",
        ["model.safetensors", "damaged or cut short"],
        make=hf_folder(short_safetensors),
    ),
    Case("import-no-weights", "export import $TMP/hf $TMP/run", ["no weights"], make=hf_folder(lambda folder: None)),
    Case("import-text", "export import $TEXT $TMP/run", ["no config.json", "$TEXT"]),
    Case("estimate-world-size", "estimate $BASE world_size=0", ["world_size", "'0'"]),
    Case("estimate-no-vocabulary", "estimate $BASE data.path=$TMP/nowhere", ["model.vocab_size", "no prepared data"]),
    Case("bench-unknown-shape", "bench train shapes=llama-125m", ["'llama-125m'", "did you mean 'llama-124m'"]),
    Case("bench-unknown-subject", "bench infer", ["'infer'", "allowed: train, generate"]),
    Case("unknown-command", "trane $BASE", ["unknown command 'trane'", "did you mean 'train'"]),
]
