"""Environment variables of the name GRIFFIN_* that are no settings, and what is said about them.

The kubelet puts variables into every pod beside a Service, named after it: those of a Service
``griffin`` look like ours, GRIFFIN_PORT above all (Kubernetes documentation, "Accessing the
Service", environment variables).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches

PREFIX = "GRIFFIN_"

OTHERS = ("GRIFFIN_CACHE_DIR", "GRIFFIN_TARGET")
"""Read elsewhere: where converted models are kept, and what the client's commands call."""

_LINK_VALUE = re.compile(r"(tcp|udp|sctp)://.+:\d+", re.IGNORECASE)
_LINK_NAME = re.compile(
    r"\w+_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)",
    re.IGNORECASE,
)


def is_service_link(name: str, value: str) -> bool:
    """Whether a variable is one that Kubernetes makes for a Service: by its name, or a port by its
    value, for a Service ``griffin-metrics`` makes a GRIFFIN_METRICS_PORT."""
    is_port = name.upper().endswith("_PORT") and _LINK_VALUE.fullmatch(value)
    return bool(is_port or _LINK_NAME.fullmatch(name))


def notes(environment: Mapping[str, str], settings: Iterable[str]) -> list[str]:
    """Sentences on variables that look like settings and are not taken.

    Args:
        settings: names of settings, as fields.
    """
    known = {f"{PREFIX}{name.upper()}" for name in settings}
    links, said = [], []
    for name, value in sorted(environment.items()):
        if not name.upper().startswith(PREFIX) or name.upper() in OTHERS:
            continue
        if is_service_link(name, value):
            if name.upper() in known:
                links.append(name)
        elif name.upper() not in known:
            close = get_close_matches(name.upper(), known, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            said.append(f"{name} is in the environment, and there is no such setting{hint}")
    if links:
        said.append(
            f"{', '.join(links)} in the environment is of a Kubernetes Service and not a setting: "
            "left alone"
        )
    return said
