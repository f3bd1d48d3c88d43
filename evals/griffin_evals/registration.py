"""Makes ``lm_eval --model griffin`` work after an installation, with no file to copy.

lm-eval reads no entry points of other packages, so this module adds the name when lm-eval's models
are imported. A ``.pth`` file makes every interpreter import this module at its start. Until lm-eval
is imported it only imports ``sys`` and installs a finder. See ADR 24.
"""

import sys

NAME = "griffin"
TARGET = "griffin_evals.lm:GriffinLM"
MODELS = "lm_eval.models"


class WhenImported:
    """A finder on ``sys.meta_path`` that finds one module like the other finders, and registers
    after its import."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name != MODELS:
            return None
        others = [other for other in sys.meta_path if not isinstance(other, WhenImported)]
        found = (other.find_spec(name, path, target) for other in others)
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module):  # type: ignore[no-untyped-def]
                execute(module)
                register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Adds the model to lm-eval's registry, unless it is registered or lm-eval has no such
    registry."""
    try:
        from lm_eval.api.registry import model_registry  # noqa: PLC0415
    except ImportError:
        return
    if NAME not in model_registry:
        model_registry.register(NAME, target=TARGET)


if MODELS in sys.modules:
    register()
else:
    sys.meta_path.insert(0, WhenImported())
