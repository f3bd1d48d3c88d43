"""Printing a completion while it is generated."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict

from griffin_client import Event, Finished, Started, Tokens
from griffin_server.commands.failures import err


def figures_line(started: Started, finished: Finished) -> str:
    """A line with a completion's token counts, speed and density."""
    usage, pruning = finished.usage, finished.pruning
    return (
        f"{usage.prompt_tokens} + {usage.generated_tokens} tokens · "
        f"first token {finished.timings.first_token_s:.2f} s · "
        f"{finished.tokens_per_second:.1f} tokens/s · "
        f"FF density {pruning.density:g} ({pruning.experts_per_layer}/{pruning.ff_width}), "
        f"ran at {pruning.mean_density:.2f} · "
        f"{_agreement(finished)}{_drafted(finished)}{finished.reason}"
    )


def _agreement(finished: Finished) -> str:
    agreement = finished.pruning.agreement
    return "" if agreement is None else f"agrees with dense {agreement:.0%} · "


def _drafted(finished: Finished) -> str:
    figures = finished.speculation
    drafted = figures.lookup_drafted + figures.slim_drafted
    if not drafted:
        return ""
    return f"{figures.lookup_accepted + figures.slim_accepted} of {drafted} drafts accepted · "


def show(events: Iterator[Event], *, as_json: bool) -> str:
    """Prints a stream's text, or its events as JSON; returns the text."""
    text = ""
    started: Started | None = None
    for event in events:
        if as_json:
            print(json.dumps({"event": type(event).__name__.lower(), **asdict(event)}), flush=True)
        match event:
            case Started():
                started = event
            case Tokens():
                text += event.text
                if not as_json:
                    print(event.text, end="", flush=True)
            case Finished() if not as_json and started is not None:
                print(flush=True)
                err.print(f"[dim]{figures_line(started, event)}[/dim]", soft_wrap=True)
    return text
