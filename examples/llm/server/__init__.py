"""The HTTP interface in front of the engine, as OpenAI's clients speak it."""

from .api import Limits, application

__all__ = ["Limits", "application"]
