"""Toy device that checks every page it reads: each must hold exactly what the request wrote, or equal content.

The "keys and values" of a position are the state of a toy model: a hash of all tokens up to that position. The next
token is a function of the state, so reading a wrong, stale or foreign page is detected at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moe_jax.scheduler import Limits, Plan, Request

MODULUS = (1 << 61) - 1

Rows = tuple[Request, int, int]
"""Consecutive rows of a request: the request, the first position, and the position after the last."""


def states(tokens: Sequence[int], state: int = 1) -> list[int]:
    """States of the toy model after each token."""
    computed = []
    for token in tokens:
        state = (state * 6364136223846793005 + token * 1442695040888963407 + 1013904223) % MODULUS
        computed.append(state)
    return computed


def next_token(state: int, vocabulary: int) -> int:
    return (state >> 7) % vocabulary


def continuation(prompt: Sequence[int], max_tokens: int, vocabulary: int, stop: int | None) -> list[int]:
    """Tokens that the toy model generates."""
    state, tokens = states(prompt)[-1], []
    while len(tokens) < max_tokens and (not tokens or tokens[-1] != stop):
        tokens.append(next_token(state, vocabulary))
        (state,) = states(tokens[-1:], state)
    return tokens


class ToyDevice:
    """Device that runs plans in order.

    Args:
      stop: stop token; the device feeds no token of a request after it.
    """

    def __init__(self, limits: Limits, vocabulary: int, stop: int | None) -> None:
        self.limits = limits
        self.vocabulary = vocabulary
        self.stop = stop
        self._memory = [
            [[[0] * limits.page for _ in range(group.pages)] for group in limits.groups] for _ in range(limits.shards)
        ]
        self._last: dict[tuple[int, int], tuple[Request, int]] = {}
        """Last token sampled in each slot, by token shard and slot, with its request."""
        self._expected: dict[Request, list[int]] = {}
        """Expected states of each request at the positions computed so far."""

    def run(self, plan: Plan) -> Mapping[Request, list[int]]:
        """Run a plan and return the tokens of each request that samples any."""
        outputs: dict[Request, list[int]] = {}
        rows = self._prefill_rows(plan)
        for step in range(plan.steps):
            for shard, decodes in enumerate(plan.decodes):
                for request, position, steps in decodes:
                    assert request.shard == shard
                    assert 1 <= steps <= plan.steps
                    if step == 0:
                        outputs[request] = []
                    if step < steps:
                        rows += self._decode_rows(request, position + step)
            self._write(rows)
            for request, start, end in rows:
                self._check(request, start, end)
            for request, _, end in rows:
                if end == len(self._expected[request]):
                    token = next_token(self._expected[request][-1], self.vocabulary)
                    outputs.setdefault(request, []).append(token)
                    self._last[request.shard, request.slot] = request, token
            rows = []
        return outputs

    def _prefill_rows(self, plan: Plan) -> list[Rows]:
        rows: list[Rows] = []
        for shard, chunks in enumerate(plan.chunks):
            for chunk in chunks:
                assert chunk.request.shard == shard
                known = [*chunk.request.prompt, *chunk.request.tokens]
                assert 0 <= chunk.start < chunk.end <= len(known)
                assert chunk.samples == (chunk.end == len(known))
                self._expected[chunk.request] = states(known)
                rows.append((chunk.request, chunk.start, chunk.end))
        return rows

    def _decode_rows(self, request: Request, position: int) -> list[Rows]:
        owner, token = self._last[request.shard, request.slot]
        assert owner is request, "a slot holds the last token of its own request"
        if token == self.stop:
            return []
        expected = self._expected[request]
        assert position == len(expected), "a decode row feeds the first token that was not fed yet"
        expected += states([token], expected[-1])
        return [(request, position, position + 1)]

    def _write(self, rows: Sequence[Rows]) -> None:
        page, written = self.limits.page, set()
        for request, start, end in rows:
            expected = self._expected[request]
            for number, memory in enumerate(self._memory[request.shard]):
                first, ids = request.pages[number].first, request.pages[number].ids
                for position in range(start, end):
                    index = position // page - first
                    assert 0 <= index < len(ids), "each written position has a page"
                    cell = (request.shard, number, ids[index], position % page)
                    assert cell not in written, "no two rows write to one cell"
                    written.add(cell)
                    memory[ids[index]][position % page] = expected[position]

    def _check(self, request: Request, start: int, end: int) -> None:
        """Check the states that rows `start` to `end` attend to."""
        page, expected = self.limits.page, self._expected[request]
        for group, memory, table in zip(self.limits.groups, self._memory[request.shard], request.pages, strict=True):
            first, ids = table.first, table.ids
            begin = 0 if group.window is None else max(start - group.window + 1, 0)
            assert first * page <= begin, "each visible position has a page"
            cached = [state for id in ids for state in memory[id]]
            assert cached[begin - first * page : end - first * page] == expected[begin:end], (
                "pages hold what was written"
            )
