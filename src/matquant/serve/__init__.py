"""An OpenAI-compatible server for a nested checkpoint, without torch."""
