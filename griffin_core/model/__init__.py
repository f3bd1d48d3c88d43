"""Models: finding and loading them, and the one decoder definition for all families."""
