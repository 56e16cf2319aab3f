"""Feed-forward layers after DeepSeek-V3 (arXiv:2412.19437), which several families take over."""

from __future__ import annotations

from moe_jax.checkpoints.fields import Fields
from moe_jax.config import DenseConfig, GroupLimit, GroupScore, MoEConfig, RouterConfig, Score, SharedExpertConfig


def feed_forwards(
    fields: Fields, *, experts: str, shared: str, scale: float, dense: int, groups: int = 1, kept: int = 1
) -> list[DenseConfig | MoEConfig]:
    """Each layer's: the first few dense, the others MoEs with sigmoid scores, chosen with a bias, from the best groups.

    Args:
      experts, shared: the fields that count them; shared experts are one MLP of the width of all.
      scale, dense, groups, kept: what the file may leave out.
    """
    router = sigmoid_router(fields, scale=scale, groups=groups, kept=kept)
    moe = moe_of(fields, router, experts=experts, shared=shared)
    first = DenseConfig(fields.take("intermediate_size", int))
    return [first if is_dense else moe for is_dense in dense_layers(fields, dense)]


def sigmoid_router(fields: Fields, *, scale: float, groups: int = 1, kept: int = 1) -> RouterConfig:
    """Sigmoid scores, the choice made with a bias; the arguments are what the file may leave out."""
    return RouterConfig(
        Score.SIGMOID,
        selection_bias=True,
        limit=group_limit(fields, GroupScore.BEST_TWO, groups, kept),
        norm=1 if fields.take("norm_topk_prob", bool, True) else None,
        scale=fields.take("routed_scaling_factor", float, scale),
    )


def moe_of(fields: Fields, router: RouterConfig, *, experts: str, shared: str | None) -> MoEConfig:
    """Routed experts of one width, and shared ones, where a field counts them, that are one MLP of the width of all."""
    width = fields.take("moe_intermediate_size", int)
    return MoEConfig(
        experts=fields.take(experts if fields.has(experts) else "num_local_experts", int),
        top_k=fields.take("num_experts_per_tok", int),
        width=width,
        router=router,
        shared=None if shared is None else SharedExpertConfig(width * fields.take(shared, int, 1), gated=False),
    )


def group_limit(fields: Fields, score: GroupScore, groups: int, kept: int) -> GroupLimit | None:
    """None where there is one group, or all are kept."""
    groups, kept = fields.take("n_group", int, groups), fields.take("topk_group", int, kept)
    return None if kept == groups else GroupLimit(groups, kept, score)


def dense_layers(fields: Fields, dense: int) -> list[bool]:
    """Which layers are, from `mlp_layer_types`, or from the number of the first ones."""
    layers, first = fields.take("num_hidden_layers", int), fields.any("first_k_dense_replace", dense)
    kinds = fields.take_list("mlp_layer_types", str)
    if kinds and (len(kinds) != layers or not set(kinds) <= {"dense", "sparse"}):
        fields.problem(f"mlp_layer_types must say dense or sparse for each of {layers} layers, got {kinds}")
        kinds = []
    if type(first) is not int or first < 0:
        fields.problem(f"first_k_dense_replace must be a number of layers, got {first!r}")
        first = 0
    return [kind == "dense" for kind in kinds] or [layer < first for layer in range(layers)]
