#!/usr/bin/env python3
"""Write a tiny model file (GGUF version 3, llama architecture) that a real engine loads and serves.

    python tiny_gguf.py OUT [--seed N]        # about 0.5 MB; one seed, one sequence of bytes
    python tiny_gguf.py tiny.gguf --parts 3   # as tiny-00001-of-00003.gguf and so on

What the model says is a salad of whole English words, one word a token, so a stream can be
read and counted. It never chooses to stop: the request's token limit decides the length.

The one idea: hidden feature 0 is the same constant for every token, and no layer writes to
it, so column 0 of the output matrix is a bias on each token's logit. A large negative bias
keeps everything that is not a word (raw bytes, markers, end-of-sequence) out of the answers.

Deliberately not known here: which engine reads the file, how it is quantized (never: all
weights are 32-bit floats), and anything about real language.
"""
import argparse
import math
import random
import struct
import sys
from array import array
from pathlib import Path
from typing import Callable, Iterable, NamedTuple

# Sizes. Two layers, so that an engine's per-layer cache is exercised; the rest only sets the file size.
HIDDEN = 64
HEADS = 4
FEED_FORWARD = 128
LAYERS = 2
CONTEXT = 8192  # rotary positions need no weights, so a long context costs nothing

CONSTANT = 3.0      # feature 0 of every token
BANISHED = -40.0    # logit bias of whatever must not be said; words reach about +-15
REPULSION = 0.4     # how much less likely a word is right after itself
WORD_SPREAD = 0.6   # spread of the words' logits: wide enough for a clear winner at temperature 0

WORDS = """
a about again all always and any apple are at be been bird blue boat book bread bright but by came can
city clear cloud cold come could day deep did door down dream each early earth even eye far field find
fire first fish for forest found from garden give go gold good great green had hand have he hear heart
hello her here hill his home house how if in into is island it just keep know lake leaf light like
little long make many moon more morning my never new night no not now of off old on one open or our out
over people quiet rain red river road room sea see she sing sky slow small snow so some song star still
stone story summer sun tall tell that the their then there they this time to town tree two under up very
walk warm was water way we well were what when where which white who will wind with word world you young
""".split()

# The markers of a chat: what opens a turn, what ends it. A call of a tool is one that begins a turn within
# another: an engine finds that in the template, and whoever wants a call makes that marker likely.
TURN, END = "<|turn|>", "<|end-of-turn|>"
CHAT_TEMPLATE = (
    f"{{% if tools %}}{TURN}system\n"
    "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    f"{END}\n{{% endif %}}"
    "{% for message in messages %}"
    f"{{{{ '{TURN}' + message['role'] + '\n' + (message['content'] or '') }}}}"
    "{% if message['tool_calls'] %}{% set call = message['tool_calls'][0]['function'] %}"
    f"{TURN}{{{{ {{'name': call['name'], 'arguments': call['arguments']}} | tojson }}}}{{% endif %}}"
    f"{{{{ '{END}\n' }}}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{TURN}assistant\n' }}}}{{% endif %}}"
)

# Value types and tensor types, numbered by the GGUF specification.
UINT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 2, 4, 5, 6, 7, 8, 9
TENSOR_F32 = 0
ALIGNMENT = 32
TOKEN_NORMAL, TOKEN_CONTROL = 1, 3


