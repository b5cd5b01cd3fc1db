"""aistream: a model's answer, streamed to a browser and delivered to an n8n workflow, whatever happens in between."""

__version__ = "0.1.0"
