"""Implementations of the same mathematics; none imports the internals of another."""
