"""What crosses from planner to runtime: frozen dataclasses and the folder format."""

import os

# Threads of torch's OpenMP library (libgomp) spin while they wait for each other. On a machine that
# has other work the one they wait for may be off the processor, and each of a step's many small
# products then lasts a scheduler's quantum: 25 times slower was measured, and nothing was lost on
# an idle machine by spinning briefly (docs/LOG.md). libgomp reads this once, when torch loads it.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
