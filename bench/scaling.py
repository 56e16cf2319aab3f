"""Predicted decode speed of published models on GPUs, by the policy and roofline of `moe-jax plan`: docs/scaling.md.

python -m bench.scaling > docs/scaling.md

Nothing is compiled or run: predictions follow from sizes and from the hardware records (`moe_jax.sharding.hardware`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from textwrap import fill

import jax

from bench.published import MODELS, config
from moe_jax.analysis.roofline import Roofline, roofline
from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.models import ShardedDecoder
from moe_jax.sharding import Hardware, Placement, Role
from moe_jax.sharding.hardware import KNOWN

CLUSTERS = (("h100", 8), ("h100", 16), ("gb200", 72))
STRATEGIES = ("scatter", "reduce", "all-to-all")
ROWS, POSITIONS = 64, 1024
"""Sequences on each device, and positions of the KV cache of each."""

PAGE = """# Scaling

Predictions of `moe-jax plan` for published models, with {rows} sequences on each device and caches of
{positions} positions, in bfloat16. The figures follow from sizes and data sheets; nothing was measured.
`python -m bench.scaling > docs/scaling.md` writes this page.

{table}

`-` marks models whose weights and cache exceed a device's memory; their size is given. DeepSeek-V3 is published in
float8 and held here in bfloat16. Of 72 devices, 64 are used: the largest number that divides the number of experts.

## Assumptions

- Attention is data-parallel on every device, experts lie on all devices (`expert=<devices>`), and sequences are spread
  evenly.
- A step reads its weights and full caches once at the bandwidth of the memory, or computes at the peak of the data
  sheet, whichever takes longer. All experts are visited. Nothing else takes time: no kernel launch, no sampling, no
  work of the host.
- Collectives run one after the other and overlap with nothing. Each costs launches, hops and bytes, as
  `moe_jax.sharding.hardware` says, with figures from data sheets and from NCCL's tuning model.
- Rows travel in bfloat16, together with the router's results. An all-to-all sends each row to every device that holds
  one of the row's experts, and rows choose experts evenly.

Tokens per second are therefore an upper bound. The model is made for the ratios between strategies.

## Comparison with measurements of other engines

