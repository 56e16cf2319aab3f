"""Engines for users.

llm.py             `LLM`: a checkpoint on a mesh; prompts in, texts out
async_llm.py       `AsyncLLM`: streams for programs with asyncio
engine_loop.py     the engine's thread, which all callers share
batch_files.py     a file of prompts in, a file of results out, resumable from its journal (journal.py)
evaluation.py      perplexity and exact matches on a user's data
prompts.py         checks of prompts and sampling parameters
request_group.py   one prompt with its samples
settings.py        settings that all processes must share
"""
