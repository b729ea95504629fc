"""The HTTP interface in front of the engine, as OpenAI's clients speak it."""

from .api import Limits, application
from .host import Link

__all__ = ["Limits", "Link", "application"]
