"""Serves a model: OpenAI's API and a chat page."""
