"""What the routers of a model do with text: traced, counted, and shown against a random gate."""

from skipmega.inspection.routers.report import inspect_routers
from skipmega.inspection.routers.subject import Subject, Vocabulary, open_subject
from skipmega.inspection.routers.texts import named_paths

__all__ = ["Subject", "Vocabulary", "inspect_routers", "named_paths", "open_subject"]
