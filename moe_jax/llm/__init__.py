"""The public face: `LLM`, `AsyncLLM` and files of prompts."""
