"""A tokenizer in the form of Kimi-K2's files."""

import base64
import json

KIMI_TOKENS = [
    *("<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|im_end|>"),
    *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    *("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
]


def write(path):
    """The 256 bytes, a few merges and Kimi-K2's tokens of turns; returns the first id of those."""
    tokens = [bytes([i]) for i in range(256)] + [b"he", b"ll", b"12", b"123", "你".encode()[:2], "你".encode()]
    lines = [base64.b64encode(token) + f" {rank}".encode() for rank, token in enumerate(tokens)]
    (path / "tiktoken.model").write_bytes(b"\n".join(lines) + b"\n")
    added = {str(len(tokens) + i): {"content": token} for i, token in enumerate(KIMI_TOKENS)}
    (path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    return len(tokens)
