"""Given continuations scored by their log-likelihood, as multiple-choice evaluations do.

Run it with `python examples/scoring.py`. The bundled model, which adds numbers, chooses among three answers to each
sum.
"""

import jax
import numpy as np
from scipy.special import log_softmax

from moe_jax import LLM

jax.config.update("jax_num_cpu_devices", 8)
QUESTIONS = {"12+34=": ["46", "47", "64"], "99+1=": ["101", "100", "910"], "7+8=": ["16", "51", "15"]}

llm = LLM(mesh="expert=8")


def log_likelihoods(prompt: str, continuations: list[str]) -> list[float]:
    """Log-probabilities of the continuations' tokens after the prompt, summed over each continuation."""
    assert llm.tokenizer, "this checkpoint has no tokenizer.json: score lists of token ids"
    start = len(llm.tokenizer.encode(prompt).ids)
    sequences = [llm.tokenizer.encode(prompt + continuation).ids for continuation in continuations]
    scores = []
    for ids, logits in zip(sequences, llm.logits(sequences), strict=True):  # [length, vocabulary], one row per token
        after = log_softmax(logits[:-1], axis=-1)  # row i predicts token i + 1
        scores.append(float(after[np.arange(start - 1, len(ids) - 1), ids[start:]].sum()))
    return scores


right = 0
for question, answers in QUESTIONS.items():
    scores = log_likelihoods(question, answers)
    best = answers[int(np.argmax(scores))]
    right += int(best) == sum(map(int, question.rstrip("=").split("+")))
    print(question, {answer: round(score, 2) for answer, score in zip(answers, scores, strict=True)}, "->", best)
print(f"{right} of {len(QUESTIONS)} right")
