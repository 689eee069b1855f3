"""Token ids of what we write are those of transformers' tokenizer of the same folder."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.planner.model.hub import DEMO
from subspec.planner.model.tokenizer_files import TokenizerFiles, read_tokenizer
from subspec.runtime.text.chat_template import render
from subspec.runtime.text.tokenizer import ChatTokenizer

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
}
TEXTS = [
    "one  <|im_start|>  boat",
    "one boat",
    " two  boats",
    "<|im_start|>user\nhi<|im_end|>",
    "Grüße 😀",
    "<s>a</s>",
    "",
]


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(bos: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["</s>", "<s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(["one boat two boats user im start end"] * 5, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return tokenizer


def folder_of(folder: Path, tokenizer: Tokenizer | None = None, **files: object) -> Path:
    """files: name without ".json" -> what it holds."""
    (tokenizer or byte_level()).save(str(folder / "tokenizer.json"))
    for name, content in {"config": CONFIG, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def read(folder: Path, config: object = None, template: bytes | None = None) -> TokenizerFiles:
    folder_of(folder, **({} if config is None else {"tokenizer_config": config}))
    if template is not None:
        (folder / "chat_template.jinja").write_bytes(template)
    return read_tokenizer(folder)


def check_ids(folder: Path) -> TokenizerFiles:
    """The ids of the tokenizer alone, as the runtime loads it, are transformers', and so are the
    flags of its added tokens."""
    found = read_tokenizer(folder)
    ours = Tokenizer.from_str(found.tokenizer_json)
    theirs = AutoTokenizer.from_pretrained(folder)
    for token_id, token in theirs.added_tokens_decoder.items():
        assert repr(ours.get_added_tokens_decoder()[token_id]) == repr(token)
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text)["input_ids"], text
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(
            text, add_special_tokens=False
        )
    return found


def test_the_demo_models_files_are_complete() -> None:
    found = check_ids(DEMO)
    assert found.chat_template is not None
    assert "<|im_start|>" in found.chat_template
    assert found.special_tokens["eos_token"] == "<|im_end|>"
    assert found.special_tokens["bos_token"] is None
    assert found.generation_config["eos_token_id"] == [2, 0]
    assert not found.begins_with_bos


def described(content: str, **more: object) -> dict[str, object]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": content, **flags, "special": True, **more}


CONTROL = ("<|im_start|>", "<|im_end|>")


def tekken(pattern: str, last: str = "[INST]") -> Tokenizer:
    """Of a size that transformers looks at the regex of."""
    tokens = [*"<unk> <s> </s>".split(), last, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += ["Ba", "Bay", "eBay", "12", "123", *(f"filler{n}" for n in range(100_000))]
    merges = [("B", "a"), ("Ba", "y"), ("e", "Bay"), ("1", "2"), ("12", "3")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.mark.parametrize(("version", "last"), [("4.49.0", "[INST]"), ("5.1.0", "[INST]"),
                                               ("4.49.0", "[OTHER]")])  # fmt: skip
def test_a_tekken_that_splits_text_as_llama_3_does_is_mended_where_transformers_would_warn(
    tmp_path: Path, version: str, last: str
) -> None:
    """As in Mistral-Small-3.1. A new file is right, and another vocabulary's own."""
    sizes = {**CONFIG, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    config = {**sizes, "vocab_size": 131_072, "transformers_version": version}
    folder_of(tmp_path, tekken(LLAMA_3, last), config=config)
    found = read_tokenizer(tmp_path)
    ours = Tokenizer.from_str(found.tokenizer_json)
    mends = version.startswith("4") and last == "[INST]"
    theirs: Any = AutoTokenizer
    theirs = theirs.from_pretrained(tmp_path, fix_mistral_regex=mends, local_files_only=True)
    for text in (*TEXTS, "eBay 123"):
        assert ours.encode(text).ids == theirs(text)["input_ids"], text
    assert ours.encode("eBay 123").tokens[:3] == (
        ["e", "Bay", "Ġ"] if mends else ["eBay", "Ġ", "123"]
    )
    assert len(found.notes) == mends and all("not Tekken's" in note for note in found.notes)


def test_a_tokenizer_that_is_only_tekken_json_is_named(tmp_path: Path) -> None:
    (folder_of(tmp_path) / "tokenizer.json").unlink()
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(SubspecError, match="has its tokenizer as tekken.json") as caught:
        read_tokenizer(tmp_path)
    assert caught.value.exit_code == Exit.UNSUPPORTED
    assert "repository" in caught.value.hint and "save_pretrained" not in caught.value.hint


def test_a_large_vocabulary_of_a_mistral_in_metaspace_stays_as_it_is(tmp_path: Path) -> None:
    """transformers' mend would take its spaces away."""
    tokenizer = tekken(LLAMA_3)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    config = {**CONFIG, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    folder_of(tmp_path, tokenizer, config={**config, "vocab_size": 131_072})
    found = read_tokenizer(tmp_path)
    assert json.loads(found.tokenizer_json)["pre_tokenizer"]["type"] == "Metaspace"
    assert not found.notes


def test_added_tokens_of_the_config_are_taken_over(tmp_path: Path) -> None:
    added = {str(300 + index): described(token) for index, token in enumerate(CONTROL)}
    folder_of(tmp_path, tokenizer_config={"added_tokens_decoder": added, "eos_token": CONTROL[1]})
    found = check_ids(tmp_path)
    tokens = Tokenizer.from_str(found.tokenizer_json).get_added_tokens_decoder().values()
    assert {token.content for token in tokens if token.special} >= set(CONTROL)
    assert found.special_tokens["eos_token"] == CONTROL[1]


def test_added_tokens_of_their_own_file_are_taken_over(tmp_path: Path) -> None:
    folder_of(tmp_path, added_tokens={token: 300 + n for n, token in enumerate(CONTROL)})
    tokenizer = Tokenizer.from_str(check_ids(tmp_path).tokenizer_json)
    assert tokenizer.encode(CONTROL[0]).ids == [tokenizer.token_to_id(CONTROL[0])]


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"added_tokens_decoder": {"305": 0, "309": 1}}},
        {"tokenizer_config": {"added_tokens_decoder": {"301": 0, "300": 1}}},
        {"tokenizer_config": {"added_tokens_decoder": {"7": 0, "8": 1}}},
        {"tokenizer_config": {"added_tokens_decoder": {"300": 0, "301": 0}}},
        {"added_tokens": {CONTROL[0]: 309, CONTROL[1]: 305}},
        {"added_tokens": {CONTROL[0]: 4, CONTROL[1]: 5}},
        {
            "tokenizer_config": {"added_tokens_decoder": {"300": 1, "301": 0}},
            "added_tokens": {CONTROL[0]: 300, CONTROL[1]: 301},
        },
        {
            "tokenizer_config": {"added_tokens_decoder": {"300": 0}, "bos_token": "</s>"},
            "special_tokens_map": {"bos_token": "<s>", "eos_token": CONTROL[1]},
        },
        {
            "added_tokens": {CONTROL[0]: 300, CONTROL[1]: 301},
            "special_tokens_map": {"additional_special_tokens": list(CONTROL), "bos_token": "<s>"},
        },
        {"tokenizer_config": {"additional_special_tokens": list(CONTROL), "unk_token": "<unk>"}},
        {"tokenizer_config": {"extra_special_tokens": {"turn_token": CONTROL[0]}}},
    ],
    ids=lambda files: str(files)[:60],
)
@pytest.mark.parametrize(
    "flags",
    [{}, {"lstrip": True, "rstrip": True}, {"special": False}, {"normalized": True}],
    ids=str,
)
def test_tokens_that_files_disagree_about_are_transformers_to_settle(
    tmp_path: Path, files: dict[str, dict[str, Any]], flags: dict[str, object]
) -> None:
    """Ids with gaps, out of order, taken already or given twice; one file against another."""
    config = dict(files.get("tokenizer_config", {}))
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] = {
            number: described(CONTROL[which], **flags)
            for number, which in config["added_tokens_decoder"].items()
        }
    folder_of(tmp_path, **{**files, "tokenizer_config": config})
    found = check_ids(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path).special_tokens_map
    named = {name: token for name, token in found.special_tokens.items() if token is not None}
    assert named == {name: str(token) for name, token in theirs.items()}


