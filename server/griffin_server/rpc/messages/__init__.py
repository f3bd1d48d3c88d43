"""The one home of conversion between protobuf messages and the core's types, in both directions."""
