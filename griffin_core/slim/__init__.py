"""Slim views: forms in which FF blocks run on experts. Every form is tested against ``masked``."""