def test_added_tokens_of_the_tokenizer_itself_keep_their_ids(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in CONTROL])
    folder_of(tmp_path, tokenizer)
    found = Tokenizer.from_str(check_ids(tmp_path).tokenizer_json)
    assert [found.token_to_id(t) for t in CONTROL] == [tokenizer.token_to_id(t) for t in CONTROL]


def test_special_tokens_may_be_in_their_own_file(tmp_path: Path) -> None:
    names = {"bos_token": "<s>", "eos_token": described("</s>"), "pad_token": CONTROL[0]}
    folder_of(tmp_path, special_tokens_map=names, tokenizer_config={"model_max_length": 512})
    found = check_ids(tmp_path)
    expected = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": CONTROL[0]}
    assert found.special_tokens == {**expected, "unk_token": None}


@pytest.mark.parametrize("bos", [True, False])
def test_whether_text_begins_with_bos_is_transformers_to_say(tmp_path: Path, bos: bool) -> None:
    # With a tokenizer.json transformers does not look at add_bos_token.
    names = {"bos_token": "<s>", "add_bos_token": not bos}
    folder_of(tmp_path, byte_level(bos), tokenizer_config=names)
    assert check_ids(tmp_path).begins_with_bos is bos


@pytest.mark.parametrize("bos", ["<s>", CONTROL[0]])
def test_a_bos_that_only_the_map_names_begins_a_chat(tmp_path: Path, bos: str) -> None:
    folder_of(tmp_path, special_tokens_map={"bos_token": bos}, tokenizer_config={})
    found = read_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_str(found.tokenizer_json)
    template = "{{ bos_token }}{{ messages[0].content }}"
    chat = ChatTokenizer(tokenizer, template, found.special_tokens, found.begins_with_bos)
    messages = [{"role": "user", "content": "one boat"}]
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        messages, chat_template=template, return_dict=False
    )
    assert chat.chat_ids(messages) == theirs
    assert theirs[0] == tokenizer.token_to_id(bos)


