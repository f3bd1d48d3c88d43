"""The gRPC services: a servicer a service, and what their calls need."""
