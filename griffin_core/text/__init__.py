"""Between text and token ids: tokenizers, chat templates, prompts, text as it is generated."""
