"""Check that a draft model has the vocabulary of a model: the same ids for the same strings.

Rows of an embedding beyond the tokenizer's tokens are padding, which may differ in number within a
family: no text contains them.
"""

import json
from typing import Any

from subspec.artifacts.common.errors import Exit, SubspecError

MAX_SHARE_MISSING = 0.01  # of the model's tokens; chosen: added ones that a base model lacks


def check_vocabulary(of_model: str, of_draft_model: str, draft_model: str) -> None:
    """Raise SubspecError(USAGE) unless each token of the model has the same id in the draft model,
    or the draft model has no token of this id. of_model, of_draft_model: the tokenizer.json of
    both; draft_model: its name for the user."""
    ours, theirs = tokens_by_id(of_model), tokens_by_id(of_draft_model)
    hint = "choose a smaller model of the same family, or leave out --draft-model"
    for token in sorted(ours.keys() & theirs.keys()):
        if ours[token] != theirs[token]:
            raise SubspecError(
                Exit.USAGE,
                f"the draft model {draft_model} has another vocabulary: token {token} is "
                f"{theirs[token][:40]!r} there, expected {ours[token][:40]!r}",
                hint,
            )
    missing = len(ours.keys() - theirs.keys())
    if missing > MAX_SHARE_MISSING * len(ours):
        raise SubspecError(
            Exit.USAGE,
            f"the draft model {draft_model} has {len(ours) - missing} of the model's {len(ours)} "
            "tokens, expected all of them",
            hint,
        )


def tokens_by_id(tokenizer_json: str) -> dict[int, str]:
    """Token id -> string, of a tokenizer.json that `tokenizers` has written."""
    found: dict[str, Any] = json.loads(tokenizer_json)
    vocabulary = found["model"]["vocab"]
    if isinstance(vocabulary, dict):
        tokens = {number: token for token, number in vocabulary.items()}
    else:  # Unigram: pairs of token and score
        tokens = dict(enumerate(token for token, _ in vocabulary))
    return tokens | {one["id"]: one["content"] for one in found.get("added_tokens") or ()}
