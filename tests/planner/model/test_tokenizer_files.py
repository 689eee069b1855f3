import json
from pathlib import Path
from typing import Any

import pytest

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.planner.model.hub import DEMO
from subspec.planner.model.tokenizer_files import TokenizerFiles, read_tokenizer


def read(folder: Path, config: object = None, template: bytes | None = None) -> TokenizerFiles:
    (folder / "tokenizer.json").write_text("{}")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_bytes(template)
    return read_tokenizer(folder)


def test_the_demo_models_files_are_complete() -> None:
    found = read_tokenizer(DEMO)
    assert found.tokenizer_json == DEMO / "tokenizer.json"
    assert found.chat_template is not None
    assert "<|im_start|>" in found.chat_template
    assert found.special_tokens["eos_token"] == "<|im_end|>"
    assert found.special_tokens["bos_token"] is None
    assert found.generation_config["eos_token_id"] == [2, 0]
    assert found.add_bos_token is None


def test_without_tokenizer_json_the_hint_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(SubspecError, match=r"tokenizer\.json") as caught:
        read_tokenizer(tmp_path)
    assert caught.value.exit_code == Exit.UNSUPPORTED
    assert "AutoTokenizer" in caught.value.hint


def test_a_base_model_has_no_template_and_needs_no_config(tmp_path: Path) -> None:
    found = read(tmp_path)
    assert found.chat_template is None
    assert set(found.special_tokens.values()) == {None}
    assert found.generation_config == {}


@pytest.mark.parametrize(
    ("in_config", "in_file", "expected"),
    [
        ("from config", None, "from config"),
        ("from config", "from file é".encode(), "from file é"),
        (None, b"from file", "from file"),
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], None, "d"),
        ([{"name": "tool_use", "template": "t"}], None, None),
    ],
)
def test_a_template_is_the_file_or_the_configs_default(
    tmp_path: Path, in_config: object, in_file: bytes | None, expected: str | None
) -> None:
    assert read(tmp_path, {"chat_template": in_config}, in_file).chat_template == expected


def test_special_tokens_are_strings_or_objects_with_content(tmp_path: Path) -> None:
    config = {
        "bos_token": {"content": "<s>", "lstrip": False},
        "eos_token": "</s>",
        "pad_token": None,
    }
    expected = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": None, "unk_token": None}
    assert read(tmp_path, config).special_tokens == expected


@pytest.mark.parametrize("value", [True, False])
def test_add_bos_token_is_passed_on_as_said(tmp_path: Path, value: bool) -> None:
    assert read(tmp_path, {"add_bos_token": value}).add_bos_token is value


@pytest.mark.parametrize(
    "config",
    [
        {"chat_template": 3},
        {"chat_template": "x" * (1 << 20) + "x"},
        {"chat_template": [{"name": "default", "template": 3}]},
        {"bos_token": 1},
        {"bos_token": {"id": 1}},
        {"eos_token": "x" * 10_000},
        {"add_bos_token": "yes"},
        [],
    ],
    ids=lambda config: str(config)[:40],
)
def test_a_hostile_config_is_refused_with_the_fields_name(tmp_path: Path, config: Any) -> None:
    with pytest.raises(SubspecError) as caught:
        read(tmp_path, config)
    assert caught.value.exit_code == Exit.CORRUPT
    assert "tokenizer_config.json" in caught.value.message
    assert all(name in caught.value.message for name in config)
    assert len(caught.value.message) < 300


def test_huge_files_and_templates_that_are_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SubspecError, match="not UTF-8"):
        read(tmp_path, template=b"\xff")
    with pytest.raises(SubspecError, match=r"chat_template\.jinja is"):
        read(tmp_path, template=b"x" * (1 << 20) + b"x")
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(500 << 20)  # sparse
    with pytest.raises(SubspecError, match=r"tokenizer\.json is 524288000 bytes"):
        read_tokenizer(tmp_path)
