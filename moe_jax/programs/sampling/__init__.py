"""Sampling: from logits on vocabulary shards to the next token of each request.

Runs inside `shard_map` on the logits as the LM head leaves them; no device sees the logits of the whole vocabulary.
The devices exchange a few numbers per request, so that all of them arrive at the same token. A sampled token depends on
the request's own logits, parameters, seed and number of generated tokens: not on the other requests of the batch, nor,
up to the rounding of sums, on the placement.

Nothing is sorted: bisection finds the logit below which top-k and top-p discard tokens (see `thresholds`).

Q  requests     V  columns of the vocabulary on this device     h  shards of the vocabulary (devices of role `heads`)
P  positions    m  thresholds tried at once                     C  most likely tokens returned with each token
"""

from moe_jax.programs.sampling.logprobs import TokenLogprobs, logprobs_of
from moe_jax.programs.sampling.metadata import SamplerInputs, SamplingMetadata, SamplingRequest
from moe_jax.programs.sampling.sampler import SamplerOutput, sample
from moe_jax.programs.sampling.vocab_shard import NO_TOKEN

__all__ = [
    "NO_TOKEN",
    "SamplerInputs",
    "SamplerOutput",
    "SamplingMetadata",
    "SamplingRequest",
    "TokenLogprobs",
    "logprobs_of",
    "sample",
]
