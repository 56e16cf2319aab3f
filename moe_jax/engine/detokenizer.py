"""Incremental detokenization and stop strings. Nothing here imports jax."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

CONTEXT = 4
"""Tokens that are decoded again with each new token. Four bytes reach back to the start of any character. One token
with a text reaches back to the start of the sequence, where decoders leave a space out."""
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Decode one sequence in pieces, in time linear in the number of tokens.

    The pieces together are the tokenizer's text of the whole sequence. A piece is returned once no later token can
    change it. A character whose bytes are spread over several tokens is returned with the last of them. A SentencePiece
    byte token (`<0xE4>`) waits for the next token, since one misplaced byte turns all bytes around it into replacement
    characters. `tokenizers.decoders.DecodeStream` returns the first complete character, which may turn out wrong.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder() if skip_special_tokens else {}
        self._skipped = {number for number, token in added.items() if token.special}
        self._window: list[int] = []
        self._emitted = 0  # characters of the window's text

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens. Return the new text that no later token can change."""
        named = [(token, self._tokenizer.id_to_token(token)) for token in token_ids if token not in self._skipped]
        known = [(token, name) for token, name in named if name is not None]
        self._window += [token for token, _ in known]
        if not known or _is_byte(known[-1][1]):
            return ""
        text = _complete_part(self._decode(self._window))
        new = text[self._emitted :]
        self._shrink_window()
        return new

    def finish(self) -> str:
        """Return the rest of the text; incomplete characters become U+FFFD."""
        return self._decode(self._window)[self._emitted :]

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

    def push(self, text: str) -> tuple[str, bool]:
        """Add a piece of text. Return the new certain text, and True if a stop string ends the text."""
        if self.hit:
            return "", True
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            end, start = min(found)
            self.hit, self._held = True, ""
            return text[: end if self._include else start], True
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


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
