"""The id space: byte-level BPE first, Kimi's special tokens, by name and in order, last."""

from __future__ import annotations

VOCAB_SIZE = 3072

# (text, special). Tool and think tokens are not special, as with Kimi: parsers
# must still see them when special tokens are skipped.
SPECIAL_TOKENS: tuple[tuple[str, bool], ...] = (
    ("[BOS]", True),
    ("[EOS]", True),
    ("<|im_end|>", True),
    ("<|im_user|>", True),
    ("<|im_assistant|>", True),
    ("<|start_header_id|>", True),
    ("<|end_header_id|>", True),
    ("[EOT]", True),
    ("<|im_system|>", True),
    ("<|tool_calls_section_begin|>", False),
    ("<|tool_calls_section_end|>", False),
    ("<|tool_call_begin|>", False),
    ("<|tool_call_argument_begin|>", False),
    ("<|tool_call_end|>", False),
    ("<|im_middle|>", True),
    ("<|media_begin|>", True),
    ("<|media_content|>", True),
    ("<|media_end|>", True),
    ("<|media_pad|>", True),
    ("<think>", False),
    ("</think>", False),
    ("[UNK]", True),
    ("[PAD]", True),
)

NUM_BPE_TOKENS = VOCAB_SIZE - len(SPECIAL_TOKENS)
SPECIAL_IDS: dict[str, int] = {
    text: NUM_BPE_TOKENS + index for index, (text, _) in enumerate(SPECIAL_TOKENS)
}
BOS_ID = SPECIAL_IDS["[BOS]"]
EOS_ID = SPECIAL_IDS["[EOS]"]
PAD_ID = SPECIAL_IDS["[PAD]"]
IM_END_ID = SPECIAL_IDS["<|im_end|>"]
