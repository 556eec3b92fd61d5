"""Asks llama.cpp about a GGUF file, through the C functions of the package xllamacpp:

    python llama_cpp.py MODEL.gguf QUESTIONS.json ANSWERS.json

QUESTIONS: {"texts": [text, …], "windows": [[token, …], …], "logits": whether to answer them}
ANSWERS:   {"tokens": [[token, …], …], special tokens put around and parsed inside,
            "nll": [nats of the tokens of each window but the first], "logits": [[[…], …], …]}

Keys and values are cached in float16 and inputs of quantized linears rounded to 8 bits, as llama.cpp does by default.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_uint32, c_void_p
from pathlib import Path

import numpy as np

sys.setdlopenflags(os.RTLD_NOW | os.RTLD_GLOBAL)
from xllamacpp import xllamacpp  # noqa: E402


class Opaque(ctypes.Structure):
    """A struct of parameters that is only handed from one function to another. It has more room than any version of it:
    the ABI passes it in memory, and the callee looks at its own part."""

    _fields_ = (("room", c_int8 * 1024),)


class ContextParameters(ctypes.Structure):
    """llama_context_params: its first fields, and room for the others."""

    _fields_ = (
        ("n_ctx", c_uint32), ("n_batch", c_uint32), ("n_ubatch", c_uint32), ("n_seq_max", c_uint32),
        ("room", c_int8 * 1008),
    )  # fmt: skip


class Batch(ctypes.Structure):
    """llama_batch"""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


def function(library: ctypes.CDLL, name: str, result: object, *arguments: object) -> object:
    found = getattr(library, name)
    found.restype, found.argtypes = result, arguments
    return found


def main(model: str, questions: Path, answers: Path) -> None:
    library = ctypes.CDLL(xllamacpp.__file__)

    def of(name: str, result: object, *arguments: object) -> object:
        return function(library, f"llama_{name}", result, *arguments)

    asked = json.loads(questions.read_text(encoding="utf-8"))
    of("backend_init", None)()
    parameters = of("model_default_params", Opaque)()
    loaded = of("model_load_from_file", c_void_p, c_char_p, Opaque)(model.encode(), parameters)
    if not loaded:
        sys.exit(f"llama.cpp does not load {model}")
    vocabulary = of("model_get_vocab", c_void_p, c_void_p)(loaded)
    size = of("vocab_n_tokens", c_int32, c_void_p)(vocabulary)
    tokenize = of("tokenize", c_int32, c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool)
    defaults = of("context_default_params", ContextParameters)
    make = of("init_from_model", c_void_p, c_void_p, ContextParameters)
    free = of("free", None, c_void_p)
    new_batch = of("batch_init", Batch, c_int32, c_int32, c_int32)
    threads = of("set_n_threads", None, c_void_p, c_int32, c_int32)
    decode = of("decode", c_int32, c_void_p, Batch)
    get_logits = of("get_logits", POINTER(c_float), c_void_p)
    found: dict[str, list[object]] = {"tokens": [], "nll": [], "logits": []}
    for text in asked.get("texts", []):
        raw = text.encode()
        room = (c_int32 * (len(raw) + 16))()
        found["tokens"].append(room[: tokenize(vocabulary, raw, len(raw), room, len(room), True, True)])
    for window in asked.get("windows", []):
        wanted = defaults()
        wanted.n_ctx = wanted.n_batch = wanted.n_ubatch = len(window)
        context = make(loaded, wanted)
        threads(context, 1, 1)
        batch = new_batch(len(window), 0, 1)
        batch.n_tokens = len(window)
        for place, token in enumerate(window):
            batch.token[place], batch.pos[place] = token, place
            batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
        if decode(context, batch):
            sys.exit("llama_decode failed")
        logits = np.ctypeslib.as_array(get_logits(context), (len(window), size)).astype(np.float64)
        shifted = logits - logits.max(axis=1, keepdims=True)
        known = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        found["nll"].append(-float(known[np.arange(len(window) - 1), window[1:]].sum()))
        if asked.get("logits"):
            found["logits"].append(logits.tolist())
        free(context)
    answers.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
