"""gRPC services over griffin_core, and the `griffin` command."""

from importlib.metadata import version

__version__ = version("griffin-serving")
