"""Video made by drawing, for people with no data yet and for tests."""

from .actors import ACTIONS, generate_actors
from .gestures import GESTURES, generate_gestures
from .speech import WORDS
from .words import generate

__all__ = ["ACTIONS", "GESTURES", "WORDS", "generate", "generate_actors", "generate_gestures"]
