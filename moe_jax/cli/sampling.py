"""Options of the sampling parameters."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from moe_jax.config.sampling_params import DEFAULT_CONFIDENCE_THRESHOLD, SamplingParams


@dataclass(frozen=True)
class SamplingOptions:
    """The sampling parameters of all prompts."""

    max_tokens: Annotated[int, typer.Option(help="Maximum tokens to generate for each prompt.")] = (
        SamplingParams.max_tokens
    )
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 means greedy decoding.")] = (
        SamplingParams.temperature
    )
    top_k: Annotated[int, typer.Option(help="Number of most likely tokens to sample from; 0 keeps all tokens.")] = (
        SamplingParams.top_k
    )
    top_p: Annotated[
        float, typer.Option(help="Total probability of the most likely tokens to sample from; 1 keeps all tokens.")
    ] = SamplingParams.top_p
    seed: Annotated[
        int | None, typer.Option(help="Seed of the random draws.", show_default="a new seed for each prompt")
    ] = SamplingParams.seed
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends a continuation; may be repeated.", show_default="none")
    ] = None
    denoising_steps: Annotated[
        int | None,
        typer.Option(
            help="Maximum denoising steps for each block of a block-diffusion model.",
            show_default="one for each token of the block",
        ),
    ] = SamplingParams.denoising_steps
    confidence_threshold: Annotated[
        float | None,
        typer.Option(
            help="Probability above which a block-diffusion model accepts a token at once.",
            show_default=str(DEFAULT_CONFIDENCE_THRESHOLD),
        ),
    ] = SamplingParams.confidence_threshold

    def params(self) -> SamplingParams:
        """Check the values and return them as `SamplingParams`.

        Raises:
          RequestError: a value out of range.
        """
        return SamplingParams(**asdict(self))
