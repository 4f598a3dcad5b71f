"""How llama.cpp splits text into words before merging, by the names that GGUF files use, and its types of tokens.

Source: llama-vocab.cpp of llama.cpp.
"""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's token types
SPACE = "▁"

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+END|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*END"
)
_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_REST_SLASH = rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"

GPT2 = "gpt2"  # the built-in pattern of byte-level pre-tokenisation
DIGITS = "digits"
# (Patterns that split text, in order; whether words that are tokens skip merging) -> llama.cpp's name.
PATTERNS: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((DIGITS, GPT2), False): "smollm",
    ((rf"{_SHORT}|{_WORDS}|\p{{N}}{{1,3}}{_REST}",), True): "llama-bpe",
    ((rf"{_SHORT}|{_WORDS}|\p{{N}}{{1,3}}{_REST}",), False): "smaug-bpe",
    ((rf"{_SHORT}|{_WORDS}|\p{{N}}{_REST}",), False): "qwen2",
    (
        (rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",),
        False,
    ): "qwen35",
    ((_CASED.replace("END", "") + r"|\p{N}" + _REST_SLASH,), True): "tekken",
    ((_CASED.replace("END", f"{_SHORT}?") + r"|\p{N}{1,3}" + _REST_SLASH,), False): "gpt-4o",
}
ALIASES = {  # further names of the same patterns
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "pixtral"), "llama-bpe"),
    **dict.fromkeys(("deepseek-r1-qwen", "megrez"), "qwen2"),
    **dict.fromkeys(("phi-2", "jina-es", "jina-de"), "gpt-2"),
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell"), "smollm"),
    "llama4": "gpt-4o",
}
