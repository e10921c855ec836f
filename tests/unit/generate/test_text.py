"""Text stream: never half a character, never part of a stop text, nothing lost."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.core.init import initialise
from llm.data.tokenizer.simple import BytesTokenizer
from llm.generate.engine import Engine
from llm.generate.sampling import Sampling
from llm.generate.text import TextStream, generate_text
from llm.models.config import ModelConfig
from llm.models.decoder import Decoder

BYTES = [bytes([i]) for i in range(256)] + [b""]


def run(stream: TextStream, tokens: Sequence[int]) -> list[str]:
    out = []
    for token in tokens:
        out.append(stream.push(token))
        if stream.stopped:
            return out
    return [*out, stream.close()]


@given(st.text(max_size=30))
def test_text_comes_back_whole_and_clean(text: str) -> None:
    text = text.encode("utf-8", "replace").decode()
    parts = run(TextStream(BYTES), list(text.encode()))
    assert "".join(parts) == text
    assert "\ufffd" in text or not any("\ufffd" in part for part in parts)


@given(st.binary(max_size=30))
def test_broken_bytes_are_replaced_as_by_a_whole_decode(data: bytes) -> None:
    assert "".join(run(TextStream(BYTES), list(data))) == data.decode("utf-8", "replace")


@given(
    st.text("ab\u00e9", max_size=20),
    st.lists(st.text("ab\u00e9", min_size=1, max_size=4), min_size=1, max_size=3),
    st.data(),
)
def test_stop_texts_across_any_token_borders(text: str, stops: list[str], data: st.DataObject) -> None:
    raw = text.encode()
    pieces: list[bytes] = []
    at = 0
    while at < len(raw):
        n = data.draw(st.integers(1, 3))
        pieces.append(raw[at : at + n])
        at += n
    stream = TextStream(pieces, stops)
    parts = run(stream, range(len(pieces)))
    found = [text.find(stop) for stop in stops if stop in text]
    assert stream.stopped == bool(found)
    if found:
        # Several stops may be completed by one token; the first to begin then counts, as far as tokens tell.
        assert not any(stop in "".join(parts) for stop in stops)
        assert text.startswith("".join(parts)) and any(text[len("".join(parts)) :].startswith(stop) for stop in stops)
    else:
        assert "".join(parts) == text


def test_a_possible_stop_is_held_back_until_decided() -> None:
    stream = TextStream([b"a", b"<e", b"nd", b"x", b">"], ["<end>"])
    assert [stream.push(i) for i in (0, 1, 2, 3)] == ["a", "", "", "<endx"]
    assert [stream.push(i) for i in (1, 2, 4)] == ["", "", ""]
    assert stream.stopped


@pytest.fixture(scope="module")
def model() -> Decoder:
    block = {"mixer": {"type": "attention", "n_heads": 2}, "channel": {"type": "swiglu", "d_hidden": 24}}
    config = ModelConfig(
        vocab_size=257, d_model=16, max_seq_len=64, layers=[{"pattern": [block], "repeat": 1}], init={"std": 0.5}
    )
    built = config.build("cpu")
    initialise(built, 1)
    return built.eval()


def test_generate_text_streams_what_it_returns(model: Decoder) -> None:
    tokenizer = BytesTokenizer()
    got: dict[int, str] = {0: "", 1: "", 2: ""}
    ended: dict[int, object] = {}
    counts = [0, 0, 0]

    def on_text(request: int, text: str, finish: object) -> None:
        assert request not in ended
        got[request] += text
        if finish is not None:
            ended[request] = finish

    def on_token(request: int) -> None:
        counts[request] += 1

    prompts = ["", "h\u00e9", "abcdef"]
    sampling = Sampling(seed=3, max_new_tokens=30, ignore_eos=True)
    texts = generate_text(model, tokenizer, prompts, sampling, on_text=on_text, on_token=on_token)
    assert texts == [got[0], got[1], got[2]]
    assert ended == dict.fromkeys(range(3), "length")
    assert counts == [30, 30, 30]
    tokens = Engine(model).generate([[256, *p.encode()] for p in prompts], sampling)
    assert texts == [tokenizer.decode(c.tokens) for c in tokens]


def test_generate_text_cuts_at_the_stop_text(model: Decoder) -> None:
    tokenizer = BytesTokenizer()
    sampling = Sampling(temperature=1.0, top_k=3, seed=5, max_new_tokens=30, ignore_eos=True)
    (whole,) = generate_text(model, tokenizer, ["ab"], sampling)
    stop = next(whole[i : i + 2] for i in range(8, 20) if whole[i : i + 2].isascii())
    (cut,) = generate_text(model, tokenizer, ["ab"], sampling.replace(stop=[stop]))
    assert cut == whole[: whole.index(stop)]