{comparisons}
"""


HEADS_SPLIT = (
    "data=2,expert=4; tokens=data; heads=expert; experts=expert; ffn=data",
    "data=2,expert=2,tensor=2; tokens=data,expert; heads=tensor; experts=data,expert; ffn=tensor",
    "data=2,expert=4; tokens=data,expert; experts=expert; ffn=data",
)
"""Placements on eight devices: experts on four, attention over 2, 4 and 8 token shards."""
COMBINE_KERNEL = """
- SGLang's pull request 22642 (4 x GB200, Qwen3.5-397B-A17B) measured 257 us of an all-reduce, and 161 us of the
reduce-scatter in its place, 1.60 times less. The prediction is {reduce:.0f} and {scatter:.0f} us with {rows} rows on
each device, {times:.2f} times less. In the measurement, all collectives together took 13.6% less time, and the engine
produced 7.7% more tokens.
"""
HEADS_AND_TOKENS = """
- Pull request 23713 (8 x H200, experts on 4, attention over 2, 4 and 8 token shards) measured collectives that take
3.3, 3.1 and 2.0 times less time. The prediction is {} times for the combine, with 4096 rows on each shard and a
hidden width of 4096. The model knows bytes, hops and launches, and no other work of the replaced path.
"""
ALL_TO_ALL = """
- TensorRT-LLM's blog 18 finds that an all-to-all only wins on more devices than `top_k`. The prediction agrees for
Qwen3, whose `top_k` is 8: slower on 8 devices, faster on 16 and 64. With a shared expert every device needs every row,
and the all-to-all is a scatter.
"""


@dataclass(frozen=True)
class Prediction:
    """Predicted decode step of a model on devices with a strategy."""

    model: str
    devices: str
    strategy: str
    hardware: Hardware
    roofline: Roofline

    @property
    def device_bytes(self) -> int:
        """Bytes of weights and caches on a device."""
        return self.roofline.weight_bytes + self.roofline.cache_bytes

    @property
    def fits(self) -> bool:
        return self.device_bytes <= self.hardware.memory

    def __str__(self) -> str:
        """Row of the table."""
        seconds, share = self.roofline.step_seconds, self.roofline.collective_share
        figures = (f"{seconds * 1e3:.2f}", f"{share:.0%}", f"{ROWS / seconds:,.0f}") if self.fits else ("-", "-", "-")
        return _table_row(self.model, self.devices, self.strategy, f"{self.device_bytes / 2**30:.1f}", *figures)


def predictions(models: Iterable[str], clusters: Sequence[tuple[str, int]]) -> Iterator[Prediction]:
    """Predict each model on each cluster with each strategy."""
    for model in models:
        for name, devices in clusters:
            for strategy in STRATEGIES:
                roofline = predict(config(model), KNOWN[name], devices, strategy, ROWS)
                yield Prediction(model, f"{devices} x {name.upper()}", strategy, KNOWN[name], roofline)


def predict(config: ModelConfig, hardware: Hardware, devices: int, strategy: str, rows: int) -> Roofline:
    """Roofline for `rows` sequences on each device, on the largest number of devices that divides the experts."""
    (experts,) = {layer.ffn.experts for layer in config.layers if isinstance(layer.ffn, MoEConfig)}
    used = max(size for size in range(1, devices + 1) if experts % size == 0)
    decoder = ShardedDecoder(config, Placement.parse(f"expert={used}"), "bfloat16")
    seconds = decoder.policy(hardware, strategy, "whole", "exact").decide([rows] * used, rows).chosen.seconds
    return roofline(decoder, hardware, rows=rows * used, slots=rows, positions=POSITIONS, collective_seconds=seconds)


def combine_us(hardware: str, mesh: str, strategy: str, rows: int) -> float:
    """Predicted microseconds of the combine of a layer of Qwen3.5-397B-A17B, with `rows` rows on each token shard."""
    decoder = ShardedDecoder(config("Qwen3.5-397B-A17B"), Placement.parse(mesh), "bfloat16")
    placement, policy = decoder.placement, decoder.policy(KNOWN[hardware], strategy, "whole", "exact")
    combine = policy.decide([rows] * placement.size(Role.TOKENS), rows).route.combine
    return 1e6 * KNOWN[hardware].seconds(combine.combine_moves(rows, policy.layers[0]), placement)


def _table_row(*columns: str) -> str:
    return f"| {' | '.join(columns)} |"


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(devices for _, devices in CLUSTERS))
    print(page(), end="")


def page() -> str:
    """Text of docs/scaling.md."""
    head = _table_row("model", "devices", "combine", "GiB a device", "step, ms", "collectives", "tokens/s a device")
    table = "\n".join([head, _table_row(*["---"] * 3, *["---:"] * 4), *map(str, predictions(MODELS, CLUSTERS))])
    return PAGE.format(rows=ROWS, positions=POSITIONS, table=table, comparisons="\n".join(comparisons()))


def comparisons() -> Iterator[str]:
    """Comparisons of the predictions with published measurements, as list items."""
    rows = bisect_left(range(2**13), 257, key=partial(combine_us, "gb200", "expert=4", "reduce"))
    scatter, reduce = (combine_us("gb200", "expert=4", strategy, rows) for strategy in ("scatter", "reduce"))
    yield _item(COMBINE_KERNEL.format(rows=rows, scatter=scatter, reduce=reduce, times=reduce / scatter))
    times = [
        combine_us("h200", mesh, "reduce", 4096) / combine_us("h200", mesh, "scatter", 4096) for mesh in HEADS_SPLIT
    ]
    yield _item(HEADS_AND_TOKENS.format(", ".join(f"{each:.2f}" for each in times)))
    yield _item(ALL_TO_ALL)


def _item(text: str) -> str:
    return fill(text.strip(), 118, subsequent_indent="  ")


if __name__ == "__main__":
    main()
