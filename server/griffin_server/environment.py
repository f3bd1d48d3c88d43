"""Warnings about environment variables that look like settings (GRIFFIN_*) but are not.

The kubelet sets variables named after each Service in every pod. Those of a Service ``griffin``
look like settings, GRIFFIN_PORT above all (Kubernetes documentation, "Accessing the Service",
environment variables).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches

PREFIX = "GRIFFIN_"

OTHERS = ("GRIFFIN_CACHE_DIR", "GRIFFIN_TARGET")
"""Variables that other modules read: the cache of converted models, and the commands' target."""

_LINK_VALUE = re.compile(r"(tcp|udp|sctp)://.+:\d+", re.IGNORECASE)
_LINK_NAME = re.compile(
    r"\w+_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)",
    re.IGNORECASE,
)


def is_service_link(name: str, value: str) -> bool:
    """Whether Kubernetes sets a variable for a Service. A port is recognized by its value, since a
    Service ``griffin-metrics`` has the variable GRIFFIN_METRICS_PORT."""
    is_port = name.upper().endswith("_PORT") and _LINK_VALUE.fullmatch(value)
    return bool(is_port or _LINK_NAME.fullmatch(name))


def notes(environment: Mapping[str, str], settings: Iterable[str]) -> list[str]:
    """Warnings about variables that look like settings and are ignored.

    Args:
        settings: the field names of all settings.
    """
    known = {f"{PREFIX}{name.upper()}" for name in settings}
    links, warnings = [], []
    for name, value in sorted(environment.items()):
        if not name.upper().startswith(PREFIX) or name.upper() in OTHERS:
            continue
        if is_service_link(name, value):
            if name.upper() in known:
                links.append(name)
        elif name.upper() not in known:
            close = get_close_matches(name.upper(), known, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            warnings.append(f"{name} in the environment is ignored: no setting has this name{hint}")
    if links:
        warnings.append(
            f"{', '.join(links)} in the environment describe a Kubernetes Service and are no "
            "settings, so they are ignored"
        )
    return warnings
