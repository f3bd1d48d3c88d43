"""Text and token ids: tokenizers, chat templates, prompts, and incremental decoding."""
