"""Speed, measured: each module prints the physical ceiling first and one line of JSON last."""

import griffin_core  # noqa: F401  # before torch: threads wait for one another as a server's do
