"""Qwen3-Next: three gated delta nets (arXiv:2412.06464) for each layer of full attention; gated attention output."""

from moe_jax.checkpoints.families import gated_delta
from moe_jax.checkpoints.families.llama_fields import model
from moe_jax.checkpoints.families.qwen_layers import SHARED, feed_forwards, shared_expert
from moe_jax.checkpoints.families.shared_names import DENSE_MLP, MODEL, MOE
from moe_jax.checkpoints.fields import Fields
from moe_jax.checkpoints.weight_mapping import joined
from moe_jax.config import LayerConfig, ModelConfig, Norm

KEY = "recurrence.key.weight"
QKVZ = ("recurrence.query.weight", KEY, "recurrence.value.weight", "recurrence.gate.weight")
BA = ("recurrence.strength.weight", "recurrence.decay.projection.weight")
SOURCES = {
    **MODEL,
    **gated_delta.SOURCES,
    **joined(gated_delta.LINEAR + "in_proj_qkvz.weight", *QKVZ, heads_of=KEY),
    **joined(gated_delta.LINEAR + "in_proj_ba.weight", *BA, heads_of=KEY),
    **DENSE_MLP,
    **MOE,
    **SHARED,
}
IGNORED_PREFIXES = ("mtp.",)


def read(fields: Fields) -> ModelConfig:
    fields.expect("use_sliding_window", False)
    ffns = feed_forwards(fields, shared_expert(fields), norm=True)
    layers = map(LayerConfig, gated_delta.mixers(fields), ffns)
    return model(fields, layers, eps=1e-6, norm=Norm.RMS_AROUND_ONE)
