"""Incremental detokenization and stop strings. Nothing here imports jax."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence

from tokenizers import Tokenizer

CONTEXT = 4
"""Tokens that are decoded again with each new token. Four bytes reach back to the start of any character. One token
with a text reaches back to the start of the sequence, where decoders leave a space out."""
PROMPT_CONTEXT = 32
"""Tokens at the end of a prompt that are decoded with the first tokens of its continuation."""
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
BYTE = re.compile("<0x[0-9A-F]{2}>")
"""Name of a byte token."""


class Detokenizer:
    """Decode the continuation of a prompt in pieces, in time linear in the number of tokens.

    The pieces together are the text that the continuation adds to the tokenizer's text of the prompt. A piece is
    returned once no later token can change it. A character whose bytes are spread over several tokens is returned with
    the last of them. A SentencePiece byte token (`<0xE4>`) waits for the next token, since one misplaced byte turns all
    bytes around it into replacement characters. `tokenizers.decoders.DecodeStream` returns the first complete
    character, which may turn out wrong.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, prompt: Sequence[int] = ()) -> None:
        """`prompt` decides whether the first word of the continuation begins with a space."""
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder() if skip_special_tokens else {}
        self._has_bytes: bool | None = None
        """True if the tokenizer decodes tokens such as `<0xE4>` as bytes; None if none was seen."""
        self._skipped = {number for number, token in added.items() if token.special}
        self._window = [token for token, _ in self._named(prompt[-PROMPT_CONTEXT:])]
        self._emitted = len(self._decode(self._window).rstrip(INCOMPLETE))  # characters of the window's text
        self._pending = _PendingBytes()

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens. Return the new text that no later token can change."""
        known = self._named(token_ids)
        if not known:
            return ""
        self._window += [token for token, _ in known]
        for token, name in known:
            self._pending.push(name if self._is_byte(token, name) else None)
        if self._is_byte(*known[-1]):
            return ""
        new = _complete_part(self._decode(self._window))[self._emitted :]
        self._shrink_window()
        return new

    @property
    def pending(self) -> str:
        """Text of the last tokens that are bytes, as of now: a later byte may turn it into replacement characters."""
        return self._pending.text

    def finish(self) -> str:
        """Return the rest of the text; incomplete characters become U+FFFD."""
        return self._decode(self._window)[self._emitted :]

    def _named(self, token_ids: Sequence[int]) -> list[tuple[int, str]]:
        """Return the ids and names of tokens that have text."""
        named = [(token, self._tokenizer.id_to_token(token)) for token in token_ids if token not in self._skipped]
        return [(token, name) for token, name in named if name is not None]

    def _is_byte(self, token: int, name: str) -> bool:
        if not BYTE.fullmatch(name):
            return False
        if self._has_bytes is None:
            self._has_bytes = self._decode([token]) != name
        return self._has_bytes

    def _shrink_window(self) -> None:
        """Drop tokens from the window that cannot affect later text."""
        size = CONTEXT
        while not (kept := _complete_part(self._decode(self._window[-size:]))) and size < len(self._window):
            size *= 2
        self._window, self._emitted = self._window[-size:], len(kept)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)


class StopStrings:
    """End a text at the first stop string in it.

    The first stop string is the one that ends first; among those that end together, the longest. Text that may be the
    beginning of a stop string is held back, so the result does not depend on how the text is cut into pieces.
    """

    def __init__(self, stop: Sequence[str], include: bool = False) -> None:
        """`include` keeps the stop string in the text."""
        self._stop = tuple(stop)
        self._include = include
        self._longest = max(map(len, self._stop), default=0)
        self._held = ""
        self.hit = False
        """True after a stop string; later text is dropped."""

    def push(self, text: str, pending: str = "") -> tuple[str, bool]:
        """Add a piece of text. Return the new certain text, and True if a stop string ends the text.

        Args:
          text: the piece.
          pending: text that follows as of now, and that later tokens may still change. A stop string in it counts.
        """
        if self.hit:
            return "", True
        text = self._held + text
        seen = text + pending
        first = 0 if text else max(len(seen) - self._longest - CONTEXT, 0)  # the rest was searched before
        found = [(start + len(stop), start) for stop in self._stop if (start := seen.find(stop, first)) >= 0]
        if found:
            end, start = min(found)
            self.hit, self._held = True, ""
            return seen[: end if self._include else start], True
        first = max(len(text) - self._longest, 0)
        certain = next(at for at in range(first, len(text) + 1) if self._may_begin_stop(text[at:]))
        self._held = text[certain:]
        return text[:certain], False

    def finish(self) -> str:
        """Return the text that was held back. No more text follows."""
        held, self._held = self._held, ""
        return held

    def _may_begin_stop(self, tail: str) -> bool:
        """Return True if more text can turn the tail into a stop string. An empty tail always can."""
        return not tail or any(stop.startswith(tail) for stop in self._stop)


def _complete_part(text: str) -> str:
    """Remove an incomplete character from the end; decoders make one replacement character of its bytes."""
    return text.removesuffix(INCOMPLETE)


class _PendingBytes:
    """Text of a run of byte tokens, without an incomplete character at its end; empty if the bytes are no UTF-8."""

    def __init__(self) -> None:
        self._start()

    def push(self, name: str | None) -> None:
        """Add the name of a byte token; None for another token, which ends the run."""
        if name is None:
            self._start()
        elif self._is_valid:
            try:
                self.text += self._decoder.decode(bytes([int(name[3:5], 16)]))
            except UnicodeDecodeError:
                self._is_valid, self.text = False, ""

    def _start(self) -> None:
        self.text, self._is_valid = "", True
        self._decoder = codecs.getincrementaldecoder("utf-8")()
