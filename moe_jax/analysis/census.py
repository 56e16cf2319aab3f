"""Census of a compiled program: its collectives and matrix products, read from the HLO text."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

KINDS = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "ragged-all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?(?P<name>[^\s(]+) \(.*\{$")
_NAME = r"\s*(?:ROOT )?%?(?P<name>\S+) = "
_COLLECTIVE = re.compile(rf"{_NAME}(?P<result>.+?) (?P<kind>{'|'.join(KINDS)})(?P<half>-start|-done)?\(")
_OPERAND = re.compile(r"-done\(%?([^\s,)]+)")
_SCOPE = re.compile(r'op_name="([^"]*)"')
_ARRAY = re.compile(r"(?P<dtype>[a-z]+\d*)[a-z\d]*\[(?P<shape>[\d,]*)\]")
# Groups of devices as HLO writes them: {{0,1},{2,3}}, [2,2]<=[4], mesh['data'=2,'expert'=2] {'expert'}, or {} for one
# group of all devices; a permutation lists the pairs that send.
_ALL_DEVICES = "replica_groups={}"
_COUNTS = re.compile(r"(?:replica_count|num_partitions)=(\d+)")
_PAIRS = re.compile(r"source_target_pairs=\{([\d,{}]*)\}")
_PAIR = re.compile(r"(\d+),(\d+)")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_IOTA = re.compile(r"replica_groups=\[(?:\d+,)*(\d+)\]<=")
_MESH = re.compile(r"replica_groups=mesh\[(?P<sizes>[^\]]*)\] \{(?P<axes>[^}]*)\}")
_RESULT = re.compile(rf"{_NAME}(?P<result>\S+) ")
_DOT = re.compile(r"= (?P<result>\S+) dot\(%?(?P<left>[^\s,]+),.*lhs_contracting_dims=\{(?P<contracted>[\d,]+)\}")
_LOOP = re.compile(r" while\(.*body=%?(?P<body>[^\s,]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALL = re.compile(r"(?:to_apply|calls|true_computation|false_computation)=%?([^\s,}]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclass(frozen=True)
class Collective:
    """Collective operation, with the number of times that a run of the program executes it."""

    kind: str
    times: int
    result: str
    """Dtypes and shapes of its result, as in `f32[64,32]`."""
    scope: str
    """The `jax.named_scope`s around it."""
    devices: int
    """Number of devices in each group of the collective."""
    asynchronous: bool
    """True if other work may run between the start and the end of the collective."""

    @property
    def sent_bytes(self) -> float:
        """Bytes that each device sends in one execution: over a ring, or the whole buffer once for a permutation."""
        of_result = {
            "all-reduce": 2 * (self.devices - 1) / self.devices,
            "reduce-scatter": self.devices - 1,
            "collective-permute": self.devices > 1,
        }
        return _bytes(self.result) * of_result.get(self.kind, (self.devices - 1) / self.devices)


def collectives(hlo: str) -> list[Collective]:
    """List the collectives of an optimized HLO module (`compiled.as_text()`); a loop counts once per trip."""
    computations, entry = _computations(hlo)
    devices = _device_count(hlo)
    return [c for lines, times in _executed(computations, entry, 1) for c in _collectives_among(lines, times, devices)]


def dot_flops(hlo: str) -> int:
    """Count the FLOPs of the matrix products of an optimized HLO module; a loop counts once per trip. Custom kernels
    are not counted."""
    computations, entry = _computations(hlo)
    return sum(times * _dot_flops(lines) for lines, times in _executed(computations, entry, 1))


def count(found: Iterable[Collective]) -> Counter[str]:
    """Count the executions of each kind of collective."""
    totals: Counter[str] = Counter()
    for collective in found:
        totals[collective.kind] += collective.times
    return totals


def sent_bytes(found: Iterable[Collective]) -> float:
    """Sum the bytes that each device sends in a run of the program."""
    return sum(collective.times * collective.sent_bytes for collective in found)


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


def _device_count(hlo: str) -> int:
    """Read the number of devices from the header of the module, which leaves out counts of one."""
    return math.prod(map(int, _COUNTS.findall(hlo.partition("\n")[0])))


def _executed(computations: Mapping[str, list[str]], name: str, times: int) -> Iterator[tuple[list[str], int]]:
    """Yield the lines of `name` and of every computation that it calls, with the number of times that they run.

    A loop runs for its known trip count, or once; every branch of a conditional counts.
    """
    yield computations.get(name, []), times
    for line in computations.get(name, []):
        if loop := _LOOP.search(line):
            trips = _TRIPS.search(line)
            yield from _executed(computations, loop["body"], times * int(trips[1]) if trips else times)
        else:
            branches = [part.strip(" %") for group in _BRANCHES.findall(line) for part in group.split(",")]
            for callee in _CALL.findall(line) + branches:
                yield from _executed(computations, callee, times)


def _collectives_among(lines: Sequence[str], times: int, devices: int) -> Iterator[Collective]:
    """Yield the collectives of one computation of a program that runs on `devices` devices."""
    started: dict[str, str] = {}
    for line in lines:
        if not (found := _COLLECTIVE.match(line)):
            continue
        if found["half"] == "-start":
            started[found["name"]] = line
        else:
            operand = _OPERAND.search(line)
            groups = started[operand[1]] if operand else line
            yield _collective(found, times, groups, devices, asynchronous=bool(operand))


def _dot_flops(lines: Sequence[str]) -> int:
    results = {found["name"]: found["result"] for line in lines if (found := _RESULT.match(line))}
    flops = 0
    for dot in filter(None, map(_DOT.search, lines)):
        (left,) = _shapes(results[dot["left"]])
        (result,) = _shapes(dot["result"])
        flops += 2 * math.prod(result) * math.prod(left[int(dim)] for dim in dot["contracted"].split(","))
    return flops


def _collective(found: re.Match[str], times: int, line: str, devices: int, *, asynchronous: bool) -> Collective:
    """Build a collective from its result and from the line that names its groups of devices."""
    scope = _SCOPE.search(line)
    arrays = ", ".join(array[0] for array in _ARRAY.finditer(found["result"]))
    return Collective(found["kind"], times, arrays, scope[1] if scope else "", _group_size(line, devices), asynchronous)


def _group_size(line: str, devices: int) -> int:
    if _ALL_DEVICES in line:
        return devices
    if pairs := _PAIRS.search(line):
        return _largest_group(_PAIR.findall(pairs[1]))
    if listed := _LISTED.search(line):
        return listed[1].count(",") + 1
    if iota := _IOTA.search(line):
        return int(iota[1])
    mesh = _MESH.search(line)
    assert mesh, f"unknown form of replica groups: {line}"
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh["sizes"]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh["axes"]))


def _largest_group(pairs: Iterable[tuple[str, str]]) -> int:
    """Return the size of the largest set of devices that the pairs connect."""
    groups: list[set[str]] = []
    for pair in pairs:
        joined = set(pair).union(*(group for group in groups if not group.isdisjoint(pair)))
        groups = [group for group in groups if group.isdisjoint(pair)] + [joined]
    return max(map(len, groups), default=1)


def _bytes(arrays: str) -> float:
    dtypes = (array["dtype"] for array in _ARRAY.finditer(arrays))
    return sum(math.prod(shape) * _item_bits(dtype) / 8 for shape, dtype in zip(_shapes(arrays), dtypes, strict=True))


def _shapes(arrays: str) -> list[list[int]]:
    return [[int(size) for size in array["shape"].split(",") if size] for array in _ARRAY.finditer(arrays)]


def _item_bits(dtype: str) -> int:
    return 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
