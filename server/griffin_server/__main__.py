"""The entry point of the `griffin` command. Without the extra `server` it says what to install."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the console script."""
    try:
        from griffin_server.commands import app  # noqa: PLC0415
    except ModuleNotFoundError as error:
        sys.exit(
            f"griffin: no module {error.name}: the command needs the extra `server`, which is "
            "installed by pip install 'griffin-serving[server]'"
        )
    app()


if __name__ == "__main__":
    main()
