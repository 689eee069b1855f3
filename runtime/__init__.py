"""Artifact -> engine -> sequences -> tokens."""
