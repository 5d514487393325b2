"""Text around a model: tokenizers, text that grows token by token, chat templates, tool calls. Without torch."""
