"""A batch of prompts decoded by the bundled model, which adds numbers, on eight virtual devices.

Run it with `python examples/batched_decode.py`; on GPUs or TPUs leave `jax_num_cpu_devices` out. For another model,
give `LLM` a directory in Hugging Face layout.
"""

import jax

from moe_jax import LLM, SamplingParams

jax.config.update("jax_num_cpu_devices", 8)

# Each device decodes its own part of the batch and holds its own part of the experts.
llm = LLM(mesh="expert=8")

# Prompts of any number and length; the engine starts one as soon as another has finished.
prompts = [f"{first}+{second}=" for first in (7, 42, 999) for second in (1, 58, 1234)]
greedy = SamplingParams(temperature=0, max_tokens=8)
for prompt, output in zip(prompts, llm.generate(prompts, greedy), strict=True):
    print(f"{prompt}{output.text}  ({output.finish_reason}, log-probability {sum(output.logprobs):.3f})")

# Each prompt may have parameters of its own, and several samples.
drawn = SamplingParams(temperature=5.0, top_k=3, n=3, seed=0, max_tokens=8)
first, second = llm.generate(["12+34=", "12+34="], [greedy, drawn])
print("greedy:", first.text, " drawn:", [sample.text for sample in second.outputs])
print(llm.stats())
