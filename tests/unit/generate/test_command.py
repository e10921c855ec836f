"""launch/generate.py: output, repeatability, and a readable message for each mistake."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.generate.runs import MODEL, write_run

Cli = Callable[..., Any]
QUICK = ("max_new_tokens=12", "ignore_eos=true")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny")


class Stdin(io.TextIOWrapper):
    """Standard input that is a pipe with these bytes."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))


def test_a_seed_repeats_the_result(cli: Cli, run_folder: Path) -> None:
    first = cli("generate", run_folder, "--prompt", "ab=c d", "seed=5", *QUICK)
    assert first.code == 0
    assert first.out.startswith("ab=c d")
    assert "12 tokens in" in first.err and "tokens/s" in first.err and "seed 5" in first.err
    again = cli("generate", run_folder / "checkpoints" / "step-000000003", "seed=5", "--prompt=ab=c d", *QUICK)
    streamed = cli("generate", run_folder, "--prompt", "ab=c d", "seed=5", "stream=true", *QUICK)
    assert first.out == again.out == streamed.out
    assert cli("generate", run_folder, "--prompt", "ab=c d", "seed=6", *QUICK).out != first.out


def test_the_seed_that_was_drawn_is_told(cli: Cli, run_folder: Path) -> None:
    first = cli("generate", run_folder, "--prompt", "ab", *QUICK)
    seed = first.err.split("seed ")[1].split()[0]
    assert cli("generate", run_folder, "--prompt", "ab", f"seed={seed}", *QUICK).out == first.out


