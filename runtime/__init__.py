"""Artifact -> session -> tokens."""
