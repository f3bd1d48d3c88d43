"""Running the service: settings, errors as statuses, request ids, health, logs."""
