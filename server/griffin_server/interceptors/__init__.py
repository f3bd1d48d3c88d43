"""What happens around every call of package griffin.v1: one job a file, in ``chain``'s order."""
