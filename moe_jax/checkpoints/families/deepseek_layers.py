"""Feed-forward layers of DeepSeek-V3 (arXiv:2412.19437), which several families share."""

from __future__ import annotations

from moe_jax.checkpoints.fields import Fields
from moe_jax.config import DenseConfig, GroupLimit, GroupScore, MoEConfig, RouterConfig, Score, SharedExpertConfig


def feed_forwards(
    fields: Fields, *, experts: str, shared: str, scale: float, dense: int, n_group: int = 1, topk_group: int = 1
) -> list[DenseConfig | MoEConfig]:
    """Read the feed-forward layer of each decoder layer: first dense layers, then MoEs with a `sigmoid_router`.

    Args:
      experts: name of the field that counts the routed experts.
      shared: name of the field that counts the shared experts.
      scale, n_group, topk_group: see `sigmoid_router`.
      dense: default of `first_k_dense_replace`.
    """
    router = sigmoid_router(fields, scale=scale, n_group=n_group, topk_group=topk_group)
    moe = moe_config(fields, router, experts=experts, shared=shared)
    first = DenseConfig(fields.take("intermediate_size", int))
    return [first if is_dense else moe for is_dense in dense_layers(fields, dense)]


def sigmoid_router(fields: Fields, *, scale: float, n_group: int = 1, topk_group: int = 1) -> RouterConfig:
    """Read a router with sigmoid scores, a selection bias and a group limit.

    Args:
      scale: default of `routed_scaling_factor`.
      n_group, topk_group: defaults of the fields of these names.
    """
    return RouterConfig(
        Score.SIGMOID,
        selection_bias=True,
        limit=group_limit(fields, GroupScore.BEST_TWO, n_group, topk_group),
        norm=1 if fields.take("norm_topk_prob", bool, True) else None,
        scale=fields.take("routed_scaling_factor", float, scale),
    )


def moe_config(fields: Fields, router: RouterConfig, *, experts: str, shared: str | None) -> MoEConfig:
    """Read an MoE layer. Its shared experts are one MLP of their joint width.

    Args:
      experts: name of the field that counts the routed experts.
      shared: name of the field that counts the shared experts; `None` if there are none.
    """
    width = fields.take("moe_intermediate_size", int)
    return MoEConfig(
        experts=fields.take(experts if fields.has(experts) else "num_local_experts", int),
        top_k=fields.take("num_experts_per_tok", int),
        width=width,
        router=router,
        shared=None if shared is None else SharedExpertConfig(width * fields.take(shared, int, 1), gated=False),
    )


def group_limit(fields: Fields, score: GroupScore, n_group: int, topk_group: int) -> GroupLimit | None:
    """Read the group limit of a router; `None` if the router chooses among all groups.

    Args:
      n_group, topk_group: defaults of the fields of these names.
    """
    n_group, topk_group = fields.take("n_group", int, n_group), fields.take("topk_group", int, topk_group)
    return None if topk_group == n_group else GroupLimit(n_group, topk_group, score)


def dense_layers(fields: Fields, dense: int) -> list[bool]:
    """For each layer, True if its feed-forward layer is dense.

    Args:
      dense: default of `first_k_dense_replace`, which counts where `mlp_layer_types` is missing.
    """
    layers, first = fields.take("num_hidden_layers", int), fields.get("first_k_dense_replace", dense)
    kinds = fields.take_list("mlp_layer_types", str)
    if kinds and (len(kinds) != layers or not set(kinds) <= {"dense", "sparse"}):
        fields.problem(f"mlp_layer_types must hold dense or sparse for each of {layers} layers, got {kinds}")
        kinds = []
    if type(first) is not int or first < 0:
        fields.problem(f"first_k_dense_replace must be a number of layers, got {first!r}")
        first = 0
    return [kind == "dense" for kind in kinds] or [layer < first for layer in range(layers)]
