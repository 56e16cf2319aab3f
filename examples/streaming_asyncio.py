"""Tokens streamed to several users at a time, as a server does it with asyncio.

Run it with `python examples/streaming_asyncio.py`. All users' requests are decoded in one batch; cancelling a request
frees its place and its cache for others.
"""

import asyncio

import jax

from moe_jax import LLM, AsyncLLM, SamplingParams

jax.config.update("jax_num_cpu_devices", 8)
GREEDY = SamplingParams(temperature=0, max_tokens=8)
ENDLESS = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)


async def user(name: str, llm: AsyncLLM, prompt: str) -> None:
    text = ""
    async for event in llm.stream(prompt, GREEDY):
        text += event.text or ""
        print(f"{name}: {prompt}{text}", flush=True)


async def impatient_user(llm: AsyncLLM) -> None:
    async for event in llm.stream("999+999=", ENDLESS, request_id="impatient"):
        if event.finish_reason is None:
            llm.cancel("impatient")  # the last event follows
        else:
            print("impatient:", event.finish_reason)


async def main() -> None:
    # One decode step at a time gives tokens one by one; the default of 8 decodes faster.
    async with AsyncLLM(LLM(mesh="expert=8", decode_steps=1)) as llm:
        sums = {"ann": "12+34=", "bob": "1234+5678=", "eve": "9999+1="}
        users = [user(name, llm, prompt) for name, prompt in sums.items()]
        await asyncio.gather(*users, impatient_user(llm))
        print("all users are served:", llm.stats())


asyncio.run(main())
