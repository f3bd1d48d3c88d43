"""The method and the engine: torch and transformers; no gRPC, no metrics, no command line."""
