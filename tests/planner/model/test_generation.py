"""Generation settings that transformers obeys and we do not are named."""

import json
from pathlib import Path
from typing import Any

import pytest

from subspec.planner.model.generation import generation_notes, read_generation


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[3]]},
        {"suppress_tokens": [5]},
        {"begin_suppress_tokens": [0]},
        {"forced_eos_token_id": 0},
        {"num_beams": 4},
        {"guidance_scale": 1.5},
        {"min_new_tokens": 5},
        {"sequence_bias": [[[3], -10.0]]},
        {"exponential_decay_length_penalty": [1, 2.0]},
        {"watermarking_config": {"bias": 2.0}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_changes_greedy_tokens_is_named_with_its_value(fields: dict[str, Any]) -> None:
    (note,) = generation_notes({"eos_token_id": 2, **fields})
    for name, value in fields.items():
        assert f"{name} {str(value)[:40]}" in note


def test_several_fields_are_one_line_and_a_long_value_is_cut() -> None:
    (note,) = generation_notes({"num_beams": 2, "bad_words_ids": [[n] for n in range(1000)]})
    assert "num_beams 2" in note and "bad_words_ids [[0], [1]" in note
    assert "\n" not in note and len(note) < 300


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1},
        {"repetition_penalty": 1.0, "num_beams": 1, "guidance_scale": 1},
        {"repetition_penalty": None, "no_repeat_ngram_size": 0, "bad_words_ids": []},
        {"max_length": 4096, "max_new_tokens": 10, "pad_token_id": 0, "length_penalty": 2.0},
    ],
    ids=str,
)
def test_what_leaves_greedy_tokens_alone_is_not_mentioned(fields: dict[str, Any]) -> None:
    assert generation_notes(fields) == ()


def test_the_config_decides_only_where_there_is_no_generation_config(tmp_path: Path) -> None:
    config = {"repetition_penalty": 1.3, "hidden_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_generation(tmp_path) == {"repetition_penalty": 1.3}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 1}')
    assert read_generation(tmp_path) == {"eos_token_id": 1}
