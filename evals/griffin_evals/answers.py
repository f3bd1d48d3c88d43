"""Gathers answers to many requests: each distinct request is sent once, stored in a journal and
counted."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any, TypeVar

from tqdm import tqdm

from griffin_evals.backend import Generated, Scored
from griffin_evals.journal import Journal

Answer = TypeVar("Answer", Scored, Generated)


class Answers:
    """Gathers answers and counts them.

    Args:
        journal: searched for answers first, and receives new ones; None for no journal.
    """

    def __init__(self, journal: Journal | None) -> None:
        self._journal = journal
        self._requests = self._from_journal = 0
        self._scored_tokens = self._generated_tokens = 0
        self._norm_masses: list[float] = []
        self._seconds = 0.0

    def gather(
        self,
        keys: Sequence[str],
        kind: type[Answer],
        ask: Callable[[Sequence[int], Callable[[int, Answer], None]], None],
        *,
        words: str,
        disable_tqdm: bool,
        each: Callable[[int, Answer], None],
    ) -> list[Answer]:
        """Returns the answers to all requests, in order.

        Args:
            keys: a key for each request, from ``Settings.key_of``; requests with the same key have
                one answer.
            ask: called once with indices of requests; yields their answers in any order.
            words: the label of the progress bar.
            each: called with each request's index and answer as soon as it is known.
        """
        began = time.monotonic()
        places: defaultdict[str, list[int]] = defaultdict(list)
        for place, key in enumerate(keys):
            places[key].append(place)
        answers: dict[str, Answer] = {}
        with tqdm(total=len(keys), desc=words, disable=disable_tqdm) as bar:

            def take(key: str, answer: Answer) -> None:
                answers[key] = answer
                for place in places[key]:
                    each(place, answer)
                bar.update(len(places[key]))

            def answered(place: int, answer: Answer) -> None:
                if self._journal is not None:
                    self._journal.put(keys[place], asdict(answer))
                take(keys[place], answer)

            for key in places:
                kept = None if self._journal is None else self._journal.get(key)
                if kept is not None:
                    self._from_journal += len(places[key])
                    take(key, kind(**kept))
            missing = [first for key, (first, *_) in places.items() if key not in answers]
            try:
                if missing:
                    ask(missing, answered)
            finally:
                self._count(answers.values())
                self._seconds += time.monotonic() - began
        self._requests += len(keys)
        return [answers[key] for key in keys]

    def figures(self) -> dict[str, Any]:
        """Returns the counts and means; see ``GriffinLM.figures``."""
        return {
            "requests": self._requests,
            "from_journal": self._from_journal,
            "mean_norm_mass": fmean(self._norm_masses) if self._norm_masses else None,
            "scored_tokens": self._scored_tokens,
            "generated_tokens": self._generated_tokens,
            "tokens": self._scored_tokens + self._generated_tokens,
            "seconds": round(self._seconds, 3),
        }

    def _count(self, answers: Any) -> None:
        for answer in answers:
            self._norm_masses.append(answer.norm_mass)
            if isinstance(answer, Scored):
                self._scored_tokens += answer.tokens
            else:
                self._generated_tokens += answer.tokens
