"""Text and tokens of one output stay together, whatever is held back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llm.generate.events import TokenEvent
from llm.serve.output import Output, Piece

PIECES = [b"a", b"b", b"ab", b"\n", b"\xc3", b"\xa9", b"\xe2\x82", b"\xac", b"", b"ba\n"]
STOPS = ["ab", "\n\n", "\u20ac", "bab", "\u00e9a"]


def run(tokens: list[int], stop: list[str], end_ids: frozenset[int] = frozenset()) -> list[Piece]:
    output = Output(PIECES, stop, end_ids)
    pieces = []
    for n, token in enumerate(tokens, 1):
        stopped = output.stop(token)
        finish = "stop" if stopped else "length" if n == len(tokens) else None
        piece = output.take(TokenEvent(0, token, finish, -float(n), ((token, -float(n)),)))
        pieces += [piece] if piece is not None else []
        if stopped:
            break
    return pieces


@given(st.lists(st.integers(0, len(PIECES) - 1), min_size=1, max_size=12), st.lists(st.sampled_from(STOPS), max_size=2))
def test_text_and_tokens_agree(tokens: list[int], stop: list[str]) -> None:
    pieces = run(tokens, stop)
    text = "".join(piece.text for piece in pieces)
    infos = [info for piece in pieces for info in piece.infos]
    whole = b"".join(PIECES[token] for token in tokens)
    ends = [at for at in (whole.find(one.encode()) for one in stop) if at >= 0]
    # A stop text that is complete first may begin later than another.
    assert text == whole.decode(errors="replace") or any(text == whole[:at].decode(errors="replace") for at in ends)
    assert [info.token for info in infos] == tokens[: len(infos)]
    assert [info.logprob for info in infos] == [-1.0 - n for n in range(len(infos))]
    said = b"".join(PIECES[info.token] for info in infos).decode(errors="replace")
    assert said.rstrip("\ufffd").startswith(text.rstrip("\ufffd")) or text == said
    assert [piece.finish for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish is not None


def test_tokens_of_a_stop_text_are_left_out() -> None:
    pieces = run([0, 3, 3], ["\n\n"])
    assert "".join(piece.text for piece in pieces) == "a"
    assert [info.token for piece in pieces for info in piece.infos] == [0]


def test_offsets_count_characters() -> None:
    infos = [info for piece in run([0, 4, 5, 1], []) for info in piece.infos]
    assert [info.offset for info in infos] == [0, 1, 1, 2]


def test_a_token_that_ends_the_output() -> None:
    pieces = run([0, 1, 0], [], frozenset({1}))
    assert ("".join(piece.text for piece in pieces), pieces[-1].finish) == ("a", "stop")
    assert [info.token for piece in pieces for info in piece.infos] == [0]
