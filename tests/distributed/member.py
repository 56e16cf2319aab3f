"""One of several processes that hold one mesh, through the Python interface.

python member.py COORDINATOR PROCESSES PROCESS MESH once|forever

Every process prints "joined"; Gloo prints messages of its own. Process 0 prints a line of JSON for each call of
`generate`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import jax

from moe_jax import LLM, RequestOutput, SamplingParams, distributed

PROMPTS = ["12+34=", "999+1=", "7+8="]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=0),
    SamplingParams(temperature=2, seed=3, max_tokens=4, ignore_eos=True),
    SamplingParams(temperature=2, seed=4, max_tokens=4, ignore_eos=True),
]
CHEAP = SamplingParams(temperature=0, max_tokens=4)
"""Parameters that compile faster, for processes that are killed."""
OPTIONS: dict[str, Any] = {"dtype": "float32", "max_batch_size": 8, "decode_steps": 4}


def readable(outputs: list[RequestOutput]) -> str:
    return json.dumps([(output.token_ids, output.logprobs, output.prompt_logprobs) for output in outputs])


def main(coordinator: str, processes: str, process: str, mesh: str, how_often: str) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    with distributed.join(coordinator, int(processes), int(process)) as process_group:
        print("joined", flush=True)
        llm = LLM(mesh=mesh, process_group=process_group, **OPTIONS)
        if not process_group.is_driver:
            llm.run_worker()
            return
        params = PARAMS if how_often == "once" else CHEAP
        print(readable(llm.generate(PROMPTS, params)), flush=True)
        while how_often == "forever":
            print(readable(llm.generate(PROMPTS, params)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