class Vocabulary(NamedTuple):
    """Token texts and kinds in id order: 256 bytes, then the words, then the markers."""
    texts: list[str]
    kinds: list[int]
    merges: list[str]
    words: range
    turn: int
    end: int


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in GPT-2 style vocabularies.

    Printable Latin-1 bytes stand for themselves; the others take the code points from 256 up, in order.
    """
    spare = iter(range(256, 512))
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def vocabulary() -> Vocabulary:
    alphabet = byte_alphabet()
    space = alphabet[ord(" ")]
    words = [space + word for word in dict.fromkeys(WORDS)]
    # Every merge lengthens a prefix of a word by one letter, so only one chain can grow and
    # " hello" in a prompt always becomes its single token. A prefix that is no word is no
    # token either; engines fall back to its bytes.
    merges = dict.fromkeys(
        f"{word[:cut]} {word[cut]}" for word in words for cut in range(1, len(word))
    )
    texts = [*alphabet, *words, TURN, END]
    kinds = [TOKEN_NORMAL] * (len(texts) - 2) + [TOKEN_CONTROL] * 2
    said = range(len(alphabet), len(alphabet) + len(words))
    return Vocabulary(texts, kinds, list(merges), said, turn=said.stop, end=said.stop + 1)



def text(value: str) -> bytes:
    raw = value.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


ENCODERS: dict[int, Callable[..., bytes]] = {
    UINT16: struct.Struct("<H").pack,
    UINT32: struct.Struct("<I").pack,
    INT32: struct.Struct("<i").pack,
    FLOAT32: struct.Struct("<f").pack,
    BOOL: struct.Struct("<?").pack,
    STRING: text,
}


def entry(key: str, kind: int, value) -> bytes:
    return text(key) + struct.pack("<I", kind) + ENCODERS[kind](value)


def list_entry(key: str, kind: int, values: list) -> bytes:
    header = struct.pack("<IIQ", ARRAY, kind, len(values))
    return text(key) + header + b"".join(map(ENCODERS[kind], values))


def metadata(vocab: Vocabulary, seed: int) -> list[bytes]:
    return [
        entry("general.architecture", STRING, "llama"),
        entry("general.name", STRING, f"tiny word salad, seed {seed}"),
        entry("general.alignment", UINT32, ALIGNMENT),
        entry("general.file_type", UINT32, TENSOR_F32),
        entry("llama.vocab_size", UINT32, len(vocab.texts)),
        entry("llama.context_length", UINT32, CONTEXT),
        entry("llama.embedding_length", UINT32, HIDDEN),
        entry("llama.block_count", UINT32, LAYERS),
        entry("llama.feed_forward_length", UINT32, FEED_FORWARD),
        entry("llama.attention.head_count", UINT32, HEADS),
        entry("llama.attention.head_count_kv", UINT32, HEADS),
        entry("llama.attention.layer_norm_rms_epsilon", FLOAT32, 1e-5),
        entry("llama.rope.dimension_count", UINT32, HIDDEN // HEADS),
        entry("llama.rope.freq_base", FLOAT32, 10_000.0),
        entry("tokenizer.ggml.model", STRING, "gpt2"),
        entry("tokenizer.ggml.pre", STRING, "gpt-2"),
        list_entry("tokenizer.ggml.tokens", STRING, vocab.texts),
        list_entry("tokenizer.ggml.token_type", INT32, vocab.kinds),
        list_entry("tokenizer.ggml.merges", STRING, vocab.merges),
        entry("tokenizer.ggml.bos_token_id", UINT32, vocab.turn),
        entry("tokenizer.ggml.eos_token_id", UINT32, vocab.end),
        entry("tokenizer.ggml.add_bos_token", BOOL, False),
        entry("tokenizer.chat_template", STRING, CHAT_TEMPLATE),
    ]



class Tensor(NamedTuple):
    """Weights in row order. GGUF states the shape fastest-varying first: (columns, rows)."""
    name: str
    shape: tuple[int, ...]
    weights: array


def noise(seed: int, name: str, rows: int, columns: int, spread: float) -> Tensor:
    # Each tensor draws from a generator named after it, so one more tensor changes no other.
    # Uniform, not Gaussian: no logarithm or cosine whose last bit depends on the C library.
    generator = random.Random(f"{seed}/{name}")
    reach = spread * math.sqrt(3.0)
    draws = ((2.0 * generator.random() - 1.0) * reach for _ in range(rows * columns))
    return Tensor(name, (columns, rows), array("f", draws))


def ones(name: str) -> Tensor:  # the scale of a norm
    return Tensor(name, (HIDDEN,), array("f", [1.0] * HIDDEN))


def with_column_0(tensor: Tensor, values: Iterable[float]) -> Tensor:
    columns = tensor.shape[0]
    tensor.weights[0::columns] = array("f", values)
    return tensor


def silent_on_feature_0(tensor: Tensor) -> Tensor:
    columns = tensor.shape[0]
    tensor.weights[:columns] = array("f", bytes(4 * columns))
    return tensor


def layer(seed: int, index: int) -> list[Tensor]:
    def matrix(part: str, rows: int, columns: int) -> Tensor:
        return noise(seed, f"blk.{index}.{part}.weight", rows, columns, columns ** -0.5)

    return [
        ones(f"blk.{index}.attn_norm.weight"),
        *(matrix(part, HIDDEN, HIDDEN) for part in ("attn_q", "attn_k", "attn_v")),
        silent_on_feature_0(matrix("attn_output", HIDDEN, HIDDEN)),
        ones(f"blk.{index}.ffn_norm.weight"),
        *(matrix(part, FEED_FORWARD, HIDDEN) for part in ("ffn_gate", "ffn_up")),
        silent_on_feature_0(matrix("ffn_down", HIDDEN, FEED_FORWARD)),
    ]


def tensors(vocab: Vocabulary, seed: int) -> list[Tensor]:
    count = len(vocab.texts)
    bias = [0.0 if token in vocab.words else BANISHED for token in range(count)]
    embedding = noise(seed, "token_embd.weight", count, HIDDEN, 1.0)
    output = noise(seed, "output.weight", count, HIDDEN, WORD_SPREAD)
    # A word dislikes to follow itself: without this, whole answers are one word repeated, and
    # a test could not see that a token was lost or sent twice.
    for place, weight in enumerate(embedding.weights):
        output.weights[place] -= REPULSION * weight
    return [
        with_column_0(embedding, [CONSTANT] * count),
        *(tensor for index in range(LAYERS) for tensor in layer(seed, index)),
        ones("output_norm.weight"),
        with_column_0(output, bias),
    ]


def aligned(raw: bytes) -> bytes:
    return raw + bytes(-len(raw) % ALIGNMENT)


def part_file(entries: list[bytes], parts: list[Tensor]) -> bytes:
    """Header, metadata, tensor directory, padding, then the weights in the directory's order."""
    directory, blob = b"", b""
    for name, shape, weights in parts:
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        directory += text(name) + sizes + struct.pack("<IQ", TENSOR_F32, len(blob))
        blob += aligned(struct.pack(f"<{len(weights)}f", *weights))
    header = struct.pack("<4sIQQ", b"GGUF", 3, len(parts), len(entries))
    return aligned(header + b"".join(entries) + directory) + blob


