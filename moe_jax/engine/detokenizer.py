"""From tokens to text as they come: what is certain, and where it ends. Nothing here imports jax."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

CONTEXT = 4
"""Tokens that decide, with those after them, how those are written: four bytes reach back to the start of any
character, and one token with a text to the start of the sequence, where decoders leave a space out."""
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Decodes one sequence in pieces, which together are what the tokenizer makes of the whole, in time linear in the
    tokens.

    A piece is told once no later token can change it. Of a character whose bytes are spread over tokens, nothing is
    told before the last of them. SentencePiece's byte tokens (`<0xE4>`) wait for the token after them: one that is out
    of place turns all of those around it into replacement characters, which a stream that trusts the first complete
    character (as `tokenizers.decoders.DecodeStream` does) finds out too late.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder() if skip_special_tokens else {}
        self._skipped = {number for number, token in added.items() if token.special}
        self._window: list[int] = []
        self._inbox = 0  # characters of the window's text

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that is certain with these tokens, beyond what was told."""
        named = [(token, self._tokenizer.id_to_token(token)) for token in token_ids if token not in self._skipped]
        known = [(token, name) for token, name in named if name is not None]
        self._window += [token for token, _ in known]
        if not known or _is_byte(known[-1][1]):
            return ""
        text = _certain(self._decode(self._window))
        new = text[self._inbox :]
        self._forget()
        return new

    def finish(self) -> str:
        """What is left to tell: characters that were never completed, as U+FFFD."""
        return self._decode(self._window)[self._inbox :]

    def _forget(self) -> None:
        """Keep no more of the window than decides how what follows is written."""
        size = CONTEXT
        while not (kept := _certain(self._decode(self._window[-size:]))) and size < len(self._window):
            size *= 2
        self._window, self._inbox = self._window[-size:], len(kept)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)


class StopStrings:
    """Ends a text that comes in pieces before, or with `include` after, the first stop string in it.

    The first is the one that ends first; of several that end together, the longest. It does not matter how the text is
    cut into pieces: what may be the beginning of a stop string is held back.
    """

    def __init__(self, stop: Sequence[str], include: bool = False) -> None:
        self._stop = tuple(stop)
        self._include = include
        self._longest = max(map(len, self._stop), default=0)
        self._held = ""
        self.hit = False
        """Whether one has come; nothing is told after it."""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that is certain with this piece, beyond what was told, and whether it ends there."""
        if self.hit:
            return "", True
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            end, start = min(found)
            self.hit, self._held = True, ""
            return text[: end if self._include else start], True
        certain = next(at for at in range(max(len(text) - self._longest, 0), len(text) + 1) if self._may_end(text[at:]))
        self._held = text[certain:]
        return text[:certain], False

    def finish(self) -> str:
        """What was held back, where the text ends without a stop string."""
        held, self._held = self._held, ""
        return held

    def _may_end(self, tail: str) -> bool:
        """Whether text to come can make a stop string of this; of the empty text it always can."""
        return not tail or any(stop.startswith(tail) for stop in self._stop)


def _certain(text: str) -> str:
    """The text without what a byte to come may change: of an incomplete character, decoders make one replacement."""
    return text.removesuffix(INCOMPLETE)


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
