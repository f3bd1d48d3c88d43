"""Forward passes of the model: prefill of prompts, and decode steps."""