def model_files(seed: int, count: int) -> list[bytes]:
    """The model in so many files. Of several only the first says what the model is."""
    vocab = vocabulary()
    entries, whole = metadata(vocab, seed), tensors(vocab, seed)
    if count == 1:
        return [part_file(entries, whole)]
    each = -(-len(whole) // count)
    files = []
    for number in range(count):
        split = [
            entry("split.no", UINT16, number),
            entry("split.count", UINT16, count),
            entry("split.tensors.count", INT32, len(whole)),
        ]
        about = entries + split if number == 0 else split
        files.append(part_file(about, whole[number * each:(number + 1) * each]))
    return files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", metavar="OUT", help="the file to write")
    parser.add_argument("--seed", type=int, default=1, help="another seed, another model (default 1)")
    parser.add_argument("--parts", type=int, default=1, choices=range(1, 10), help="files to split it into")
    options = parser.parse_args()
    for number, raw in enumerate(model_files(options.seed, options.parts), start=1):
        out = Path(options.out)
        if options.parts > 1:
            out = out.with_name(f"{out.stem}-{number:05}-of-{options.parts:05}{out.suffix}")
        try:
            out.write_bytes(raw)
        except OSError as error:
            print(f"tiny_gguf: cannot write {out}: {error.strerror}", file=sys.stderr)
            return 2
        print(f"{out}: {len(raw)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
