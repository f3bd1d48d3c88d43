"""The sizes of a study: numbers of texts and tokens, and constants."""

from __future__ import annotations

from dataclasses import dataclass, replace

DENSITY = 0.5
"""The paper's density, for parts that measure a single one."""


LARGE_VOCABULARY = 100_000
"""Vocabulary size above which a model's head takes longer than its layers."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of texts and tokens.

    Args:
        texts: the number of texts of each domain.
        prompt_tokens: tokens of a text that choose the experts.
        continuation_tokens: tokens after the prompt that are teacher-forced.
        long_texts: the most long texts.
        long_tokens: the tokens of the longest prefix of a long text.
        follow_tokens: the tokens after that prefix, and the window of the drift part.
        generated_tokens: the tokens of each completion in the drift part.
        speed_rounds: the repetitions of the timing.
        speed_steps: the decode steps of each repetition.

    Raises:
        ValueError: a number is below 1.
    """

    texts: int = 4
    prompt_tokens: int = 256
    continuation_tokens: int = 64
    long_texts: int = 10
    long_tokens: int = 2048
    follow_tokens: int = 64
    generated_tokens: int = 512
    speed_rounds: int = 9
    speed_steps: int = 24

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name}: got {value}; allowed: 1 or more")

    def for_vocabulary(self, vocabulary: int) -> Sizes:
        """Half of the texts for a model of a large vocabulary, so that it takes about as long as
        others of its size."""
        if vocabulary <= LARGE_VOCABULARY:
            return self
        texts, long_texts = ((number + 1) // 2 for number in (self.texts, self.long_texts))
        return replace(self, texts=texts, long_texts=long_texts)

    @property
    def text_tokens(self) -> int:
        """Tokens that a text must have: prompt, continuation and one that the last row predicts."""
        return self.prompt_tokens + self.continuation_tokens + 1
