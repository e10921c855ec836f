"""Bad command lines and configs of a run. See test_user_errors.py for what $NAMES stand for."""

from __future__ import annotations

import torch

from tests.e2e.bad import Case, layers, rewritten, text_file

CONFIGS = [
    Case(
        "no-config-file",
        "train configs/run/quikstart.yaml",
        ["no such config file", "quikstart.yaml", "did you mean", "quickstart.yaml"],
    ),
    Case("no-config-folder", "train nowhere/x.yaml", ["no such config file", "folder nowhere does not exist"]),
    Case("config-is-a-folder", "train configs/run", ["configs/run is a folder", "YAML"]),
    Case("no-config-at-all", "train", ["config"], lines=9),
    Case(
        "key-typo",
        ["train", "$BASE", "model.layers.0.pattern.0.mixer.n_head=4"],
        ["n_head", "unknown key", "given 4", "did you mean", "n_heads"],
    ),
    Case(
        "section-typo",
        ["train", "$TMP/x.yaml"],
        ["trian", "unknown key", "did you mean 'train'"],
        make=lambda w, tmp: rewritten(w, tmp, lambda t: t.update(trian={"log_every": 5})),
    ),
    Case(
        "override-elsewhere",
        "train $BASE learning_rate=1e-3",
        ["learning_rate", "unknown key", "did you mean", "'optim.lr'"],
    ),
    Case("option-typo", "train $BASE --chekc", ["--chekc", "--check"]),
    Case("wrong-type", "train $BASE train.batch_tokens=lots", ["train.batch_tokens", "'lots'", "whole number"]),
    Case(
        "wrong-choice",
        "train $BASE train.precision=bf61",
        ["train.precision", "'fp32' or 'bf16'", "given 'bf61'", "did you mean 'bf16'"],
    ),
    Case("out-of-range", "train $BASE optim.lr=-0.1", ["optim.lr", "greater than 0", "-0.1"]),
    Case(
        "several-problems",
        "train $BASE optim.lr=-1 train.log_every=0",
        ["2 problems", "optim.lr", "train.log_every"],
        lines=3,
    ),
    Case(
        "broken-yaml",
        "train $TMP/x.yaml",
        ["x.yaml", "line 3", "not valid YAML"],
        make=text_file("x.yaml", "name: a\ntrain: [1, 2\nmodel: {}\n"),
    ),
    Case("yaml-list", "train $TMP/x.yaml", ["x.yaml", "mapping", "list"], make=text_file("x.yaml", "- 1\n- 2\n")),
    Case(
        "repeated-key",
        "train $TMP/x.yaml",
        ["x.yaml", "'seed' is given twice"],
        make=text_file("x.yaml", "seed: 1\nseed: 2\n"),
    ),
    Case("binary-config", "train $TMP/x.yaml", ["x.yaml", "UTF-8"], make=text_file("x.yaml", b"\xff\xfe\x00n")),
    Case(
        "newer-schema",
        "train $TMP/x.yaml",
        ["schema_version 99", "newer"],
        make=text_file("x.yaml", "schema_version: 99\n"),
    ),
    Case("muon-key-with-adamw", "train $BASE optim.momentum=0.9", ["optim.momentum", "no effect", "adamw", "muon"]),
    Case(
        "zero-stage-with-ddp",
        "train $BASE parallel.strategy=ddp parallel.zero_stage=3",
        ["parallel.zero_stage", "no effect", "ddp", "deepspeed"],
    ),
    Case("neither-steps-nor-tokens", "train $BASE train.steps=null", ["needs an end", "train.steps", "train.tokens"]),
    Case(
        "two-warm-ups",
        "train $BASE schedule.warmup_tokens=100 schedule.warmup_fraction=0.1",
        ["schedule", "warmup_tokens", "warmup_fraction"],
    ),
    Case(
        "decay-of-a-cosine",
        "train $BASE schedule.decay_fraction=0.3",
        ["schedule.decay_fraction", "no effect", "cosine", "wsd"],
    ),
    Case(
        "unknown-mixer",
        ["train", "$BASE", layers("{type: atention}")],
        ["mixer", "'atention'", "did you mean 'attention'"],
    ),
    Case(
        "unknown-variant", "train $BASE model.variant=gpt3-124m", ["variant", "'gpt3-124m'", "did you mean 'gpt2-124m'"]
    ),
    Case("unknown-optimizer", "train $BASE optim.type=adamv", ["optim.type", "'adamw'", "given 'adamv'"]),
    Case("heads-do-not-divide", ["train", "$BASE", layers("{type: attention, n_heads: 3}")], ["n_heads", "3", "16"]),
    Case("seq-len-too-long", "train $BASE data.seq_len=64", ["data.seq_len 64", "model.max_seq_len 32"]),
    Case("batch-no-multiple", "train $BASE train.batch_tokens=100", ["train.batch_tokens 100", "multiple", "32", "96"]),
    Case("run-name", "train $BASE name=../up", ["name", "'../up'"]),
    Case(
        "world-size",
        "train $BASE parallel.strategy=ddp",
        ["4 sequences", "3 processes", "multiple of 96"],
        env={"WORLD_SIZE": "3", "RANK": "0"},
    ),
    Case(
        "hsdp-groups",
        "train $BASE parallel.strategy=fsdp2 parallel.replicate=2 train.batch_tokens=96",
        ["parallel.replicate 2", "3 processes"],
        env={"WORLD_SIZE": "3", "RANK": "0"},
    ),
    Case(
        "single-with-several",
        "train $BASE",
        ["parallel.strategy=single", "2 processes", "ddp"],
        env={"WORLD_SIZE": "2", "RANK": "0"},
    ),
    Case("world-size-no-number", "train $BASE", ["WORLD_SIZE", "'two'"], env={"WORLD_SIZE": "two"}),
    Case(
        "no-gpu",
        "train $BASE train.device=cuda",
        ["train.device=cuda", "no GPU", "cpu"],
        needs=lambda: not torch.cuda.is_available(),
    ),
    Case(
        "no-compiler",
        "train $BASE train.compile=true",
        ["train.compile=true", "C++ compiler", "no-such-cxx"],
        env={"CXX": "no-such-cxx", "PATH": "$TMP"},
    ),
    Case("no-wandb", "train $BASE log.wandb=true", ["log.wandb=true", "not installed", "pip install wandb"]),
    Case("profile-backwards", "train $BASE log.profile_steps=[5,2]", ["log.profile_steps", "first <= last", "[5, 2]"]),
]
