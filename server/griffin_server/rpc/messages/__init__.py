"""Conversion between protobuf messages and the core's types, both ways: its one home."""
