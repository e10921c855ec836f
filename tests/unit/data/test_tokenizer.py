"""Tokenizers: decoding gives the text back, byte counts are exact, saved folders open again, in transformers too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from llm.core.errors import UserError
from llm.data.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer, load_tokenizer
from llm.data.tokenizer.backend import BackendTokenizer, train_bpe

TEXTS = [Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("test_tokenizer.py", "helpers.py")] * 3
AWKWARD = [
    "",
    " ",
    "a",
    "  two  blanks \n\n\n\ttab\r\n    indented\n",
    "naïve café — “quoted” …\u00a0x",
    "日本語 русский ελληνικά 😀👩‍👩‍👧 a\u0301",
    "\0\x01\x1c\x1f\x7f\x85\u2028\ufeff\ufffd",
    "▁▁ a▁b ▁",
    "<|endoftext|> <unk> <s> <0x41>",
    "x = 12345.678e-9; y[0]['k']=None\n\n\n    def f():\n        return 1\n",
    "①²Ⅷ٣",
]
KINDS = ["bytes", "bpe", "sp_bpe", "sp_unigram"]


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    sizes = {"bytes": None, "bpe": 500, "sp_bpe": 450, "sp_unigram": 450}
    return {kind: build_tokenizer(TokenizerConfig(kind=kind, vocab_size=size), TEXTS) for kind, size in sizes.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_gives_the_text_back(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    for text in [*AWKWARD, *TEXTS[:2]]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids, tokenizer.eos_id]) == text
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.eos_id not in ids
        assert tokenizer.token_bytes()[np.array(ids, dtype=int)].sum() == len(text.encode())


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(text=st.text())
def test_any_text_round_trips(tokenizers: dict[str, Tokenizer], kind: str, text: str) -> None:
    assert tokenizers[kind].decode(tokenizers[kind].encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_batches_agree_with_single_texts(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    assert tokenizer.encode_batch(AWKWARD) == [tokenizer.encode(text) for text in AWKWARD]
    assert tokenizer.encode_batch([]) == []


@pytest.mark.parametrize("kind", KINDS)
def test_saved_folder_opens_again(tokenizers: dict[str, Tokenizer], kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizers[kind]
    tokenizer.save(tmp_path / "tokenizer")
    for folder in (tmp_path / "tokenizer", tmp_path):
        again = load_tokenizer(folder)
        assert (again.hash, again.kind, again.vocab_size, again.eos_id) == (
            tokenizer.hash,
            tokenizer.kind,
            tokenizer.vocab_size,
            tokenizer.eos_id,
        )
        assert again.encode_batch(AWKWARD) == tokenizer.encode_batch(AWKWARD)


def test_chars() -> None:
    tokenizer = build_tokenizer(TokenizerConfig(kind="chars"), ["hello", "wörld"])
    assert tokenizer.vocab_size == len(set("hellowörld")) + 1
    assert tokenizer.decode(tokenizer.encode("hör")) == "hör"
    assert tokenizer.token_bytes()[tokenizer.encode("ö")].tolist() == [2]
    with pytest.raises(UserError, match="character 'X'"):
        tokenizer.encode("helXo")
    with pytest.raises(UserError, match="no characters"):
        build_tokenizer(TokenizerConfig(kind="chars"), [])


def test_chars_saved(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(TokenizerConfig(kind="chars"), ["ab\n \u2581é"])
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).encode("é\na") == tokenizer.encode("é\na")


def test_training_is_repeatable() -> None:
    assert train_bpe(TEXTS, 400).hash == train_bpe(TEXTS, 400).hash
    assert train_bpe(TEXTS, 400).hash != train_bpe(TEXTS, 401).hash


def test_bpe_digits_stand_alone_and_indentation_merges(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["bpe"]
    assert len(tokenizer.encode("123456")) == 6
    assert len(tokenizer.encode("):\n    ")) < 4


@pytest.mark.parametrize("kind", ["bytes", "chars", "bpe", "sp_bpe", "sp_unigram"])
def test_transformers_opens_it_with_the_same_ids(tokenizers: dict[str, Tokenizer], kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = tokenizers.get(kind) or build_tokenizer(TokenizerConfig(kind="chars"), TEXTS)
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == tokenizer.eos_id
    for text in [TEXTS[1], "  a b\n\n    c"]:
        ids = tokenizer.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs.decode(ids) == text


def test_hugging_face_folder_with_bos(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    backend = Backend(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3, "[UNK]": 4}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}, "bos_token": "<s>"}')
    tokenizer = build_tokenizer(TokenizerConfig(kind="hf", path=str(tmp_path)), [])
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.start_id) == (1, 0, 0)
    assert tokenizer.encode("a b a") == [2, 3, 2]
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="eos_token"):
        load_tokenizer(tmp_path)


def test_mistakes_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer in"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="at least 257"):
        train_bpe(TEXTS, 100)
    with pytest.raises(UserError, match="cannot train vocab_size"):
        build_tokenizer(TokenizerConfig(kind="sp_unigram", vocab_size=30_000), ["a few words"])
    with pytest.raises(UserError):
        build_tokenizer(TokenizerConfig(kind="hf", path=str(tmp_path / "absent" / "folder")), [])


@pytest.mark.parametrize(
    "tree",
    [
        {"kind": "bpe"},
        {"kind": "hf"},
        {"kind": "bytes", "vocab_size": 300},
        {"kind": "bpe", "vocab_size": 300, "path": "x"},
        {"kind": "word"},
    ],
)
def test_incoherent_configs(tree: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TokenizerConfig.model_validate(tree)


class TestFastWords:
    """The table of words gives the ids that the `tokenizers` library gives."""

    @staticmethod
    def same(tokenizer: Tokenizer, text: str) -> bool:
        assert isinstance(tokenizer, BackendTokenizer)
        return tokenizer.encode(text) == tokenizer._backend.encode(text, add_special_tokens=False).ids

    def test_is_used(self, tokenizers: dict[str, Tokenizer]) -> None:
        assert isinstance(tokenizers["bpe"], BackendTokenizer)
        assert tokenizers["bpe"]._words is not None

    def test_every_character_in_every_place(self, tokenizers: dict[str, Tokenizer]) -> None:
        for low in [*range(0, 0x3100, 32), 0xD7F0, 0xE000, 0xFE00, 0xFF00, 0x1F600, 0x10FFE0]:
            chars = [chr(code) for code in range(low, low + 32) if not 0xD800 <= code < 0xE000]
            for glue in ("", " ", "a", "\n", "1", "  ", ".", "\n  "):
                assert self.same(tokenizers["bpe"], glue.join(chars)), (hex(low), glue)

    @settings(max_examples=300)
    @given(text=st.text(alphabet=st.sampled_from("ab1 \n\t\r._é\u00a0\u2003日😀²\u0301")))
    def test_mixtures(self, tokenizers: dict[str, Tokenizer], text: str) -> None:
        assert self.same(tokenizers["bpe"], text)

    def test_a_full_table_is_emptied(self, tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("llm.data.tokenizer.words._MAX_WORDS", 10)
        for text in TEXTS[:2]:
            assert self.same(tokenizers["bpe"], text)
        words = tokenizers["bpe"]._words  # type: ignore[attr-defined]
        tokenizers["bpe"].encode("x")
        assert len(words._table) <= 10
