"""What crosses from planner to runtime: frozen dataclasses and the folder format."""
