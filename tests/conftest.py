"""All tests run on eight virtual CPU devices, through the code path of an accelerator."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
