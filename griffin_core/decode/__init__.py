"""The generation phase: sessions, sampling, stopping, and the engine that steps them."""
