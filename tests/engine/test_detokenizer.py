"""Incremental detokenization gives the same text as decoding all tokens at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from tokenizers.decoders import Decoder

from moe_jax.engine.detokenizer import Detokenizer, StopStrings

WORDS = ("a", "b", "ab", "the", ".", ",", "'s", "n't", "é", "中", "\N{REPLACEMENT CHARACTER}")
SPECIAL = ("<s>", "</s>")


def byte_letters() -> list[str]:
    """Return the letter of each byte in byte-level vocabularies: visible bytes stand for themselves."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = {byte: chr(byte) for byte in visible} | {byte: chr(256 + at) for at, byte in enumerate(hidden)}
    return [letters[byte] for byte in range(256)]


def in_letters(data: bytes) -> str:
    return "".join(byte_letters()[byte] for byte in data)


# Tokens of single bytes, of several characters, and of parts of two characters.
PARTS = [
    "中文".encode()[1:4],
    "😀".encode()[:2],
    "😀".encode()[2:],
    "😀 a".encode()[1:],
    "👍🏽".encode(),
    b"\xff\xfe",
    b" the",
]
BYTE_LEVEL = [in_letters(bytes([byte])) for byte in range(256)] + [in_letters(part) for part in PARTS]
SENTENCE_PIECE = (
    [f"<0x{byte:02X}>" for byte in range(256)] + [mark + word for word in WORDS for mark in ("", "▁")] + ["▁"]
)
WORD_PIECE = [mark + word for word in WORDS for mark in ("", "##")]

MIXTRAL = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
KINDS: dict[str, tuple[Sequence[str], Decoder | None]] = {
    "byte_level": (BYTE_LEVEL, decoders.ByteLevel()),
    "byte_fallback": (SENTENCE_PIECE, MIXTRAL),
    "metaspace": (SENTENCE_PIECE[256:], decoders.Metaspace(prepend_scheme="always")),
    "word_piece": (WORD_PIECE, decoders.WordPiece("##", cleanup=True)),
    "suffixes": ([word + "</w>" for word in WORDS] + list(WORDS), decoders.BPEDecoder("</w>")),
    "fused": (WORDS, decoders.Fuse()),
    "none": (WORDS, None),
}


@cache
def tokenizer(kind: str) -> Tokenizer:
    tokens, decoder = KINDS[kind]
    made = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    if decoder is not None:
        made.decoder = decoder
    made.add_special_tokens(list(SPECIAL))
    made.add_tokens(["<tool 中>"])
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_together_are_the_whole_text(kind: str) -> None:
    made = tokenizer(kind)
    size = made.get_vocab_size()
    ids = st.sampled_from(range(size)) | st.integers(max(size - 40, 0), size)
    texts = st.text(max_size=12).map(lambda text: list(encoded(kind, text)))
    runs = st.lists(st.lists(ids, max_size=30) | texts, max_size=4).map(lambda parts: list(chain(*parts)))

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(runs, st.integers(1, 5), st.booleans())
    def check(tokens: list[int], step: int, skip: bool) -> None:
        stream, emitted, whole = Detokenizer(made, skip), "", made.decode(tokens, skip_special_tokens=skip)
        for at in range(0, len(tokens), step):
            emitted += stream.push(tokens[at : at + step])
            assert whole.startswith(emitted)
        assert emitted + stream.finish() == whole

    check()


def encoded(kind: str, text: str) -> Iterator[int]:
    """Encode a text as byte tokens, if the tokenizer has any."""
    vocabulary = tokenizer(kind).get_vocab(with_added_tokens=False)
    names: dict[str, Callable[[int], str]] = {
        "byte_level": lambda byte: in_letters(bytes([byte])),
        "byte_fallback": lambda byte: f"<0x{byte:02X}>",
    }
    if kind in names:
        yield from (vocabulary[names[kind](byte)] for byte in text.encode())


def emitted(kind: str, tokens: Sequence[int]) -> list[str]:
    stream = Detokenizer(tokenizer(kind))
    return [*(stream.push([token]) for token in tokens), stream.finish()]


def test_a_character_is_emitted_with_its_last_byte() -> None:
    assert emitted("byte_level", list(encoded("byte_level", "é😀."))) == ["", "é", "", "", "", "😀", ".", ""]


def test_invalid_bytes_are_emitted_once_they_are_known_to_be_invalid() -> None:
    invalid = [BYTE_LEVEL.index(in_letters(bytes([byte]))) for byte in b"a\xff\xff\xe4b\xf0\x9f"]
    assert emitted("byte_level", invalid) == ["a", "", "\ufffd", "\ufffd", "\ufffdb", "", "", "\ufffd"]


def test_a_misplaced_byte_changes_the_bytes_before_it() -> None:
    names = ["▁a", "<0xE4>", "<0xB8>", "<0xAD>", "b", "<0xE4>", "<0xB8>", "<0xAD>", "<0xFF>", "b"]
    tokens = [SENTENCE_PIECE.index(name) for name in names]
    assert emitted("byte_fallback", tokens) == ["a", "", "", "", "中b", "", "", "", "", "\ufffd" * 4 + "b", ""]


def test_unknown_tokens_have_no_text() -> None:
    assert emitted("fused", [0, 10_000, 1]) == ["a", "", "b", ""]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_time_is_linear(kind: str) -> None:
    """Bytes that never complete a character are the worst case."""

    def seconds(count: int) -> float:
        invalid = list(range(128, 256)) * (count // 128)
        began = time.process_time()
        stream = Detokenizer(tokenizer(kind))
        for token in invalid:
            stream.push([token])
        stream.finish()
        return time.process_time() - began

    short, long = (min(seconds(count) for _ in range(3)) for count in (1024, 16 * 1024))
    assert long < 64 * short, "16 times the tokens"


LETTERS = st.text(alphabet="ab", max_size=30)


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(st.lists(LETTERS, max_size=8), st.lists(st.text("ab", min_size=1, max_size=5), max_size=4), st.booleans())
def test_stop_strings_cut_pieces_as_they_cut_the_whole_text(parts: list[str], stop: list[str], include: bool) -> None:
    whole = "".join(parts)
    ends = [(whole.find(each) + len(each), whole.find(each)) for each in stop if each in whole]
    end, start = min(ends, default=(len(whole), len(whole)))
    stream, emitted = StopStrings(tuple(stop), include), ""
    for part in parts:
        certain, hit = stream.push(part)
        emitted += certain
        assert hit == stream.hit
        if hit:
            break
        assert not any(each in emitted for each in stop)
    assert stream.hit == bool(ends)
    assert emitted + stream.finish() == whole[: end if include else start]


def test_only_a_possible_stop_string_is_held_back() -> None:
    stream = StopStrings(("END", "Enough"))
    pushed = [stream.push(text) for text in ("The E", "ast, EN", "EN", "D", "more")]
    assert pushed == [("The ", False), ("East, ", False), ("EN", False), ("", True), ("", True)]
    assert stream.finish() == ""
    free = StopStrings(())
    assert free.push("anything") == ("anything", False)
