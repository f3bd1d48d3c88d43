"""Keys and values of sessions, and the bytes they may take."""