def test_what_tokenizer_json_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SubspecError, match="split_special_tokens is True") as caught:
        read(tmp_path, {"split_special_tokens": True})
    assert caught.value.exit_code == Exit.UNSUPPORTED
    read(tmp_path, {"split_special_tokens": False})


def test_tokens_beyond_the_embedding_are_one_line(tmp_path: Path) -> None:
    added = {token: 300 + n for n, token in enumerate(CONTROL)}
    size = byte_level().get_vocab_size()
    for rows, said in ((size + 2, None), (size + 1, "a token"), (size, "2 tokens")):
        folder_of(tmp_path, added_tokens=added, config={**CONFIG, "vocab_size": rows})
        notes = read_tokenizer(tmp_path).notes
        assert len(notes) == (said is not None)
        for note in notes:
            assert said is not None and f"{said} beyond the embedding's {rows} rows" in note
            assert "<|im_" in note and "\n" not in note


def test_generation_settings_that_are_not_obeyed_are_noted_and_kept(tmp_path: Path) -> None:
    folder_of(tmp_path, generation_config={"repetition_penalty": 1.3})
    found = read_tokenizer(tmp_path)
    assert found.generation_config == {"repetition_penalty": 1.3}
    assert "repetition_penalty 1.3" in found.notes[0]


def test_truncation_and_padding_of_a_training_run_are_left_out(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8, pad_token="</s>")
    found = Tokenizer.from_str(read_tokenizer(folder_of(tmp_path, tokenizer)).tokenizer_json)
    assert found.truncation is None and found.padding is None


def test_a_folder_without_a_tokenizer_is_told_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(SubspecError, match=r"tokenizer\.json") as caught:
        read_tokenizer(tmp_path)
    assert caught.value.exit_code == Exit.UNSUPPORTED
    assert "AutoTokenizer" in caught.value.hint


def test_what_reads_a_sentencepiece_model_is_named_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    monkeypatch.setattr("subspec.planner.model.tokenizer_files.find_spec", lambda name: None)
    with pytest.raises(SubspecError, match="sentencepiece and protobuf") as caught:
        read_tokenizer(tmp_path)
    assert caught.value.exit_code == Exit.UNSUPPORTED
    assert caught.value.hint == "pip install sentencepiece protobuf"


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
        ([{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}], None, "d"),
        ([{"name": "tool_use", "template": "t"}], None, None),
    ],
)
def test_a_template_is_the_file_or_the_configs_default(
    tmp_path: Path, in_config: object, in_file: bytes | None, expected: str | None
) -> None:
    assert read(tmp_path, {"chat_template": in_config}, in_file).chat_template == expected


MACROS = """\
{%- macro kind(spec) %}
    {%- if 'items' in spec %}{{ 'list[' + kind(spec['items']) + ']' }}
    {%- else %}{{ spec.type }}{% endif %}
{%- endmacro %}
{% set named = 'tools' %}
{% macro head() %}<{{ named }}>{% endmacro %}
{{ head() }}
{% for tool in tools or [] %}
    {{ tool.function.name + kind(tool.function.parameters) }}
{% endfor %}
"""


@pytest.mark.parametrize(
    "template",
    [
        MACROS,
        "  {% set a = 1 %}\n {{ a }} \n\n",
        "\n\n{{- 'a' -}}\n ",
        "{%- for m in messages %}{{ m.content }}{% endfor -%}\n",
        "a{# of the end #}\n",
        "    ",
        "{{ 'a' }}\n    ",
        "\r\na\r\n",
        "{% raw %}{{ a }}{% endraw %}",
    ],
)
def test_a_template_for_tools_is_taken_where_there_are_tools(tmp_path: Path, template: str) -> None:
    """As transformers does, and what either renders stays the same to the last space."""
    other = "{{ 'other' }}\n\n"
    tools = [
        {
            "type": "function",
            "function": {"name": "f", "parameters": {"items": {"items": {"type": "t"}}}},
        }
    ]
    messages = [{"role": "user", "content": "hi"}]
    for named in (
        {"tool_use": template, "default": other},
        {"tool_use": other, "default": template},
    ):
        config = {"chat_template": [{"name": k, "template": v} for k, v in named.items()]}
        ours = read(tmp_path, config).chat_template
        theirs = AutoTokenizer.from_pretrained(tmp_path)
        for given in (tools, None):
            variables = {"messages": messages, "tools": given, "add_generation_prompt": True}
            assert ours is not None
            assert render(ours, variables) == theirs.apply_chat_template(
                messages, given, tokenize=False, add_generation_prompt=True
            )


