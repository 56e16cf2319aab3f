"""Which collectives a compiled program runs, read from its HLO text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

KINDS = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "ragged-all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?(?P<name>[^\s(]+) \(.*\{$")
_COLLECTIVE = re.compile(rf" = (?P<result>.+?) (?P<kind>{'|'.join(KINDS)})(-start)?\(")
_SCOPE = re.compile(r'op_name="([^"]*)"')
_ARRAY = re.compile(r"(?P<dtype>[a-z]+\d*)\[(?P<shape>[\d,]*)\]")
_LOOP = re.compile(r" while\(.*body=%?(?P<body>[^\s,]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALL = re.compile(r"(?:to_apply|calls|true_computation|false_computation)=%?([^\s,}]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclass(frozen=True)
class Collective:
    """One collective operation and how often a run of the program executes it."""

    kind: str
    times: int
    result: str
    """Dtypes and shapes of its result, as in `f32[64,32]`."""
    scope: str
    """The `jax.named_scope`s around it."""


def collectives(hlo: str) -> list[Collective]:
    """The collectives of an optimized HLO module (`compiled.as_text()`), those in loops counted once per trip."""
    computations, entry = _computations(hlo)
    return list(_visit(computations, entry, 1))


def count(found: list[Collective]) -> Counter[str]:
    """How often each kind of collective runs."""
    totals: Counter[str] = Counter()
    for collective in found:
        totals[collective.kind] += collective.times
    return totals


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    entry, current = "", []
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header["name"], [])
            entry = header["name"] if header[1] else entry
        else:
            current.append(line)
    assert entry, "not the text of an HLO module"
    return computations, entry


def _visit(computations: dict[str, list[str]], name: str, times: int) -> Iterator[Collective]:
    for line in computations.get(name, []):
        if found := _COLLECTIVE.search(line):
            scope = _SCOPE.search(line)
            arrays = ", ".join(array[0] for array in _ARRAY.finditer(found["result"]))
            yield Collective(found["kind"], times, arrays, scope[1] if scope else "")
        elif loop := _LOOP.search(line):
            trips = _TRIPS.search(line)
            yield from _visit(computations, loop["body"], times * int(trips[1]) if trips else times)
        else:
            branches = [part.strip(" %") for group in _BRANCHES.findall(line) for part in group.split(",")]
            for callee in _CALL.findall(line) + branches:
                yield from _visit(computations, callee, times)
