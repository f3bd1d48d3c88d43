"""Faults in real servers: processes, sockets, a spoiling peer, a judge of what clients saw."""