def test_a_template_in_a_folder_of_several_does_not_hide_the_default(tmp_path: Path) -> None:
    more = tmp_path / "additional_chat_templates"
    more.mkdir()
    (more / "rag.jinja").write_text("of documents")
    assert read(tmp_path, template=b"plain").chat_template == "plain"


def test_special_tokens_are_strings_or_objects_with_content(tmp_path: Path) -> None:
    config = {
        "bos_token": {"__type": "AddedToken", **described("<s>")},
        "eos_token": "</s>",
        "pad_token": None,
    }
    expected = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": None, "unk_token": None}
    assert read(tmp_path, config).special_tokens == expected


def test_a_tokenizers_own_code_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('this ran')")
    config = {
        "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        "tokenizer_class": "Evil",
    }
    found = read(tmp_path, config)  # the file says all that is needed
    assert Tokenizer.from_str(found.tokenizer_json).encode("one boat").ids


@pytest.mark.parametrize("name", ["Llama", "Qwen2"])
def test_the_file_decides_how_text_is_split(tmp_path: Path, name: str) -> None:
    """transformers' class for qwen2 would split a line's end from the spaces after it."""
    text = "def f(x):\n    return 12345\n\n\n  x  "
    kind = {"model_type": name.lower(), "architectures": [f"{name}ForCausalLM"]}
    folder_of(tmp_path, config=CONFIG | kind)
    expected = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    found = Tokenizer.from_str(read_tokenizer(tmp_path).tokenizer_json)
    assert found.encode(text).ids == expected.encode(text).ids
    assert found.pre_tokenizer.__getstate__() == expected.pre_tokenizer.__getstate__()


@pytest.mark.parametrize(
    "config",
    [
        {"chat_template": 3},
        {"chat_template": "x" * (1 << 20) + "x"},
        {"chat_template": [{"name": "default", "template": 3}]},
        {"bos_token": 1},
        {"bos_token": {"id": 1}},
        {"eos_token": "x" * 10_000},
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


@pytest.mark.parametrize(
    "config",
    [
        {"added_tokens_decoder": {"x": described("<a>")}},
        {"added_tokens_decoder": {"1": 3}},
        {"added_tokens_decoder": [1]},
        {"extra_special_tokens": 3},
    ],
    ids=str,
)
def test_what_transformers_stumbles_over_is_one_sentence(tmp_path: Path, config: Any) -> None:
    with pytest.raises(SubspecError) as caught:
        read(tmp_path, config)
    assert caught.value.exit_code == Exit.CORRUPT
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 500


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{}", "cannot be read"),
        (b"\xff", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    ],
)
def test_a_damaged_tokenizer_is_one_sentence(tmp_path: Path, content: bytes, said: str) -> None:
    folder_of(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(SubspecError, match=said) as caught:
        read_tokenizer(tmp_path)
    assert caught.value.exit_code == Exit.CORRUPT


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "generation_config.json",
        "chat_template.jinja",
        "additional_chat_templates/rag.jinja",
    ],
)
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "a Git LFS pointer",
        ),
        (b"<!doctype html><html>Not Found</html>", "a web page"),
        (b"", "empty"),
    ],
)
def test_what_stands_in_a_tokenizer_files_place_is_named(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    folder_of(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SubspecError, match=f"{Path(name).name} is {said}") as caught:
        read_tokenizer(tmp_path)
    assert caught.value.exit_code == Exit.CORRUPT


def test_a_panic_in_the_tokenizers_library_is_one_sentence(tmp_path: Path) -> None:
    folder_of(tmp_path, byte_level(bos=True))
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["post_processor"]["special_tokens"] = {}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(SubspecError, match="PanicException") as caught:
        read_tokenizer(tmp_path)
    assert caught.value.exit_code == Exit.CORRUPT


def test_huge_files_and_templates_that_are_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SubspecError, match="not UTF-8"):
        read(tmp_path, template=b"\xff")
    with pytest.raises(SubspecError, match=r"chat_template\.jinja is"):
        read(tmp_path, template=b"x" * (1 << 20) + b"x")
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(500 << 20)  # sparse
    with pytest.raises(SubspecError, match=r"tokenizer\.json is 524288000 bytes"):
        read_tokenizer(tmp_path)
