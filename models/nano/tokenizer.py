"""The nano tokenizer: byte-level BPE with Kimi's split pattern and special tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from models.nano.vocab import EOS_ID, IM_END_ID, NUM_BPE_TOKENS, SPECIAL_IDS, SPECIAL_TOKENS

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLIT_PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def train_tokenizer(corpus: Iterable[str]) -> Tokenizer:
    """Train on ``corpus``; every byte is in the alphabet, so every text has an encoding.

    Digits are split further than Kimi does, one token each: a small model adds
    digit by digit and cannot learn a thousand three-digit tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_BPE_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    # A corpus too small to fill the space would shift the special ids.
    for index in range(tokenizer.get_vocab_size(), NUM_BPE_TOKENS):
        tokenizer.add_tokens([AddedToken(f"<|unused_{index}|>", normalized=False)])
    for text, special in SPECIAL_TOKENS:
        token = AddedToken(text, special=special, normalized=False)
        if special:
            tokenizer.add_special_tokens([token])
        else:
            tokenizer.add_tokens([token])
    for text, wanted in SPECIAL_IDS.items():
        if tokenizer.token_to_id(text) != wanted:
            raise ValueError(f"{text} got id {tokenizer.token_to_id(text)}, wanted {wanted}")
    return tokenizer


def plain_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of ``folder`` without added tokens, for the text of messages.

    With it a user's literal ``<|im_end|>`` is ordinary text and can end no turn.
    """
    data = json.loads((folder / "tokenizer.json").read_text())
    data["added_tokens"] = []
    return Tokenizer.from_str(json.dumps(data))


def tokenizer_config() -> dict[str, object]:
    """The content of ``tokenizer_config.json``."""
    return {
        "added_tokens_decoder": {
            str(SPECIAL_IDS[text]): {
                "content": text,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": special,
            }
            for text, special in SPECIAL_TOKENS
        },
        "additional_special_tokens": [
            text for text, special in SPECIAL_TOKENS if special and not text.startswith("[")
        ]
        + ["[EOT]"],
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def generation_config() -> dict[str, object]:
    """The content of ``generation_config.json``: both of Kimi's ends, greedy by default.

    vLLM takes its default sampling from this file, so a request that names no
    temperature gets the most likely answer.
    """
    return {
        "bos_token_id": SPECIAL_IDS["[BOS]"],
        "eos_token_id": [IM_END_ID, EOS_ID],
        "pad_token_id": SPECIAL_IDS["[PAD]"],
        "do_sample": False,
        "temperature": 0.0,
    }


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer's files and ``generation_config.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, data in (
        ("tokenizer_config.json", tokenizer_config()),
        ("generation_config.json", generation_config()),
    ):
        (folder / name).write_text(json.dumps(data, indent=2) + "\n")
