"""What the released code calls methods and their options, in its configurations and in recorded vectors."""

from __future__ import annotations

# names of files' methods -> our method; the first that a name starts with
FILE_METHODS = {
    "upt": "upt",
    "cocoop": "cocoop",
    "coop": "coop",
    "vpt_deep": "vpt_deep",
    "vpt": "vpt_shallow",
    "maple": "maple",
    "ivlp": "ivlp",
    "mvpt": "mvpt",
    "zsclip": "zeroshot",
    "zeroshot": "zeroshot",
}
# options of the released code -> ours, by method
RELEASED_OPTIONS: dict[str, dict[str, str]] = {
    "upt": {"CLASS_TOKEN_POSITION": "class_token_position"},
    "coop": {
        "N_CTX": "n_ctx",
        "CTX_INIT": "ctx_init",
        "CSC": "class_specific",
        "CLASS_TOKEN_POSITION": "class_token_position",
    },
    "cocoop": {"N_CTX": "n_ctx", "CTX_INIT": "ctx_init"},
    "vpt_shallow": {"N_CTX": "n_ctx"},
    "vpt_deep": {"N_CTX": "n_ctx"},
    "maple": {"N_CTX": "n_ctx", "CTX_INIT": "ctx_init", "PROMPT_DEPTH": "depth"},
    "ivlp": {
        "N_CTX_TEXT": "n_text",
        "N_CTX_VISION": "n_visual",
        "CTX_INIT": "ctx_init",
        "PROMPT_DEPTH_TEXT": "depth_text",
        "PROMPT_DEPTH_VISION": "depth_vision",
    },
    "mvpt": {"N_CTX_VISION": "n_ctx", "PROMPT_DEPTH_VISION": "depth"},
    "zeroshot": {},
}