def test_prompts_from_json_lines(cli: Cli, run_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one", "id": 7}\n\n{"prompt": "h\u00e9"}\n', encoding="utf-8")
    done = cli("generate", run_folder, "--file", file, "jsonl=true", "seed=1", *QUICK)
    assert [json.loads(line)["prompt"] for line in done.out.splitlines()] == ["one", "h\u00e9"]
    for text, message in (("{", "line 1 is no JSON"), ('{"prompt": "a"}\n{"text": "b"}', "line 2 has no text")):
        file.write_text(text, encoding="utf-8")
        refused = cli("generate", run_folder, "--file", file)
        assert refused.code == 2 and message in refused.err


def test_a_saved_state_goes_on_as_the_whole_prompt(cli: Cli, run_folder: Path, tmp_path: Path) -> None:
    whole = cli("generate", run_folder, "--prompt", "ab=c d", "temperature=0", *QUICK)
    state = tmp_path / "text.safetensors"
    saved = cli("generate", run_folder, "--prompt", "ab=c", "--save-state", state)
    assert saved.code == 0 and saved.out == "" and str(state) in saved.err
    found = cli("generate", run_folder, "--load-state", state, "--prompt", " d", "temperature=0", *QUICK)
    assert found.out == whole.out.removeprefix("ab=c")
    refused = cli("generate", run_folder, "--prompt=a", "--prompt=b", "--save-state", state)
    assert refused.code == 2 and "given: 2 prompts" in refused.err
    refused = cli("generate", run_folder, "--prompt=a", "--save-state", state, "temperature=0")
    assert refused.code == 2 and "temperature has no effect with --save-state" in refused.err
    refused = cli("generate", run_folder, "--prompt=a", "--save-state", state / "inside")
    assert refused.code == 2 and "cannot write the state" in refused.err


def test_many_prompts_as_json_lines(cli: Cli, run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("one\nh\u00e9llo\n".encode())
    done = cli(
        "generate", run_folder, "--file", tmp_path / "prompts.txt", "lines=true", "n=2", "jsonl=true", "seed=1", *QUICK
    )
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [(row["prompt"], row["seed"]) for row in rows] == [
        ("one", 1),
        ("one", 2),
        ("h\u00e9llo", 1),
        ("h\u00e9llo", 2),
    ]
    assert {row["finish"] for row in rows} == {"length"}
    alone = cli("generate", run_folder, "--prompt", "h\u00e9llo", "jsonl=true", "seed=2", *QUICK)
    assert json.loads(alone.out) == rows[3]


def test_stdin_is_a_prompt(cli: Cli, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(b"from a pipe"))
    done = cli("generate", run_folder, "temperature=0", *QUICK)
    assert done.out.startswith("from a pipe")
    assert "seed" not in done.err


def test_a_conversation(cli: Cli, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def talk(data: bytes, *arguments: object) -> Any:
        monkeypatch.setattr(sys, "stdin", Stdin(data))
        return cli("generate", run_folder, "--chat", "temperature=0", "max_new_tokens=6", "ignore_eos=true", *arguments)

    def continued(prompt: str) -> str:
        done = cli(
            "generate",
            run_folder,
            "--prompt",
            prompt,
            "temperature=0",
            "echo=false",
            *QUICK,
            "max_new_tokens=6",
            "context=200",
        )
        return done.out.removesuffix("\n")

    first = continued("User: a\nAssistant:")
    assert talk(b"a\n\n").out == f"{first}\n"
    space = "" if first[:1].isspace() else " "
    second = continued(f"User: a\nAssistant:{space}{first}\nUser: b\nAssistant:")
    assert talk(b"a\nb\n", "context=200").out == f"{first}\n{second}\n"
    template = tmp_path / "own.jinja"
    template.write_text("{{ eos_token }}{% for m in messages %}<{{ m.content }}>{% endfor %}")
    done = talk(b"a", "--system", "s", "--chat-template", template)
    assert done.out == continued("<s><a>") + "\n"
    forgetful = talk(b"a\nbb\nccc\n")
    assert forgetful.code == 0 and "messages are forgotten: the context is full" in forgetful.err
    assert talk(b"\xff\n").code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chat", "--prompt", "x"], "--chat reads its messages from stdin; remove --prompt"),
        (["--chat", "n=2"], "n has no effect with --chat"),
        (["--prompt", "x", "--system", "y"], "--system has no effect without --chat"),
    ],
)
def test_mistakes_in_a_conversation(cli: Cli, run_folder: Path, arguments: list[str], message: str) -> None:
    done = cli("generate", run_folder, *arguments)
    assert done.code == 2 and message in done.err


def test_the_context_is_told(cli: Cli, run_folder: Path) -> None:
    done = cli("generate", run_folder, "--prompt", "a" * 30, "temperature=0", "max_new_tokens=100", "ignore_eos=true")
    assert done.code == 0
    assert "17 tokens in" in done.err and "stopped at the model's context of 48 tokens" in done.err
    longer = cli(
        "generate",
        run_folder,
        "--prompt",
        "a" * 30,
        "temperature=0",
        "max_new_tokens=40",
        "ignore_eos=true",
        "context=100",
    )
    assert "40 tokens in" in longer.err


def test_a_non_utf8_prompt_in_each_way(
    cli: Cli, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    done = cli("generate", run_folder, "--file", tmp_path / "latin.txt")
    assert done.code == 2
    assert "latin.txt is not valid UTF-8: byte 0xe9 at offset 3" in done.err
    monkeypatch.setattr(sys, "stdin", Stdin(b"\xff\xfe"))
    done = cli("generate", run_folder)
    assert done.code == 2 and "stdin is not valid UTF-8: byte 0xff at offset 0" in done.err
    done = cli("generate", run_folder, "--prompt", "caf\udce9")
    assert done.code == 2 and "not valid UTF-8" in done.err


MISTAKES = [
    (["temprature=1"], "temprature: unknown key; given 1; did you mean 'temperature'?"),
    (["temperature=hot"], "temperature"),
    (["temperature=-1"], "temperature"),
    (["temperature=0", "top_k=5"], "top_k has no effect with temperature=0"),
    (["top_p=1.5"], "top_p"),
    (["max_new_tokens=0"], "max_new_tokens"),
    (['stop=""'], "stop holds an empty text"),
    (["--promt", "x"], "did you mean --prompt"),
    (["stray"], "unexpected argument 'stray'; a prompt is given as --prompt TEXT"),
    (["device=tpu"], "device"),
    (["n=2", "stream=true"], "stream=true prints one continuation"),
    (["--file", "/nonexistent.txt"], "cannot read the prompt file /nonexistent.txt"),
    (["tokenizer=/nonexistent"], "no tokenizer in /nonexistent"),
    (["context=1"], "context"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_mistakes(cli: Cli, run_folder: Path, arguments: list[str], message: str) -> None:
    done = cli("generate", run_folder, "--prompt", "x", *arguments)
    assert done.code == 2, done.err
    assert message in done.err
    assert "Traceback" not in done.err


def test_a_prompt_that_is_too_long(cli: Cli, run_folder: Path) -> None:
    done = cli("generate", run_folder, "--prompt", "a" * 48)
    assert done.code == 2
    assert "prompt 0 has 49 tokens and the model's context is 48" in done.err


def test_models_that_are_not_there(cli: Cli, run_folder: Path, tmp_path: Path) -> None:
    done = cli("generate", run_folder.parent / "tny", "--prompt", "x")
    assert done.code == 2 and "did you mean" in done.err and "tiny" in done.err
    bare = write_run(tmp_path / "bare", tokenizer=False)
    done = cli("generate", bare, "--prompt", "x")
    assert done.code == 2 and "no tokenizer found" in done.err and "tokenizer=FOLDER" in done.err
    broken = tmp_path / "broken"
    shutil.copytree(run_folder, broken)
    shard = next((broken / "checkpoints").glob("step-*/model/*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    done = cli("generate", broken, "--prompt", "x")
    assert done.code == 2 and "none of the 1 checkpoints" in done.err


def test_a_tokenizer_of_another_model(cli: Cli, tmp_path: Path) -> None:
    small = write_run(tmp_path / "small", model={**MODEL, "vocab_size": 100})
    done = cli("generate", small, "--prompt", "x")
    assert done.code == 2 and "the tokenizer has 257 tokens, the model" in done.err and "only 100" in done.err


def test_a_learned_position_table_is_the_limit(cli: Cli, tmp_path: Path) -> None:
    learned = write_run(tmp_path / "learned", model={**MODEL, "position": "learned"})
    done = cli("generate", learned, "--prompt", "x", "context=100")
    assert done.code == 2 and "context=100 is more than the 48 tokens" in done.err


@pytest.mark.parametrize("drafter", ["lookup", "lookup:2", "model"])
def test_speculation_changes_nothing_but_the_time(cli: Cli, run_folder: Path, drafter: str) -> None:
    command = ["generate", str(run_folder), "--prompt", "ab ab ab", "--prompt", "x", "temperature=0"]
    plain = cli(*command, "max_new_tokens=30")
    words = [f"model:{run_folder}"] if drafter == "model" else [drafter]
    found = cli(*command, "--speculate", *words, "--draft-tokens", "3", "max_new_tokens=30")
    assert (found.code, found.out) == (plain.code, plain.out) == (0, plain.out)
    assert "tokens per verification" in found.err
    assert "times as fast as plain decoding" in found.err
    if drafter == "model":
        assert "100.0% of" in found.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--speculate", "guess"], "cannot draft with 'guess'; allowed: lookup"),
        (["--speculate", "slice:1/4"], "slice is for nested models"),
        (["--speculate", "loops:1"], "is for a looped model"),
        (["--speculate", "lookup:0"], "needs a whole number of at least 1"),
        (["--speculate", "lookup", "--draft-tokens", "many"], "needs a whole number"),
        (["--draft-tokens", "3"], "--draft-tokens has no effect without --speculate"),
        (["--speculate", "lookup-tree"], "needs a whole number of at least 1"),
        (["--speculate", "model:nowhere"], "nowhere"),
    ],
)
def test_mistakes_in_speculation(cli: Cli, run_folder: Path, words: list[str], message: str) -> None:
    found = cli("generate", str(run_folder), "--prompt", "x", *words)
    assert found.code == 2
    assert message in found.err
