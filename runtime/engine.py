"""Engine: a model in fast memory, and the sequences that decode with it.

    with Engine.open(artifact) as engine:
        sequence = engine.new_sequence()
        for tokens in sequence.generate(prompt_ids, GenerationParams(max_tokens=64)):
            ...

It takes and returns token ids: runtime/text handles text.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.artifacts.common.progress import Progress, unseen
from subspec.artifacts.footprint import MIXED_PREFILL_ROWS
from subspec.artifacts.format.prebuilt import find_prebuilt
from subspec.artifacts.format.store import Artifact, open_artifact
from subspec.artifacts.native import cpp
from subspec.artifacts.plan import DrafterName, Method, Placement, Plan, split_rows
from subspec.runtime.decode import (
    PrefillResult,
    Round,
    decode_plainly,
    decode_unpadded,
    prefill,
    speculate,
)
from subspec.runtime.draft import compiled_layers
from subspec.runtime.draft.draft_model import DraftModelDrafter
from subspec.runtime.draft.drafter import DecodeState, SubstituteDrafter
from subspec.runtime.exact_pass import Model, PrefillChunk, tokens_that_fit
from subspec.runtime.kernels import triton_driver
from subspec.runtime.kernels.linear import single_row_kernels
from subspec.runtime.memory import PeakMeter
from subspec.runtime.model.cache import Cache
from subspec.runtime.open_model import OpenedModel, open_model
from subspec.runtime.open_model import OpenOptions as OpenOptions  # programs import it from here
from subspec.runtime.prediction import is_planned, predicted_speed
from subspec.runtime.programs import graph_programs, needed_kernels
from subspec.runtime.sequence import Sequence


class Engine:
    """One model in fast memory, under one plan. Close it, or use it as a context manager."""

    def __init__(self, opened: OpenedModel) -> None:
        self.artifact: Artifact = opened.artifact
        self.plan: Plan = opened.artifact.plan
        self.method: Method = opened.method
        self.drafter: DrafterName | None = opened.drafter
        self.drafters = opened.drafters  # see `set_drafter`
        self.device = opened.device
        self.memory = opened.memory
        self.peak = PeakMeter(opened.memory)
        self.model: Model = opened.model
        options = opened.options
        self.padded = options.pads(self.plan)
        self.link_bandwidth = options.link_bandwidth
        # None: that of the plan's trees, or nothing ranks its tokens
        ranks = opened.drafter not in (None, "lookup")
        self.draft_temperature = options.draft_temperature if ranks else None
        self.num_prefill_chunks = 0  # the first chunk also waits for digests
        self._caches = opened.caches  # not in use by a sequence
        self._prefilling: list[Sequence] = []  # in order of arrival
        self._decoding: list[Sequence] = []
        self._resources = opened.resources
        self._closed = False
        # By the numbers of sequences that decode and that prefill; see `_watched`
        self._watched_lengths = dict[tuple[int, int], int]()

    @classmethod
    def open(
        cls,
        artifact: Artifact | str | Path,
        options: OpenOptions | None = None,
        progress: Progress = unseen,
    ) -> "Engine":
        """Load the model of an artifact into fast memory, as its plan says.

        progress(stage, share from 0 to 1) is called while weights load. Raises SubspecError:
        INFEASIBLE if the plan has no room for the method, WRONG_MACHINE for a plan of another
        device, RESOURCES if memory is short, CORRUPT for damaged files. An error closes what was
        opened.
        """
        if not isinstance(artifact, Artifact):
            artifact = open_artifact(Path(artifact))
        return cls(open_model(artifact, options or OpenOptions(), progress))

    def new_sequence(self) -> Sequence:
        """Return an empty sequence; close it to free its cache for another one. Raises
        SubspecError(RESOURCES) if the plan's sequences are all in use."""
        self.check_open()
        if not self._caches:
            raise SubspecError(
                Exit.RESOURCES,
                f"all {self.plan.num_sequences} sequences of the plan are in use",
                "close one, or plan with more: subspec-plan --sequences N",
            )
        cache = self._caches.pop()
        cache.roll_back(0)
        return Sequence(self, cache)

    def set_drafter(self, drafter: DrafterName) -> None:
        """Switch to another of `drafters`, from the next round on."""
        self.drafter, self.model = drafter, replace(self.model, drafter=self.drafters[drafter])

    @torch.inference_mode()
    def step(self) -> bool:
        """Stream the exact weights once for all active sequences. Return False if there are none.

        Unread prompts are prefilled, and the other sequences do a round: their drafts grow
        together, the stream verifies all of them, and each commits what it keeps. After an error,
        sequences that have not committed the round are unchanged: the next step repeats it.
        """
        self.prepare()
        active = list(self._decoding)
        chunks = self._next_chunks()
        if not active and not chunks:
            return False
        exact, clock = self.model.exact, self.model.clock
        seconds_before, wait_before = dict(clock.seconds), exact.wait_seconds
        bytes_before = exact.streamed_bytes
        sizes = [sequence.cache.length for sequence in active]
        sizes += [chunk.cache.length + len(chunk.tokens) for chunk in chunks.values()]
        with self._watched((len(active), len(chunks)), max(sizes)):
            rounds, prefilled = self._passes(
                [sequence.state for sequence in active], list(chunks.values())
            )
        self.num_prefill_chunks += len(chunks)
        seconds = {k: v - seconds_before.get(k, 0.0) for k, v in clock.seconds.items()}
        for (sequence, chunk), result in zip(chunks.items(), prefilled, strict=True):
            sequence.finish_chunk(chunk, result, sum(seconds.values()))
        for sequence, round_ in zip(active, rounds, strict=True):
            sequence.finish_round(
                round_,
                draft_seconds=seconds.get("draft", 0.0),
                verify_seconds=seconds["verify"],
                wait_seconds=exact.wait_seconds - wait_before,
                streamed_bytes=exact.streamed_bytes - bytes_before,
            )
        return True

    def _passes(
        self, states: list[DecodeState], chunks: list[PrefillChunk]
    ) -> tuple[list[Round], list[PrefillResult]]:
        model = self.model
        if not states:
            return [], prefill(model, chunks)
        if model.drafter is not None:
            return speculate(model, states, chunks)
        if self.padded:
            return decode_plainly(model, states, chunks)
        prefilled = prefill(model, chunks) if chunks else []  # without single-row kernels
        with single_row_kernels() if self.device.type == "cpu" else nullcontext():
            return decode_unpadded(model, states), prefilled

    def _next_chunks(self) -> dict[Sequence, PrefillChunk]:
        """Return the chunks of prompts for the next pass: few tokens while other sequences decode,
        so that these do not wait for long. A prompt with log probabilities gets no more rows than a
        verification of the sequence has."""
        plan, found = self.plan, dict[Sequence, PrefillChunk]()
        rows_left = plan.prefill_chunk_tokens
        if self._decoding:
            rows_left = min(rows_left, max(MIXED_PREFILL_ROWS, plan.prompt_widths[0]))
        for sequence in self._prefilling:
            rows = (
                min(rows_left, plan.verify_width) if sequence.wants_prompt_logprobs else rows_left
            )
            count = tokens_that_fit(plan, len(sequence.unread), rows)
            if not count:
                break
            found[sequence] = sequence.next_chunk(count)
            rows_left -= sum(split_rows(plan.prompt_widths, count))
        return found

    def add(self, sequence: Sequence) -> None:
        """Add a sequence to the batch, from the next step on."""
        self._prefilling.append(sequence)

    def start_decoding(self, sequence: Sequence) -> None:
        """Move a sequence from prefill to decoding."""
        self._prefilling.remove(sequence)
        self._decoding.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence from the batch."""
        for sequences in (self._prefilling, self._decoding):
            if sequence in sequences:
                sequences.remove(sequence)

    def is_active(self, sequence: Sequence) -> bool:
        """Return True if the sequence is in the batch."""
        return sequence in self._prefilling or sequence in self._decoding

    def release_cache(self, cache: Cache) -> None:
        self._caches.append(cache)

    def check_open(self) -> None:
        """Raises SubspecError(USAGE) after `close`."""
        if self._closed:
            raise SubspecError(Exit.USAGE, "the engine is closed", "open the artifact again")

    def prepare(self) -> None:
        """Set the number of torch threads and the current GPU before a pass. Other code of the
        process may have changed them: bits depend on the number of threads, and Triton launches
        kernels on the thread's current GPU, wherever their tensors are."""
        self.check_open()
        torch.set_num_threads(self.plan.num_threads)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    @contextmanager
    def _watched(self, counts: tuple[int, int], length: int) -> Iterator[None]:
        """Record the peak of memory in the block, but only if `length` has grown by half since the
        last time with these numbers of sequences: watching takes time, and temporaries grow with
        both."""
        if 2 * length < 3 * self._watched_lengths.get(counts, 0):
            yield
            return
        self._watched_lengths[counts] = length
        with self.peak.watch():
            yield

    @property
    def uses_planned_drafter(self) -> bool:
        """Return True if the plan's predictions hold for the drafter in use, lookup aside."""
        return is_planned(self.method, self.drafter, self.draft_temperature)

    def is_predicted_by_plan(self, sequence: Sequence) -> bool:
        """Return True if the plan's predictions hold for the sequence's last answer."""
        looked_up = self.drafter == "substitute+lookup" and any(sequence.stats.proposed)
        return self.uses_planned_drafter and not looked_up and sequence.params.lossy is None

    @property
    def placement(self) -> Placement:
        return self.plan.placement(self.method)

    @property
    def predicted_tokens_per_second(self) -> float | None:
        """Of exact answers; see `predicted_speed`."""
        how = self.method, self.drafter, self.draft_temperature, self.padded
        return predicted_speed(self.plan, *how)

    def predicted_speed_of(self, sequence: Sequence) -> float | None:
        """Predicted tokens/s of the sequence's last answer; None for a lossy one."""
        return None if sequence.params.lossy is not None else self.predicted_tokens_per_second

    @property
    def missing_kernels_reason(self) -> str | None:
        """Why plain twins replace the C++ kernels, or None if they do not."""
        kernels = needed_kernels(self.artifact.spec, self.plan, self.method)
        problems = (unavailable() for _, unavailable in kernels)
        return next((problem for problem in problems if problem is not None), None)

    @property
    def slow_attention_reason(self) -> str | None:
        """Why exact attention on a GPU runs its plain twin, or None if it does not."""
        on_cuda = self.device.type == "cuda"
        return triton_driver.unavailable(self.device) if on_cuda else None

    @property
    def has_prebuilt_kernels(self) -> bool:
        """Return True if the artifact has kernels for this machine that are not trusted yet."""
        kernels = needed_kernels(self.artifact.spec, self.plan, self.method)
        programs = (cpp.program(source) for source, _ in kernels)
        return any(find_prebuilt(self.artifact, program) is not None for program in programs)

    @property
    def slow_draft_reason(self) -> str | None:
        """Why the draft's layers run one by one, or None if they are compiled or nothing is
        drafted."""
        drafter, spec, plan = self.model.drafter, self.artifact.spec, self.plan
        if isinstance(drafter, DraftModelDrafter):
            compilable = self.device.type == "cpu" and plan.int4_kernel == "w4a8"
            if not compilable or compiled_layers.known_form(drafter.model.weights.spec) is not None:
                return None
            return "the draft model has layers that the compiled draft does not compute"
        if not isinstance(drafter, SubstituteDrafter) or drafter.compiled is not None:
            return None
        if plan.draft_graphs:
            programs = graph_programs(plan, spec)
            if all(find_prebuilt(self.artifact, program) for program in programs):
                return "--trust-kernels would load the artifact's compiled graphs"
            return (
                "its compiled graphs are of another torch or processor, or of an artifact "
                "elsewhere; subspec-plan --model compiles new ones"
            )
        compilable = self.device.type == "cpu" and plan.int4_kernel == "w4a8"
        if not compilable or compiled_layers.known_form(spec) is not None:
            return None
        return "this model has layers that the compiled draft does not compute"

    @property
    def missing_graphs_reason(self) -> str | None:
        """Why the draft's levels are not captured, or None if they are or need not be."""
        drafter = self.model.drafter
        return drafter.graph_problem if isinstance(drafter, SubstituteDrafter) else None

    def close(self) -> None:
        """Release fast memory. The engine's sequences cannot be used any more."""
        self._closed = True
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        finally:  # also after an error of the GPU
            self._resources.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
