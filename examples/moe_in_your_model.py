"""moe_jax's MoE layer in a Flax NNX model of your own, trained with optax on eight virtual devices.

Run it with `python examples/moe_in_your_model.py`; on GPUs or TPUs leave `jax_num_cpu_devices` out. The model learns
the next token of sequences that count upwards, so it needs no attention.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moe_jax.config import MoEConfig, RouterConfig
from moe_jax.layers import MoE, on_mesh
from moe_jax.sharding import Placement

jax.config.update("jax_num_cpu_devices", 8)
PLACEMENT = Placement.parse("expert=4,tensor=2")  # experts over four devices, the width of each expert over two
VOCABULARY, HIDDEN = 64, 32


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Embed(VOCABULARY, HIDDEN, rngs=rngs)
        config = MoEConfig(experts=8, top_k=2, width=64, router=RouterConfig(norm=1))
        self.moe = MoE(config, HIDDEN, dtype=jnp.float32, rngs=rngs)
        self.head = nnx.Linear(HIDDEN, VOCABULARY, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embedding(tokens)
        y, _ = on_mesh(self.moe, PLACEMENT)(x)  # `_` is the router's load, for a balancing loss
        return self.head(x + y)


@nnx.jit  # so that every device makes its own part of the parameters
def create() -> tuple[Model, nnx.Optimizer]:
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    state = nnx.state((model, optimizer))
    nnx.update((model, optimizer), jax.lax.with_sharding_constraint(state, nnx.get_partition_spec(state)))
    return model, optimizer


@nnx.jit
def train(model: Model, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
    def loss_of(model: Model) -> jax.Array:
        logits, targets = model(tokens[:, :-1]), tokens[:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return loss


with jax.set_mesh(PLACEMENT.mesh), nnx.logical_axis_rules(PLACEMENT.rules):
    model, optimizer = create()
print("each device holds", model.moe.experts.down[...].sharding.spec, "of the experts")
for step in range(101):
    first = jax.random.randint(jax.random.key(step), (16, 1), 0, VOCABULARY)
    loss = train(model, optimizer, (first + jnp.arange(9)) % VOCABULARY)
    if step % 50 == 0:
        print(f"step {step:3}: loss {loss:.3f}")
