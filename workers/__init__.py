"""What a worker is made of; knows no single component. ``celery -A workers`` finds the application here."""

from typing import Any


def __getattr__(name: str) -> Any:
    # Lazily: the modules of this package are useful without a configuration.
    if name == "celery":
        from workers.app import app_of_program

        return app_of_program()
    raise AttributeError(name)
