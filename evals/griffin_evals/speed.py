"""Tokens per second of single requests, measured beside the quality."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_eval.api.instance import Instance

if TYPE_CHECKING:
    from griffin_evals.lm import GriffinLM

TOKENS = 64
"""The most tokens of a completion after its first token."""

REPEATS = 3

WHAT = (
    f"tokens a second of one request at a time between its first and last token (greedy, up to "
    f"{TOKENS} tokens after a prompt of some 150, {REPEATS} prompts after one to warm up)"
)

PARAGRAPH = """The lighthouse on the northern cape was built when ships still carried coal, and
its keepers wrote down the weather four times a day. Entry {number} of their book tells of a storm
that lasted three nights. The wind came from the west, the lamp was kept burning with oil from the
cellar, and on the second morning a boat with five fishermen reached the small harbour below the
rocks. They were given soup and dry clothes, and they stayed until the sea was calm. Years later one
of them, who had become a teacher in the town, told his pupils what he had seen from the boat that
night. "We had lost our bearings," he said, "and nobody spoke any more. Then""".replace("\n", " ")


def tokens_per_second(lm: GriffinLM) -> list[float]:
    """Returns the rate of each prompt; see ``WHAT``. Its time is that of a completion minus that of
    its first token.

    Args:
        lm: a model without a journal, since stored answers would take no time.
    """
    rates = []
    for number in range(REPEATS + 1):
        prompt = PARAGRAPH.format(number=number + 1)
        first_s, _ = _run(lm, prompt, 1)
        whole_s, generated = _run(lm, prompt, 1 + TOKENS)
        if number and generated > 1 and whole_s > first_s:
            rates.append((generated - 1) / (whole_s - first_s))
    return rates


def _run(lm: GriffinLM, prompt: str, most: int) -> tuple[float, int]:
    """Returns the seconds taken, and the number of tokens generated."""
    lm = lm.with_settings()  # with figures of its own
    kwargs = {"until": [], "max_gen_toks": most, "do_sample": False}
    request = Instance("generate_until", {}, (prompt, kwargs), 0, metadata=("speed", 0, 1))
    lm.generate_until([request], disable_tqdm=True)
    figures = lm.figures()
    return figures["seconds"], figures["generated_tokens"]
