"""OpenAI's endpoints over an `Engine`: one process, with the engine's thread and an event loop."""
