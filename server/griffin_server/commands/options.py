"""Types of the options and arguments that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

ModelName = Annotated[
    str, typer.Argument(help="A directory, a .gguf file or a hub id, as in `serve`.")
]
Target = Annotated[
    str,
    typer.Option(
        envvar="GRIFFIN_TARGET",
        help="Address of a server in role all or decode: host:port or unix:PATH.",
    ),
]
Density = Annotated[
    float | None,
    typer.Option(help="Fraction of FF neurons to run on, in (0, 1]; by default the server's."),
]
Policy = Annotated[
    str | None,
    typer.Option(
        help="topk, sampled, topk_sampled, magnitude, random or, for a calibrated model, sensitive "
        "or topk_budgets; by default the server's."
    ),
]
Correction = Annotated[
    str | None,
    typer.Option(
        help="What stands in for the neurons that are left out: none, bias or residual; by default "
        "the server's."
    ),
]
CorrectionRank = Annotated[
    int | None, typer.Option(help="Rank of a residual, in [1, 256]; by default the server's.")
]
WarmupTokens = Annotated[
    int | None,
    typer.Option(
        help="Tokens of prompt and completion that run dense and choose the experts; by default "
        "the server's."
    ),
]
Checks = Annotated[
    bool,
    typer.Option("--checks", help="Measure how many tokens the dense model would have drawn too."),
]
AgreementFloor = Annotated[
    float | None,
    typer.Option(
        help="Instead of a density: the least agreement with the dense model to aim at, in (0, 1)."
    ),
]
Speculation = Annotated[
    str | None,
    typer.Option(help="What drafts tokens: off, lookup, slim or auto; by default the server's."),
]
MaxTokens = Annotated[int | None, typer.Option(help="The most tokens to generate; by default 256.")]
Temperature = Annotated[
    float | None,
    typer.Option(help="0 is greedy; by default the server's, which is greedy unless set there."),
]
TopP = Annotated[
    float | None,
    typer.Option(
        help="Sample from the most likely tokens that together have this probability, in (0, 1]; "
        "by default the server's."
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(help="Sample from the k most likely tokens, 0 for all; by default the server's."),
]
MinP = Annotated[
    float | None,
    typer.Option(
        help="Sample from tokens with at least this fraction of the most likely token's "
        "probability, in [0, 1]; by default the server's."
    ),
]
TemplateKwargs = Annotated[
    str | None,
    typer.Option(
        help="More variables for the chat template, as a JSON object such as "
        "'{\"enable_thinking\": false}'."
    ),
]
Seed = Annotated[
    int | None, typer.Option(help="Seed of the sampling; the same seed gives the same tokens.")
]
Timeout = Annotated[float | None, typer.Option(help="Deadline of the whole call in seconds.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")]
