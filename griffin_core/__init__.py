"""The method and the engine: torch and transformers; no gRPC, no metrics, no command line.

Imported before torch, it sets how OpenMP's threads wait (``openmp``).
"""

import os

from griffin_core.openmp import wait_briefly

wait_briefly(os.environ)
