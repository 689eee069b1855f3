"""The interface from planner to runtime: frozen dataclasses and the folder format."""

import os

# Threads of torch's OpenMP library (libgomp) spin while they wait for each other. On a machine that
# has other work the one they wait for may be off the processor, and each of a step's many small
# products then lasts a scheduler's quantum: 25 times slower was measured, and nothing was lost on
# an idle machine by spinning briefly (docs/LOG.md). libgomp reads this once, when torch loads it.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
# Told where threads belong, libgomp binds the main thread to one CPU when torch loads it. Every
# thread that is started later, readers of the disk included, inherits that CPU, and the machine
# would be taken for one of a single CPU. Job scripts set these for programs of OpenMP alone.
for _binding in ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY"):
    os.environ.pop(_binding, None)
