"""A device that is all bookkeeping: what it is told to read must hold exactly what the request wrote, or an equal one.

Its "keys and values" of a position are the state of a toy model there: a number made of all tokens up to it. The next
token is made of that state, so that whoever reads a wrong, stale or foreign page is found at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moe_jax.scheduler import Limits, Plan, Request

MODULUS = (1 << 61) - 1


def states(tokens: Sequence[int], state: int = 1) -> list[int]:
    """The toy model's state after each token."""
    found = []
    for token in tokens:
        state = (state * 6364136223846793005 + token * 1442695040888963407 + 1013904223) % MODULUS
        found.append(state)
    return found


def next_token(state: int, vocabulary: int) -> int:
    return (state >> 7) % vocabulary


def continuation(prompt: Sequence[int], most: int, vocabulary: int, stop: int | None) -> list[int]:
    """What the toy model generates."""
    state, tokens = states(prompt)[-1], []
    while len(tokens) < most and (not tokens or tokens[-1] != stop):
        tokens.append(next_token(state, vocabulary))
        (state,) = states(tokens[-1:], state)
    return tokens


class Device:
    """Runs plans as they are made, and keeps what they give until it is asked for.

    Args:
      stop: the token after which the device feeds nothing more of a request.
    """

    def __init__(self, limits: Limits, vocabulary: int, stop: int | None) -> None:
        self.limits = limits
        self.vocabulary = vocabulary
        self.stop = stop
        self._memory = [
            [[[0] * limits.page for _ in range(group.pages)] for group in limits.groups] for _ in range(limits.shards)
        ]
        self._last: dict[tuple[int, int], tuple[Request, int]] = {}
        """At each slot, the request that last got a token there, and that token."""
        self._true: dict[Request, list[int]] = {}

    def run(self, plan: Plan) -> Mapping[Request, list[int]]:
        """The tokens of each request that gets any."""
        given: dict[Request, list[int]] = {}
        rows: list[tuple[Request, int, int]] = []
        for shard, chunks in enumerate(plan.chunks):
            for chunk in chunks:
                assert chunk.request.shard == shard
                known = [*chunk.request.prompt, *chunk.request.tokens]
                assert 0 <= chunk.start < chunk.end <= len(known)
                assert chunk.samples == (chunk.end == len(known))
                self._true[chunk.request] = states(known)
                rows.append((chunk.request, chunk.start, chunk.end))
        for step in range(plan.steps):
            for shard, decodes in enumerate(plan.decodes):
                for request, position, steps in decodes:
                    assert request.shard == shard
                    assert 1 <= steps <= plan.steps
                    if step == 0:
                        given[request] = []
                    if step < steps:
                        rows += self._decode_row(request, position + step)
            self._write(rows)
            for request, start, end in rows:
                self._check(request, start, end)
            for request, _, end in rows:
                if end == len(self._true[request]):
                    token = next_token(self._true[request][-1], self.vocabulary)
                    given.setdefault(request, []).append(token)
                    self._last[request.shard, request.slot] = request, token
            rows = []
        return given

    def _decode_row(self, request: Request, position: int) -> list[tuple[Request, int, int]]:
        owner, token = self._last[request.shard, request.slot]
        assert owner is request, "a slot holds the last token of its own request"
        if token == self.stop:
            return []
        true = self._true[request]
        assert position == len(true), "a decode row feeds the token after those that were fed"
        true += states([token], true[-1])
        return [(request, position, position + 1)]

    def _write(self, rows: Sequence[tuple[Request, int, int]]) -> None:
        page, written = self.limits.page, set()
        for request, start, end in rows:
            true = self._true[request]
            for number, memory in enumerate(self._memory[request.shard]):
                first, ids = request.pages[number].first, request.pages[number].ids
                for position in range(start, end):
                    at = position // page - first
                    assert 0 <= at < len(ids), "there is a page for each position that is written"
                    place = (request.shard, number, ids[at], position % page)
                    assert place not in written, "no two rows write to one place"
                    written.add(place)
                    memory[ids[at]][position % page] = true[position]

    def _check(self, request: Request, start: int, end: int) -> None:
        """What rows of consecutive positions see is what the toy model says."""
        page, true = self.limits.page, self._true[request]
        for group, memory, table in zip(self.limits.groups, self._memory[request.shard], request.pages, strict=True):
            first, ids = table.first, table.ids
            since = 0 if group.window is None else max(start - group.window + 1, 0)
            assert first * page <= since, "there is a page for each position that is seen"
            held = [state for id in ids for state in memory[id]]
            assert held[since - first * page : end - first * page] == true[since:end], "pages hold what was written"
