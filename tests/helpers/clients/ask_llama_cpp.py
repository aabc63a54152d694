"""llama.cpp's log-probabilities: `python ask_llama_cpp.py REQUEST.json ANSWER.json`; see `asking`.

The cache of keys and values is in float32, so that what differs is weights and kernels alone.
"""

import ctypes
import importlib.metadata
import json
import sys
from pathlib import Path

import llama_cpp as library
import numpy as np


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text())
    quiet = library.llama_log_callback(lambda *_: None)
    library.llama_log_set(quiet, ctypes.c_void_p(0))
    library.llama_backend_init()
    options = library.llama_model_default_params()
    options.n_gpu_layers = 0
    model = library.llama_model_load_from_file(asked["model"].encode(), options)
    if not model:
        raise SystemExit(f"llama.cpp does not load {asked['model']}")
    answers = []
    for adapter in asked["adapters"]:
        context = _context(model, asked["longest"] + 8)
        if adapter:
            _put(context, model, adapter)
        logprobs, first = [], []
        for text, wanted in zip(asked["texts"], asked["wanted"], strict=True):
            logits = _logits(context, model, text, len(wanted)).astype(np.float64)
            found = logits - logits.max(-1, keepdims=True)
            found -= np.log(np.exp(found).sum(-1, keepdims=True))
            logprobs += [found[place, ids].tolist() for place, ids in enumerate(wanted)]
            first += found.argmax(-1).tolist()
        answers.append({"logprobs": logprobs, "first": first})
        library.llama_free(context)
    tokens = [_tokens(model, text) for text in asked["strings"]]
    versions = {"llama-cpp-python": importlib.metadata.version("llama-cpp-python")}
    Path(sys.argv[2]).write_text(json.dumps({"versions": versions, "answers": answers, "tokens": tokens}))


def _context(model: object, length: int) -> object:
    options = library.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = -(-length // 256) * 256
    options.n_threads = options.n_threads_batch = 1
    options.flash_attn_type = 0
    options.type_k = options.type_v = 0  # float32
    context = library.llama_init_from_model(model, options)
    if not context:
        raise SystemExit("llama.cpp makes no context")
    return context


def _put(context: object, model: object, path: str) -> None:
    adapter = library.llama_adapter_lora_init(model, path.encode())
    if not adapter:
        raise SystemExit(f"llama.cpp does not load {path}")
    one = (type(adapter) * 1)(adapter)
    if library.llama_set_adapters_lora(context, one, 1, (ctypes.c_float * 1)(1.0)):
        raise SystemExit(f"llama.cpp does not take {path}")


def _logits(context: object, model: object, text: list[int], last: int) -> np.ndarray:
    """Logits (last, vocabulary) of the last positions."""
    size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    library.llama_memory_clear(library.llama_get_memory(context), True)
    batch = library.llama_batch_init(len(text), 0, 1)
    batch.n_tokens = len(text)
    for place, token in enumerate(text):
        batch.token[place], batch.pos[place] = token, place
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        batch.logits[place] = place >= len(text) - last
    if library.llama_decode(context, batch):
        raise SystemExit("llama.cpp does not decode")
    rows = [
        np.ctypeslib.as_array(library.llama_get_logits_ith(context, place), (size,)).copy()
        for place in range(len(text) - last, len(text))
    ]
    library.llama_batch_free(batch)
    return np.stack(rows)


def _tokens(model: object, text: str) -> list[int]:
    """How llama.cpp cuts a text, as it cuts a prompt."""
    data = text.encode()
    room = (library.llama_token * (len(data) + 8))()
    vocabulary = library.llama_model_get_vocab(model)
    count = library.llama_tokenize(vocabulary, data, len(data), room, len(room), True, True)
    return list(room[:count])


if __name__ == "__main__":
    main()
